"""Published split lists: recognising those of a run, and getting those that are missing (spec, Splits)."""

from __future__ import annotations

import hashlib
import urllib.request
from collections.abc import Callable, Iterable
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError

import yaml

from ..errors import UserError
from ..files import replacing
from .catalog import DATASETS
from .lists import read_list

AUTHORS = "https://raw.githubusercontent.com/ZhenZHAO/iMAS/main/data/splits/"


class Published(NamedTuple):
    """A published list; ``rule`` is explained in ``splits.yaml``."""

    count: int
    sha256: str
    rule: str


MANIFEST = {
    name: Published(**entry)
    for name, entry in yaml.safe_load(Path(__file__).with_name("splits.yaml").read_text()).items()
}
PUBLISHED = tuple(dict.fromkeys(name.partition("/")[0] for name in MANIFEST))  # data sets with published lists


def digest(names: Iterable[str]) -> str:
    """SHA-256 of a list, whatever its order: over the sorted names, each ended by a newline (spec, Splits)."""
    return hashlib.sha256("".join(f"{name}\n" for name in sorted(names)).encode()).hexdigest()


def describe_lists(labeled: list[str], unlabeled: list[str], val: list[str]) -> str:
    """One line for a log: the published protocol that these lists are, such as "Pascal blended 662", whatever the order
    of their lines; else what is known of each that is not empty. A protocol may do without its unlabeled list.
    """
    given = {kind: names for kind, names in (("labeled", labeled), ("unlabeled", unlabeled), ("val", val)) if names}
    by_digest = {published.sha256: name for name, published in MANIFEST.items()}
    digests = {kind: digest(names) for kind, names in given.items()}
    known = {kind: by_digest.get(sha256) for kind, sha256 in digests.items()}
    name = known.get("labeled") or ""
    protocol = {"labeled": name, "unlabeled": name.replace("/labeled.", "/unlabeled.")}
    protocol["val"] = f"{name.partition('/')[0]}/val.txt"
    if name.endswith("/labeled.txt") and val and all(known[kind] == protocol[kind] for kind in given):
        return f"lists: {_title(name).removesuffix(' labeled')} as published ({', '.join(given)})"
    parts = []
    for kind, names in given.items():
        unknown = f"{len(names)} images, sha256 {digests[kind][:12]}..."
        parts.append(f"{kind}: {_title(known[kind])} as published" if known[kind] else f"{kind}: {unknown}")
    return f"lists: not a published protocol ({'; '.join(parts)})"


def _title(name: str) -> str:
    """``pascal/662/labeled.txt`` → "Pascal blended 662 labeled", ``pascal/val.txt`` → "Pascal val"."""
    dataset, *number, kind = name.removesuffix(".txt").split("/")
    rules = {listed: MANIFEST[listed].rule for listed in _lists_of(dataset) if listed.endswith("/labeled.txt")}
    blended = [listed for listed, rule in rules.items() if rule.startswith("every")]
    words = [dataset.capitalize(), *number, kind]
    if number and 0 < len(blended) < len(rules):  # else there is one kind of split
        words.insert(1, "blended" if f"{dataset}/{number[0]}/labeled.txt" in blended else "classic")
    return " ".join(words)


def _by_authors(name: str) -> bool:
    """Whether the authors' repository has this list: it has those of data sets that no rule alone can split."""
    return any(MANIFEST[listed].rule == "published" for listed in _lists_of(name.partition("/")[0]))


def _lists_of(dataset: str) -> list[str]:
    return [name for name in MANIFEST if name.startswith(f"{dataset}/")]


# From a name of the manifest to a list and where it comes from; UserError where it cannot be had in this way.
Way = Callable[[str], tuple[list[str], str]]
_DONE = {"--root": "made", "--from": "copied", "--download": "downloaded"}


def make_published(
    dataset: str,
    out: Path,
    root: Path | None = None,
    source: Path | None = None,
    download: bool = False,
    force: bool = False,
) -> None:
    """Complete OUT/DATASET with the published lists, each checked against its digest first; print a line for each.

    Args:
        root: the data set's folder, for the lists that follow from it.
        source: a folder that has lists: the authors' repository, its ``data/splits``, or anything laid out like it.
        download: get from the authors' repository what nothing else gives.
        force: replace existing lists that differ from the published ones.

    Raises:
        UserError: a folder that does not exist; with status 1, lists that could not be had, or that differ and were
            left alone.
    """
    have: dict[str, list[str]] = {}
    ways: dict[str, Way] = {}
    remarks: list[str] = []
    if root is not None:
        bases, remarks = _bases(dataset, need_folder(root))
        ways["--root"] = partial(_by_rule, bases, have)
    if source is not None:
        ways["--from"] = partial(_copied, need_folder(source))
    if download:
        ways["--download"] = partial(_downloaded, [])
    names, lacking = _lists_of(dataset), 0
    for name in names:
        complete, remark = _complete(name, out / name, ways, have, force)
        lacking += not complete
        print(f"{name:<28} {MANIFEST[name].count:>6}  {remark}")
    if lacking:
        text = f"{lacking} of {len(names)} lists of {dataset} are missing or differ"
        raise UserError("\n".join([text, *remarks]), 1)


def _complete(name: str, path: Path, ways: dict[str, Way], have: dict[str, list[str]], force: bool) -> tuple[bool, str]:
    """Write the published list if its file lacks it: whether the file has it now, and a remark. ``have`` gets it."""
    try:
        there = read_list(path) if path.exists() else None
    except UserError:
        there = []
    if there is not None and digest(there) == MANIFEST[name].sha256:
        have[name] = there
        return True, "present"
    lines, remark = _obtained(name, ways)
    differs = None if there is None else f"differs from the published list: {len(there)} lines; left alone"
    if lines is None:
        return False, f"{differs or 'missing'}: {remark}"
    have[name] = lines  # others may follow from it, even where the file stays as it is
    if differs and not force:
        return False, f"{differs}, --force replaces it"
    write_list(path, lines)
    return True, f"{remark}, in the place of a list that differed" if differs else remark


def _obtained(name: str, ways: dict[str, Way]) -> tuple[list[str] | None, str]:
    """The list and how it was had, or None and why not."""
    reasons = []
    for flag, way in ways.items():
        try:
            lines, origin = way(name)
        except UserError as error:
            reasons.append(str(error))
            continue
        if digest(lines) == MANIFEST[name].sha256:
            return lines, f"{_DONE[flag]}: {origin}"
        reasons.append(f"{origin}: refused, another list than the published one, of {len(lines)} lines")
    possible = [] if MANIFEST[name].rule == "published" else ["--root FOLDER"]
    possible += ["--from FOLDER"] + ["--download"] * _by_authors(name)
    untried = [way for way in possible if way.split()[0] not in ways]
    return None, "; ".join([*reasons, *([f"get it with {' or '.join(untried)}"] if untried else [])])


def _by_rule(bases: dict[str, list[str]], have: dict[str, list[str]], name: str) -> tuple[list[str], str]:
    rule, _, step = MANIFEST[name].rule.partition(" ")
    if rule == "published":
        raise UserError("drawn at random by others, no rule gives it")
    base = bases.get("pool" if rule in ("every", "complement") else rule)
    if not base:
        raise UserError("the data set's folder does not give it, see below")
    if rule == "every":
        return base[:: int(step)], f"1 in {step} of the sorted training set"
    if rule != "complement":
        return base, f"the data set's own {rule} list"
    labeled = have.get(name.replace("/unlabeled.", "/labeled."))
    if labeled is None:
        raise UserError("the rest of the training set, as soon as its labeled list is there")
    return sorted(set(base) - set(labeled)), "the rest of the training set"


def _bases(dataset: str, root: Path) -> tuple[dict[str, list[str]], list[str]]:
    """The lists that a data set's folder gives: "train", "val" and "pool", all training images, sorted; and why it
    lacks one. A list line is a file's path below the root if that is where the data set has its image; else its stem.
    """
    catalog, found, remarks = DATASETS[dataset], {}, []
    for base, pattern in catalog.folder_lists.items():
        if pattern.endswith(".txt"):
            try:
                found[base] = read_list(root / pattern)
            except UserError as error:
                remarks.append(str(error))
            continue
        paths = [path for path in root.glob(pattern) if not path.name.startswith(".")]
        names = {path: path.relative_to(root).as_posix() for path in paths}
        found[base] = sorted(
            name if catalog.files(root, name)[0] == path else path.stem for path, name in names.items()
        )
    every = found.pop("pool")
    pool = sorted(set(every).difference(found.get("val", ())))
    labeled = next(name for name in _lists_of(dataset) if name.endswith("/labeled.txt"))  # of any one protocol
    size = MANIFEST[labeled].count + MANIFEST[labeled.replace("/labeled.", "/unlabeled.")].count
    if len(pool) == size:
        return found | {"pool": pool}, remarks
    both = size + MANIFEST[f"{dataset}/val.txt"].count
    remarks.append(
        f"{root / catalog.folder_lists['pool']}: expected {size:,} training images ({both:,} with those of val), "
        f"found {len(pool):,} ({len(every):,} in all)"
    )
    return found, remarks


def _copied(source: Path, name: str) -> tuple[list[str], str]:
    tails = (name, name.partition("/")[2])
    places = [source / parent / tail for tail in tails for parent in ("", "data/splits", "splits")]
    lists = {str(place): read_list(place) for place in places if place.is_file()}
    if not lists:
        raise UserError(f"not in {source}")
    origin = next((file for file, lines in lists.items() if digest(lines) == MANIFEST[name].sha256), [*lists][-1])
    return lists[origin], origin


def _downloaded(silent: list[str], name: str) -> tuple[list[str], str]:
    """``silent`` keeps the URL that had no answer, after which no other is tried."""
    if not _by_authors(name):
        raise UserError("not in the authors' repository")
    if silent:
        raise UserError(f"no answer, as for {silent[0]}")
    url = AUTHORS + name
    try:
        with urllib.request.urlopen(url, timeout=20) as reply:
            return reply.read(10_000_000).decode().split(), url
    except HTTPError as error:
        raise UserError(f"{url}: {error.code} {error.reason}") from None
    except (OSError, HTTPException) as error:
        silent.append(url)
        raise UserError(f"{url}: {getattr(error, 'reason', error)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{url}: not a text file") from None


def write_list(path: Path, lines: Iterable[str]) -> None:
    """A list file, written whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def need_folder(path: Path) -> Path:
    """The folder itself; ``UserError`` where there is no such folder."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder (looked in {Path.cwd()})")
    return path
