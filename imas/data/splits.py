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
from .catalog import DATASETS
from .lists import read_list

AUTHORS = "https://raw.githubusercontent.com/ZhenZHAO/iMAS/main/data/splits/"
_TIMEOUT = 20  # seconds without an answer
_LARGEST = 10_000_000  # bytes of a list


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


def protocol_of(labeled: list[str], unlabeled: list[str], val: list[str]) -> str | None:
    """The published name of the lists of a run, such as "Pascal blended 662", whatever the order of their lines.

    Args:
        unlabeled: empty for a run that has none.

    Returns:
        None where any of the lists is another than that protocol's.
    """
    name = _name_of(labeled)
    if name is None or not name.endswith("/labeled.txt"):
        return None
    if _name_of(val) != f"{name.partition('/')[0]}/val.txt":
        return None
    if unlabeled and _name_of(unlabeled) != name.replace("/labeled.", "/unlabeled."):
        return None
    return _title(name).removesuffix(" labeled")


def describe_lists(labeled: list[str], unlabeled: list[str], val: list[str]) -> str:
    """One line for a log: the protocol that these lists are, or what is known of each that is not empty."""
    given = {kind: names for kind, names in (("labeled", labeled), ("unlabeled", unlabeled), ("val", val)) if names}
    protocol = protocol_of(labeled, unlabeled, val)
    if protocol is not None:
        return f"lists: {protocol} as published ({', '.join(given)})"
    parts = []
    for kind, names in given.items():
        name = _name_of(names)
        known = name and f"{_title(name)} as published"
        parts.append(f"{kind}: {known or f'{len(names)} images, sha256 {digest(names)[:12]}...'}")
    return f"lists: not a published protocol ({'; '.join(parts)})"


def _name_of(names: list[str]) -> str | None:
    sha256 = digest(names)
    return next((name for name, published in MANIFEST.items() if published.sha256 == sha256), None)


def _title(name: str) -> str:
    """``pascal/662/labeled.txt`` → "Pascal blended 662 labeled", ``pascal/val.txt`` → "Pascal val"."""
    dataset, *number, kind = name.removesuffix(".txt").split("/")
    words = [dataset.capitalize(), *number, kind]
    blended = [listed for listed, entry in MANIFEST.items() if entry.rule.startswith("every")]
    if number and any(listed.startswith(f"{dataset}/") for listed in blended):  # else there is one kind of split
        words.insert(1, "blended" if f"{dataset}/{number[0]}/labeled.txt" in blended else "classic")
    return " ".join(words)


class IncompleteError(UserError):
    """Some of the published lists could not be had."""

    status = 1


class _UnreachableError(UserError):
    """No answer from the authors' repository: the next list would have none either."""


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
        dataset: a data set of the manifest.
        root: the data set's folder, for the lists that follow from it.
        source: a folder that has lists: the authors' repository, its ``data/splits``, or anything laid out like it.
        download: get from the authors' repository what nothing else gives.
        force: replace existing lists that differ from the published ones.

    Raises:
        UserError: a folder that does not exist.
        IncompleteError: lists that could not be had, or that differ and were left alone.
    """
    for place in (root, source):
        if place is not None:
            need_folder(place)
    have: dict[str, list[str]] = {}
    ways: dict[str, Way] = {}
    remarks: list[str] = []
    if root is not None:
        bases, remarks = _bases(dataset, root)
        ways["--root"] = partial(_by_rule, bases, have)
    if source is not None:
        ways["--from"] = partial(_copied, source)
    if download:
        ways["--download"] = _downloaded
    names = [name for name in MANIFEST if name.startswith(f"{dataset}/")]
    lacking = 0
    for name in names:
        complete, remark = _complete(name, out / name, ways, have, force)
        lacking += not complete
        print(f"{name:<28} {MANIFEST[name].count:>6}  {remark}")
    if lacking:
        raise IncompleteError(
            "\n".join([f"{lacking} of {len(names)} lists of {dataset} are missing or differ", *remarks])
        )


def _complete(name: str, path: Path, ways: dict[str, Way], have: dict[str, list[str]], force: bool) -> tuple[bool, str]:
    """See that the published list stands in its file: whether it does, and a remark. ``have`` gets its lines."""
    there: list[str] | None = None
    if path.exists():
        try:
            there = read_list(path)
        except UserError:
            there = []
        if _is_published(name, there):
            have[name] = there
            return True, "present"
    lines, remark = _obtained(name, ways)
    if lines is not None:
        have[name] = lines  # others may follow from it, even where the file stays as it is
    if there is not None and not (force and lines is not None):
        kept = f"left alone: {remark}" if force else "left alone, --force replaces it"
        return False, f"differs from the published list: {len(there)} lines; {kept}"
    if lines is None:
        return False, f"missing: {remark}"
    write_list(path, lines)
    return True, remark if there is None else f"{remark}, in the place of a list that differed"


def _obtained(name: str, ways: dict[str, Way]) -> tuple[list[str] | None, str]:
    """The list and how it was had, or None and why not."""
    reasons = []
    for flag, way in list(ways.items()):
        try:
            lines, origin = way(name)
        except UserError as error:
            reasons.append(str(error))
            if isinstance(error, _UnreachableError):
                del ways[flag]
            continue
        if _is_published(name, lines):
            return lines, f"{_DONE[flag]}: {origin}"
        reasons.append(f"{origin}: refused, another list than the published one, of {len(lines)} lines")
    by_rule = [] if MANIFEST[name].rule == "published" else ["--root FOLDER"]
    offers = [*by_rule, "--from FOLDER", "--download"]
    untried = [offer for offer in offers if offer.split()[0] not in ways]
    return None, "; ".join([*reasons, *([f"get it with {' or '.join(untried)}"] if untried else [])])


def _is_published(name: str, lines: list[str]) -> bool:
    return digest(lines) == MANIFEST[name].sha256


def _by_rule(bases: dict[str, list[str]], have: dict[str, list[str]], name: str) -> tuple[list[str], str]:
    rule, _, step = MANIFEST[name].rule.partition(" ")
    if rule == "published":
        raise UserError("drawn at random by others, no rule gives it")
    base = "pool" if rule in ("every", "complement") else rule
    if base not in bases:
        raise UserError("the data set's folder does not give it, see below")
    if rule == "every":
        return sorted(bases[base])[:: int(step)], f"1 in {step} of the sorted training set"
    if rule == "complement":
        labeled = have.get(name.replace("/unlabeled.", "/labeled."))
        if labeled is None:
            raise UserError("the rest of the training set, as soon as its labeled list is there")
        return sorted(set(bases[base]) - set(labeled)), "the rest of the training set"
    return bases[base], f"the data set's own {rule} list"


def _bases(dataset: str, root: Path) -> tuple[dict[str, list[str]], list[str]]:
    """The lists that a data set's folder gives: "train", "val" and "pool", all training images; and why it lacks one.

    A list line is a file's path below the root if that is where the data set has its image; else the file's stem.
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
        lines = [name if catalog.files(root, name)[0] == path else path.stem for path, name in names.items()]
        found |= {base: sorted(lines)} if lines else {}
    every, size = found.pop("pool", []), _pool_size(dataset)
    pool = sorted(set(every).difference(found.get("val", ())))
    if len(pool) == size:
        found["pool"] = pool
    else:
        both, place = size + MANIFEST[f"{dataset}/val.txt"].count, root / catalog.folder_lists["pool"]
        remarks.append(
            f"{place}: expected {size:,} training images ({both:,} with those of val), found {len(pool):,} "
            f"({len(every):,} in all)"
        )
    return found, remarks


def _pool_size(dataset: str) -> int:
    """Images of the training set: those of any one protocol."""
    labeled = next(name for name in MANIFEST if name.startswith(dataset) and name.endswith("/labeled.txt"))
    return MANIFEST[labeled].count + MANIFEST[labeled.replace("/labeled.", "/unlabeled.")].count


def _copied(source: Path, name: str) -> tuple[list[str], str]:
    tails = (name, name.partition("/")[2])
    places = [source / parent / tail for tail in tails for parent in ("", "data/splits", "splits")]
    files = [place for place in places if place.is_file()]
    if not files:
        raise UserError(f"not in {source}")
    for file in files:
        lines = read_list(file)
        if _is_published(name, lines):
            break
    return lines, str(file)


def _downloaded(name: str) -> tuple[list[str], str]:
    url = AUTHORS + name
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as reply:
            return reply.read(_LARGEST).decode().split(), url
    except HTTPError as error:
        raise UserError(f"{url}: {error.code} {error.reason}") from None
    except (OSError, HTTPException) as error:
        raise _UnreachableError(f"{url}: {getattr(error, 'reason', error)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{url}: not a text file") from None


def write_list(path: Path, lines: Iterable[str]) -> None:
    """A list file, written whole or not at all."""
    temporary = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def need_folder(path: Path) -> None:
    """Raise ``UserError`` where there is no such folder."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder (looked in {Path.cwd()})")
