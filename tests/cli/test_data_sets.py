"""`ablate data cc3m` and `ablate data imagenet`, on small folders of the same shape."""

from __future__ import annotations

import gzip
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tars import pairs, peer_samples, write_tar

from ablate.training.data.shard_names import expand_shards
from tests.cli.conftest import Said

Ablate = Callable[..., Said]

LINKS = [f"caption {k}\thttp://example.org/{k}.jpg" for k in range(30)]


def shard(folder: Path, number: int, *, count: int, arrived: int) -> None:
    """A shard of img2dataset's, with its statistics."""
    folder.mkdir(exist_ok=True)
    write_tar(folder / f"{number:05d}.tar", pairs(arrived, start=10 * number))
    said = {
        "count": count,
        "successes": arrived,
        "failed_to_download": count - arrived,
        "failed_to_resize": 0,
        "status_dict": {"success": arrived, "HTTP Error 404: Not Found": count - arrived},
    }
    (folder / f"{number:05d}_stats.json").write_text(json.dumps(said))


def test_the_list_of_links_becomes_the_line_that_downloads_it(
    ablate: Ablate, tmp_path: Path
) -> None:
    """The list gets the header that img2dataset needs, the line names its columns, and a list that
    is none is refused with its line."""
    (tmp_path / "Train.tsv").write_text("\n".join(LINKS) + "\n")
    said = json.loads(ablate("data", "cc3m", "cc3m", "--links", "Train.tsv", "--json").out)
    assert said["links"] == 30 and said["command"][0] == "img2dataset"
    copy = Path(said["command"][said["command"].index("--url_list") + 1])
    rows = copy.read_text().splitlines()
    assert rows[0] == "caption\turl" and rows[1:] == LINKS
    again = json.loads(ablate("data", "cc3m", "two", "--links", str(copy), "--json").out)
    assert again["links"] == 30
    (tmp_path / "bad.tsv").write_text("\n".join([*LINKS[:3], "no link here"]) + "\n")
    wrong = ablate("data", "cc3m", "cc3m", "--links", "bad.tsv")
    assert wrong.code == 2 and "bad.tsv:4" in wrong.err


def test_a_finished_download_is_counted_with_its_dead_links(ablate: Ablate, tmp_path: Path) -> None:
    """Pairs, share and reasons of what is lost, the pattern and number for a study, exit 0."""
    shard(tmp_path / "cc3m", 0, count=10, arrived=8)
    shard(tmp_path / "cc3m", 1, count=10, arrived=9)
    said = ablate("data", "cc3m", "cc3m", "--json")
    found = json.loads(said.out)
    assert said.code == 0 and found["problems"] == [] and found["faults"] == {}
    assert (found["asked"], found["arrived"], found["train_num_samples"]) == (20, 17, 17)
    assert found["share_lost"] == pytest.approx(0.15)
    assert found["reasons"] == {"HTTP Error 404: Not Found": 3}
    assert found["train_data"] == "cc3m/{00000..00001}.tar" and len(found["fingerprint"]) == 64
    assert "17 pairs of 20 links (15.0% lost)" in ablate("data", "cc3m", "cc3m").out


def test_a_download_that_was_cut_is_not_whole(ablate: Ablate, tmp_path: Path) -> None:
    """A shard without statistics or missing between others, and one that was changed: exit 1."""
    for number in (0, 1, 3):
        shard(tmp_path / "cc3m", number, count=10, arrived=8)
    (tmp_path / "cc3m" / "00001_stats.json").unlink()
    write_tar(tmp_path / "cc3m" / "00003.tar", pairs(5))
    said = ablate("data", "cc3m", "cc3m", "--json")
    unfinished, changed = json.loads(said.out)["problems"]
    assert said.code == 1 and "2 shards are not finished (00001, 00002" in unfinished
    assert "counts 16 pairs and the shards hold 21" in changed
    (tmp_path / "empty").mkdir()
    nothing = ablate("data", "cc3m", "empty")
    assert nothing.code == 2 and "--links" in nothing.err


def test_the_download_is_run_where_asked(
    ablate: Ablate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--fetch runs the program of that name and looks at what it left; without one it says how to
    get it."""
    (tmp_path / "Train.tsv").write_text("\n".join(LINKS) + "\n")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    missing = ablate("data", "cc3m", "cc3m", "--links", "Train.tsv", "--fetch")
    assert missing.code == 2 and "pip install img2dataset" in missing.err
    shard(tmp_path / "made", 0, count=30, arrived=21)
    program = tmp_path / "bin" / "img2dataset"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\n/bin/cp made/* cc3m/ && test "$1" = --url_list\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    said = ablate("data", "cc3m", "cc3m", "--links", "Train.tsv", "--fetch")
    assert said.code == 0 and "21 pairs of 30 links (30.0% lost)" in said.out


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((24, 20), 40).convert("RGB").save(path)
    return path


def test_a_flat_validation_set_is_sorted_by_its_labels(ablate: Ablate, tmp_path: Path) -> None:
    """Images go into folders of their synsets by Kaggle's table or a script of moves; one that the
    labels do not name is refused, and a part of the set is counted against what was asked."""
    names = [f"ILSVRC2012_val_{k:08d}" for k in range(1, 5)]
    for name in names:
        picture(tmp_path / "val" / f"{name}.JPEG")
    rows = [f"{name},n0144{k % 2:04d} 1 2 3 4" for k, name in enumerate(names)]
    (tmp_path / "labels.csv").write_text("ImageId,PredictionString\n" + "\n".join(rows))
    flat = ablate("data", "imagenet", "val")
    assert flat.code == 2 and "--labels" in flat.err
    said = ablate("data", "imagenet", "val", "--labels", "labels.csv", "--classes", "2", "--json")
    found = json.loads(said.out)
    assert said.code == 0 and found["problems"] == []
    assert (found["facts"]["images"], found["facts"]["classes"]) == ("4", "2")
    assert sorted(p.name for p in (tmp_path / "val" / "n01440000").iterdir()) == [
        f"{names[0]}.JPEG", f"{names[2]}.JPEG",
    ]  # fmt: skip
    picture(tmp_path / "val" / "ILSVRC2012_val_00000099.JPEG")
    odd = ablate("data", "imagenet", "val", "--labels", "labels.csv", "--classes", "2")
    assert odd.code == 2 and "does not name ILSVRC2012_val_00000099" in odd.err


def fill(folder: Path, *, each: int) -> None:
    """1000 synsets, with links to one picture."""
    one = picture(folder.parent / "one.JPEG")
    for number in range(1000):
        place = folder / f"n{10_000_000 + number}"
        place.mkdir(parents=True)
        for k in range(each):
            os.link(one, place / f"{k}.JPEG")


def test_what_is_missing_of_the_set_is_said(ablate: Ablate, tmp_path: Path) -> None:
    """Numbers of images and of each class against the published ones, files that are no images,
    folders without a synset's name; exit 1. Whole folders get names for their synsets."""
    fill(tmp_path / "val", each=1)
    (tmp_path / "val" / "n10000007" / "0.JPEG").unlink()
    (tmp_path / "val" / "n10000007" / "0.JPEG").write_bytes(b"no picture" * 40)
    said = ablate("data", "imagenet", "val", "--json")
    problems = " ".join(json.loads(said.out)["problems"])
    assert said.code == 1
    assert "there are 1,000 images, and should be 50,000 (validation) or 1,281,167" in problems
    assert "1000 classes do not have 50 images: n10000000 (1)" in problems
    assert "1 files are no images: 0.JPEG" in problems
    names = json.loads((tmp_path / "val" / "synsets.json").read_text())
    assert names["n10000000"] == {"number": 0, "name": "tench"} and len(names) == 1000
    (tmp_path / "val" / "n10000999").rename(tmp_path / "val" / "zebra")
    assert "1 folders are not called after their synset" in ablate("data", "imagenet", "val").out


@pytest.mark.exhaustive
def test_a_whole_validation_set_is_found_whole(ablate: Ablate, tmp_path: Path) -> None:
    """50,000 images in 1,000 classes: no problem."""
    fill(tmp_path / "val", each=50)
    said = ablate("data", "imagenet", "val")
    assert said.code == 0 and "images: 50,000, the validation set; classes: 1,000" in said.out


def test_a_name_that_is_no_data_set_is_refused(ablate: Ablate) -> None:
    """The verb that is not there is named."""
    said = ablate("data", "imagenette")
    assert said.code == 2 and "imagenette" in said.err


def picture_list(folder: Path, text: str, *, pictures: int = 5, **options: str) -> Path:
    """A list as given beside its pictures, which are one colour each."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(pictures):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(folder / "images" / f"{number}.png")
    path = folder / "train.csv"
    path.write_text(text, **options)
    return path


def packed(pattern: str) -> dict[str, bytes]:
    """Picture of each caption in the shards, as open_clip_train reads them."""
    return {text: image for path in expand_shards(pattern) for _, image, text in peer_samples(path)}


ROWS = [(f"images/{k}.png", f"a colour, number {k}") for k in range(5)]


@pytest.mark.parametrize(
    ("separator", "names", "asked"),
    [
        ("\t", ("filepath", "title"), ()),
        (";", ("title", "filepath"), ()),
        ("\t", ("path", "text"), ("--image", "path", "--caption", "text")),
    ],
)
def test_a_list_of_pictures_becomes_shards(
    ablate: Ablate, tmp_path: Path, separator: str, names: tuple[str, str], asked: tuple[str, ...]
) -> None:
    """Each picture lies beside its caption, byte for byte, in as many shards as it takes; the
    same list gives the same shards, wherever a byte order mark or quotes stand in it."""
    lines = [dict(zip(("filepath", "title"), row, strict=True)) for row in ROWS]
    order = names if names[0] in lines[0] else ("filepath", "title")
    text = "\n".join(separator.join(f'"{line[name]}"' for name in order) for line in lines)
    picture_list(tmp_path / "set", f"{separator.join(names)}\n{text}\n", encoding="utf-8-sig")
    ask = ("data", "pack", "set/train.csv", "shards", "--per-shard", "2", *asked)
    said = ablate(*ask)
    assert said.code == 0 and said.out == (
        "train_data: shards/{00000..00002}.tar\ntrain_num_samples: 5\n"
    )
    held = packed("shards/{00000..00002}.tar")
    assert held == {text: (tmp_path / "set" / name).read_bytes() for name, text in ROWS}
    before = [path.read_bytes() for path in sorted((tmp_path / "shards").iterdir())]
    assert ablate(*ask).code == 0
    assert [path.read_bytes() for path in sorted((tmp_path / "shards").iterdir())] == before
    other = ablate("data", "pack", "set/train.csv", "shards", *asked)
    assert other.code == 2 and "2 shards that would be none of these, the first 00001" in other.err


def test_a_lone_quote_is_a_character_of_a_caption(ablate: Ablate, tmp_path: Path) -> None:
    """In a list with tabs it swallows no row, as it does in pandas; with commas, where it may hold
    a comma, it is refused with its line."""
    rows = [(name, f'"{text}' if name[-5] == "1" else text) for name, text in ROWS]
    tabs = "filepath\ttitle\n" + "".join(f"{name}\t{text}\n" for name, text in rows)
    picture_list(tmp_path, tabs)
    assert ablate("data", "pack", "train.csv", "shards").code == 0
    assert set(packed("shards/00000.tar")) == {text for _, text in rows}
    picture_list(tmp_path, tabs.replace(",", " ").replace("\t", ","))
    said = ablate("data", "pack", "train.csv", "commas")
    assert said.code == 2 and "a quote before it is not closed" in said.err
    assert not (tmp_path / "commas").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no column 'filepath'"),
        ("filepath\ttitle\n", "no pairs below its line of names"),
        ("images/0.png\ta dog\n", "--image"),
        ("filepath\tcaption\nimages/0.png\ta dog\n", "names no column 'title'"),
        ("filepath\ttitle\nimages/0.png\n", "train.csv:2: 1 columns where the first line names 2"),
        ("filepath\ttitle\nimages/9.png\ta\nimages/0.png\tb\n", "1 of 2 pictures are not there"),
        ("filepath\ttitle\nimages/0.gif\ta\n", "pictures that end in '.gif'"),
        ("filepath\ttitle\nhttps://x.org/0\ta\n", "0 is a link. img2dataset"),
    ],
)
def test_a_list_that_cannot_be_packed_says_why(
    ablate: Ablate, tmp_path: Path, text: str, said: str
) -> None:
    """One sentence, exit 2, and nothing written."""
    picture_list(tmp_path, text)
    found = ablate("data", "pack", "train.csv", "shards")
    assert found.code == 2 and said in found.err and not (tmp_path / "shards").exists()
    (tmp_path / "train.csv").write_bytes(b"filepath\ttitle\nimages/0.png\tcaf\xe9\n")
    found = ablate("data", "pack", "train.csv", "shards")
    assert found.code == 2 and "not UTF-8 (byte 0xe9)" in found.err


def test_a_list_is_opened_as_every_text_that_a_person_gives(ablate: Ablate, tmp_path: Path) -> None:
    """UTF-16 as Excel saves it is read; what is packed, and what is not there, is named."""
    text = "filepath\ttitle\n" + "".join(f"{name}\t{title}\n" for name, title in ROWS)
    path = picture_list(tmp_path, text, encoding="utf-16")
    assert ablate("data", "pack", "train.csv", "shards").code == 0
    assert set(packed("shards/00000.tar")) == {title for _, title in ROWS}
    path.write_bytes(gzip.compress(text.encode()))
    assert "packed (gzip)" in ablate("data", "pack", "train.csv", "other").err
    missing = ablate("data", "pack", "gone.csv", "other")
    assert missing.code == 2 and "gone.csv" in missing.err and "No such file" in missing.err
