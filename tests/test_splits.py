"""Split lists: recognised, made, copied, downloaded, refused; and new ones drawn. No published list is needed here."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import run
from PIL import Image

from imas.data import splits
from imas.data.draw import draw_splits, own_images, own_masks
from imas.data.lists import read_list
from imas.data.splits import Published, describe_lists, digest, make_published
from imas.errors import UserError

POOL = [f"2007_{number:06d}" for number in range(32)]
VAL = [f"2008_{number:06d}" for number in range(5)]
VOC_TRAIN = POOL[5:15]
RANDOM = [POOL[number] for number in (17, 3, 29)]  # in an order of its own
CITY = [f"leftImg8bit/train/{city}/{city}_{number}_leftImg8bit.png" for city in ("bonn", "ulm") for number in range(3)]
CAMVID = {
    part: [f"{part}/0001TP_{30 * number + start:06d}.png" for number in range(count)]
    for part, count, start in (("train", 10, 6690), ("val", 3, 8), ("test", 4, 17))
}
CITY_VAL = [f"leftImg8bit/val/jena/jena_{number}_leftImg8bit.png" for number in range(2)]


def _rest(names: list[str], pool: list[str] = POOL) -> list[str]:
    return [name for name in pool if name not in names]


# What a manifest says of these: blended 2, classic 3 and 10; Cityscapes 1; CamVid 3.
LISTS = {
    "pascal/2/labeled.txt": (POOL[::16], "every 16"),
    "pascal/2/unlabeled.txt": (_rest(POOL[::16]), "complement"),
    "pascal/3/labeled.txt": (RANDOM, "published"),
    "pascal/3/unlabeled.txt": (_rest(RANDOM), "complement"),
    "pascal/10/labeled.txt": (VOC_TRAIN, "train"),
    "pascal/10/unlabeled.txt": (_rest(VOC_TRAIN), "complement"),
    "pascal/val.txt": (VAL, "val"),
    "cityscapes/1/labeled.txt": (CITY[1:2], "published"),
    "cityscapes/1/unlabeled.txt": (_rest(CITY[1:2], CITY), "complement"),
    "cityscapes/val.txt": (CITY_VAL, "val"),
    "camvid/3/labeled.txt": (CAMVID["train"][::4], "every 4"),
    "camvid/3/unlabeled.txt": ([name for number, name in enumerate(CAMVID["train"]) if number % 4], "complement"),
    "camvid/train.txt": (CAMVID["train"], "train"),
    "camvid/val.txt": (CAMVID["val"], "val"),
    "camvid/test.txt": (CAMVID["test"], "test"),
}
PASCAL = [name for name in LISTS if name.startswith("pascal")]


@pytest.fixture
def _manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {name: Published(len(names), digest(names), rule) for name, (names, rule) in LISTS.items()}
    monkeypatch.setattr(splits, "MANIFEST", entries)


def _save(path: Path, names: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))
    return path


def _touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """VOC's folder, as far as lists follow from it."""
    root = tmp_path / "VOC2012"
    _touch(*(root / "SegmentationClassAug" / f"{name}.png" for name in POOL + VAL))
    _touch(root / "SegmentationClassAug" / f"._{POOL[0]}.png")  # what macOS leaves in archives
    _save(root / "ImageSets/Segmentation/train.txt", VOC_TRAIN)
    _save(root / "ImageSets/Segmentation/val.txt", VAL)
    return root


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The authors' repository, as far as it has lists."""
    for name, (names, _) in LISTS.items():
        _save(tmp_path / "clone/data/splits" / name, names)
    return tmp_path / "clone"


def _assert_complete(out: Path, names: list[str]) -> None:
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == set(names)
    for name in names:
        assert sorted(read_list(out / name)) == sorted(LISTS[name][0]), name


def test_the_shipped_manifest_is_consistent() -> None:
    manifest = splits.MANIFEST
    assert len(manifest) == 35 and len({entry.sha256 for entry in manifest.values()}) == 35
    totals = {"pascal": 10582, "cityscapes": 2975, "camvid": 367}
    for name, entry in manifest.items():
        dataset, *number, kind = name.split("/")
        if kind == "labeled.txt":
            assert entry.count == int(number[0])
            assert entry.count + manifest[f"{dataset}/{number[0]}/unlabeled.txt"].count == totals[dataset]
            rule, _, step = entry.rule.partition(" ")
            if rule == "every":
                assert len(range(totals[dataset])[0 :: int(step)]) == entry.count
        else:
            rules = {"val.txt": "val", "test.txt": "test", "train.txt": "train", "unlabeled.txt": "complement"}
            assert entry.rule == rules[kind]
    every = {name.split("/")[1]: entry.rule for name, entry in manifest.items() if entry.rule.startswith("every")}
    assert every == {
        "662": "every 16", "1323": "every 8", "2646": "every 4", "5291": "every 2",
        "46": "every 8", "92": "every 4",
    }  # fmt: skip


def _protocol(labeled: list[str], unlabeled: list[str], val: list[str]) -> str | None:
    """The protocol that a run's log names."""
    named = re.fullmatch(r"lists: (.*) as published \([a-z, ]*\)", describe_lists(labeled, unlabeled, val))
    return named and named[1]


@pytest.mark.usefixtures("_manifest")
def test_a_run_says_which_lists_it_uses() -> None:
    labeled, unlabeled = LISTS["pascal/2/labeled.txt"][0], LISTS["pascal/2/unlabeled.txt"][0]
    assert _protocol(labeled[::-1], unlabeled[::-1], VAL[::-1]) == "Pascal blended 2"
    assert _protocol(RANDOM, [], VAL) == "Pascal classic 3"
    assert _protocol(CITY[1:2], [*CITY[:1], *CITY[2:]], CITY_VAL) == "Cityscapes 1"
    assert _protocol(labeled, _rest(RANDOM), VAL) is None
    assert _protocol(labeled, unlabeled, VAL[1:]) is None
    assert _protocol(unlabeled, labeled, VAL) is None
    assert _protocol(unlabeled, [], VAL) is None
    assert _protocol([*labeled, labeled[0]], unlabeled, VAL) is None
    assert _protocol(labeled, unlabeled, []) is None

    assert describe_lists(labeled, unlabeled, VAL) == "lists: Pascal blended 2 as published (labeled, unlabeled, val)"
    assert describe_lists(RANDOM, [], VAL) == "lists: Pascal classic 3 as published (labeled, val)"
    assert describe_lists(POOL[:7], unlabeled, VAL) == (
        f"lists: not a published protocol (labeled: 7 images, sha256 {digest(POOL[:7])[:12]}...; "
        "unlabeled: Pascal blended 2 unlabeled as published; val: Pascal val as published)"
    )


@pytest.mark.usefixtures("_manifest")
def test_what_follows_from_the_data_set_is_made_and_the_rest_explained(
    tmp_path: Path, voc: Path, clone: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="^2 of 7 lists of pascal are missing or differ$") as raised:
        make_published("pascal", out, root=voc)
    assert raised.value.status == 1
    _assert_complete(out, [name for name in PASCAL if "/3/" not in name])
    said = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert list(said) == PASCAL
    assert said["pascal/2/labeled.txt"].endswith(" 2  made: 1 in 16 of the sorted training set")
    assert "no rule gives it; get it with --from FOLDER or --download" in said["pascal/3/labeled.txt"]
    assert "as soon as its labeled list is there" in said["pascal/3/unlabeled.txt"]

    (clone / "data/splits/pascal/3/unlabeled.txt").unlink()
    make_published("pascal", out, root=voc, source=clone)
    _assert_complete(out, PASCAL)
    said = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert said["pascal/2/labeled.txt"].endswith("present")
    assert said["pascal/3/labeled.txt"].endswith(f"copied: {clone / 'data/splits/pascal/3/labeled.txt'}")
    assert said["pascal/3/unlabeled.txt"].endswith("made: the rest of the training set")
    assert read_list(out / "pascal/3/labeled.txt") == RANDOM


@pytest.mark.usefixtures("_manifest")
@pytest.mark.parametrize("place", ["", "data", "data/splits", "data/splits/pascal"])
def test_a_clone_alone_is_enough(tmp_path: Path, clone: Path, place: str) -> None:
    make_published("pascal", tmp_path / "out", source=clone / place)
    _assert_complete(tmp_path / "out", PASCAL)


@pytest.mark.usefixtures("_manifest")
def test_cityscapes(tmp_path: Path, clone: Path) -> None:
    root, out = tmp_path / "cityscapes", tmp_path / "out"
    _touch(*(root / name for name in CITY[1:] + CITY_VAL))
    with pytest.raises(UserError, match=r"train/.*: expected 6 training images .*, found 5"):
        make_published("cityscapes", out, root=root)
    _assert_complete(out, ["cityscapes/val.txt"])
    _touch(root / CITY[0])
    for name in ("unlabeled.txt", "../val.txt"):
        (clone / "data/splits/cityscapes/1" / name).unlink()
    make_published("cityscapes", out, root=root, source=clone)
    _assert_complete(out, [name for name in LISTS if name.startswith("cityscapes")])


@pytest.mark.usefixtures("_manifest")
def test_camvid(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """All of its lists follow from its folder, whatever else the folder has."""
    root, out = tmp_path / "CamVid", tmp_path / "out"
    _touch(*(root / name for part in ("train", "val") for name in CAMVID[part]))
    _touch(*(root / name.replace("/", "annot/") for part in CAMVID.values() for name in part))
    _save(root / "train.txt", [f"/SegNet/CamVid/{name}" for name in CAMVID["train"]])
    with pytest.raises(UserError, match="1 of 5"):
        make_published("camvid", out, root=root, download=True)
    assert "not in the authors' repository; get it with --from FOLDER\n" in capsys.readouterr().out
    _touch(*(root / name for name in CAMVID["test"]))
    make_published("camvid", out, root=root)
    _assert_complete(out, [name for name in LISTS if name.startswith("camvid")])
    assert read_list(out / "camvid/3/labeled.txt") == [CAMVID["train"][number] for number in (0, 4, 8)]
    assert _protocol(*(LISTS[f"camvid/{name}.txt"][0] for name in ("3/labeled", "3/unlabeled", "val"))) == "Camvid 3"


@pytest.mark.usefixtures("_manifest")
def test_a_tampered_list_is_refused(tmp_path: Path, voc: Path, clone: Path, capsys: pytest.CaptureFixture) -> None:
    _save(clone / "data/splits/pascal/3/labeled.txt", [*RANDOM[:2], POOL[0]])
    with pytest.raises(UserError, match="1 of 7"):
        make_published("pascal", tmp_path / "out", source=clone)
    assert "labeled.txt: refused, another list than the published one, of 3 lines" in capsys.readouterr().out
    _assert_complete(tmp_path / "out", [name for name in PASCAL if name != "pascal/3/labeled.txt"])

    # Archives with SBD's lists sometimes have train_aug under the name of train.
    _save(voc / "ImageSets/Segmentation/train.txt", POOL)
    with pytest.raises(UserError, match="lists of pascal are missing or differ"):
        make_published("pascal", tmp_path / "other", root=voc)
    assert not (tmp_path / "other/pascal/10").exists()
    assert "own train list: refused, another list than the published one, of 32 lines" in capsys.readouterr().out


@pytest.mark.usefixtures("_manifest")
def test_the_wrong_mask_folder_is_explained(tmp_path: Path, voc: Path, capsys: pytest.CaptureFixture) -> None:
    for name in POOL[10:]:
        (voc / "SegmentationClassAug" / f"{name}.png").unlink()
    expected = r"SegmentationClassAug/.*expected 32 .*37 with those of val.*found 10 \(15 in all\)"
    with pytest.raises(UserError, match=expected):
        make_published("pascal", tmp_path / "out", root=voc)
    _assert_complete(tmp_path / "out", ["pascal/10/labeled.txt", "pascal/val.txt"])
    assert "does not give it, see below" in capsys.readouterr().out
    (voc / "ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(UserError, match=r"val\.txt: cannot read the list"):
        make_published("pascal", tmp_path / "out", root=voc)
    with pytest.raises(UserError, match="no such folder"):
        make_published("pascal", tmp_path / "out", root=voc / "nowhere")


@pytest.mark.usefixtures("_manifest")
def test_existing_lists_that_differ_are_left_alone(tmp_path: Path, clone: Path, capsys: pytest.CaptureFixture) -> None:
    mine = _save(tmp_path / "out/pascal/2/labeled.txt", POOL[:4])
    empty = _save(tmp_path / "out/pascal/val.txt", [])
    with pytest.raises(UserError, match="2 of 7"):
        make_published("pascal", tmp_path / "out", source=clone)
    assert read_list(mine) == POOL[:4] and not empty.read_text()
    assert "differs from the published list: 4 lines; left alone, --force replaces it" in capsys.readouterr().out
    make_published("pascal", tmp_path / "out", source=clone, force=True)
    assert "in the place of a list that differed" in capsys.readouterr().out
    _assert_complete(tmp_path / "out", PASCAL)

    _save(mine, POOL[:4])
    with pytest.raises(UserError, match="1 of 7"):
        make_published("pascal", tmp_path / "out", force=True)
    assert read_list(mine) == POOL[:4]
    assert "differs from the published list: 4 lines; left alone: get it with --root" in capsys.readouterr().out


@pytest.fixture
def served(clone: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The clone's lists, over HTTP."""

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    folder = clone / "data/splits"
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(splits, "AUTHORS", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("no_proxy", "*")
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.usefixtures("_manifest")
def test_download(tmp_path: Path, voc: Path, served: Path, capsys: pytest.CaptureFixture) -> None:
    make_published("pascal", tmp_path / "all", download=True)
    _assert_complete(tmp_path / "all", PASCAL)
    make_published("pascal", tmp_path / "some", root=voc, download=True)
    _assert_complete(tmp_path / "some", PASCAL)
    assert capsys.readouterr().out.count("downloaded") == len(PASCAL) + 1

    _save(served / "pascal/3/labeled.txt", POOL[:3])
    (served / "pascal/val.txt").unlink()
    (served / "pascal/2/labeled.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="3 of 7"):
        make_published("pascal", tmp_path / "bad", download=True)
    said = capsys.readouterr().out
    assert "labeled.txt: refused" in said and "val.txt: 404 " in said and "not a text file" in said
    assert not (tmp_path / "bad/pascal/3/labeled.txt").exists()


@pytest.mark.usefixtures("_manifest")
def test_without_a_network_one_attempt_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(splits, "AUTHORS", "http://127.0.0.1:1/")
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(UserError, match="7 of 7"):
        make_published("pascal", tmp_path / "out", download=True)
    assert capsys.readouterr().out.count("refused") == 1
    assert not (tmp_path / "out").exists()


def _own(root: Path, count: int = 20, without_mask: int = 5) -> tuple[Path, Path]:
    """Images a/00.jpg ... of which the first have no mask; class 1 in two masks, 2 in one, 0 everywhere, 255 too."""
    images, masks = root / "images", root / "masks"
    for number in range(count):
        name = f"{'ab'[number % 2]}/{number:02d}"
        _touch(images / f"{name}.jpg")
        if number >= without_mask:
            mask = np.zeros((4, 4), np.uint8)
            mask[0] = 255
            mask[1, 0] = {17: 1, 18: 1, 19: 2}.get(number, 0)
            (masks / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(masks / f"{name}_mask{('.png', '.tif', '.bmp')[number % 3]}")
    return images, masks


def _drawn_lists(out: Path) -> dict[str, list[str]]:
    return {path.stem: read_list(path) for path in sorted(out.iterdir())}


def test_new_splits_of_own_data(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, mask_folder = _own(tmp_path)
    masks = own_masks(folder, mask_folder, "_mask")
    names = own_images(folder, masks)
    assert len(names) == 20 and "a/00.jpg" in names
    draw_splits(tmp_path / "first", names, "1/4", "0.2", masks=masks, seed=3)
    said = capsys.readouterr().out
    lists = _drawn_lists(tmp_path / "first")
    assert {kind: len(part) for kind, part in lists.items()} == {"labeled": 5, "unlabeled": 11, "val": 4}
    assert sorted(sum(lists.values(), [])) == names
    with_mask = {name for name in names if int(name[2:4]) >= 5}
    assert with_mask.issuperset(lists["labeled"] + lists["val"])
    assert "20 images, 15 with a mask; seed 3" in said
    for part in lists.values():
        assert f"{len(part)} images, sha256 {digest(part)}" in said

    draw_splits(tmp_path / "again", names[::-1], "5", "4", masks=masks, seed=3)
    assert _drawn_lists(tmp_path / "again") == lists
    draw_splits(tmp_path / "other", names, "5", "4", masks=masks, seed=4)
    assert _drawn_lists(tmp_path / "other") != lists
    draw_splits(tmp_path / "all", names, "15", masks=masks)
    assert {kind: len(part) for kind, part in _drawn_lists(tmp_path / "all").items()} == {"labeled": 15, "unlabeled": 5}


def test_samples_of_a_seed_share_val_and_grow(tmp_path: Path) -> None:
    for count in ("3", "9"):
        draw_splits(tmp_path / count, POOL, count, "5", seed=1)
    small, large = (_drawn_lists(tmp_path / count) for count in ("3", "9"))
    assert len(small["labeled"]) == 3 and len(large["labeled"]) == 9 and len(small["val"]) == 5
    assert small["val"] == large["val"] and set(small["labeled"]) < set(large["labeled"])
    assert not set(large["labeled"]) & set(large["val"])


def test_mistakes_in_drawing_are_explained(tmp_path: Path) -> None:
    folder, mask_folder = _own(tmp_path)
    masks = own_masks(folder, mask_folder, "_mask")
    names, out = own_images(folder, masks), tmp_path / "out"

    def refused(expected: str, *words: str | None, **options: object) -> None:
        with pytest.raises(UserError, match=expected):
            draw_splits(out, names, *words, **options)

    refused("--labeled 21: .*at most all of the 20 images", "21")
    refused("--val 0: expected at least 1", "1", "0")
    for word in ("1/0", "many", "1.5.0"):
        refused("expected a count or a fraction", word)
    refused("12 labeled and 4 val images are more than the 15 images that have a mask, of 20", "12", "4", masks=masks)
    refused("--seed -1", "1", seed=-1)
    refused("none of the 20 images has a mask; that of a/00.jpg would be", "1", masks=own_masks(folder, mask_folder))
    assert not out.exists()
    with pytest.raises(UserError, match="no such folder"):
        own_masks(folder, tmp_path / "nowhere")
    with pytest.raises(UserError, match="no such folder"):
        own_images(tmp_path / "nowhere", None)
    out.mkdir()
    with pytest.raises(UserError, match="no image in it"):
        own_images(out, None)

    draw_splits(out, names, "4", "4")
    before = _drawn_lists(out)
    refused("has labeled, unlabeled, val lists already; --force", "4", "4", seed=1)
    refused("has val lists from before .* remove them", "4", seed=1, force=True)
    assert _drawn_lists(out) == before
    draw_splits(out, names, "4", "4", seed=1, force=True)
    assert _drawn_lists(out) != before


def test_masks_beside_their_images_are_no_images(tmp_path: Path) -> None:
    for name in ("1.jpg", "2.jpg"):
        _touch(tmp_path / name, (tmp_path / name).with_suffix(".png"))
    assert own_images(tmp_path, own_masks(tmp_path, tmp_path)) == ["1.jpg", "2.jpg"]


def test_the_commands(tmp_path: Path) -> None:
    folder, masks = _own(tmp_path)
    out = tmp_path / "drawn"
    words = ("-m", "imas.data", "splits", "--new", "--out", out, "--labeled", "3", "--val", "1/10")
    ended = run(*words, "--images", folder, "--masks", masks, "--mask-suffix", "_mask")
    assert ended.returncode == 0, ended.stderr
    assert {kind: len(part) for kind, part in _drawn_lists(out).items()} == {"labeled": 3, "unlabeled": 15, "val": 2}

    pool = _save(tmp_path / "train.txt", POOL)
    ended = run(*words, "--list", pool, "--dataset", "pascal")
    assert ended.returncode == 2 and ended.stderr == "error: --dataset: only without --new\n"

    _save(tmp_path / "lists/pascal/val.txt", VAL)
    words = ("-m", "imas.data", "splits", "--dataset", "pascal", "--out", tmp_path / "published")
    ended = run(*words, "--from", tmp_path / "lists")
    assert ended.returncode == 1 and "error: 19 of 19 lists of pascal" in ended.stderr
    assert "val.txt: refused, another list than the published one, of 5 lines" in ended.stdout
    assert not (tmp_path / "published").exists()


def test_a_list_is_drawn_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from imas.data.__main__ import main

    def call(*words: str | Path) -> None:
        monkeypatch.setattr("sys.argv", ["imas.data", "splits", *map(str, words)])
        main()

    pool, out = _save(tmp_path / "train.txt", POOL), tmp_path / "out"
    call("--new", "--list", pool, "--out", out, "--labeled", "4", "--seed", "7")
    lists = _drawn_lists(out)
    assert len(lists["labeled"]) == 4 and sorted(lists["labeled"] + lists["unlabeled"]) == POOL
    assert "32 images; seed 7" in capsys.readouterr().out

    for expected, *words in [
        ("--labeled, --seed: only with --new", "--labeled", "4", "--seed", "0"),
        ("--dataset: missing", "--root", tmp_path),
        ("give one of them", "--new", "--list", pool, "--images", tmp_path, "--out", out, "--labeled", "1"),
        ("--new needs --out", "--new", "--list", pool),
        ("--mask-suffix: needs --masks", "--new", "--list", pool, "--out", out, "--labeled", "1", "--mask-suffix", "m"),
    ]:
        with pytest.raises(UserError, match=expected):
            call(*words)
