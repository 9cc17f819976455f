"""The emoji dataset: what it holds, that its bytes are fixed, and that damage is mended."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tars import peer_samples

from ablate.errors import DataError
from ablate.training.data.emoji import (
    BACKGROUNDS,
    COLUMNS,
    HELD_OUT_STYLES,
    SPRITE_PX,
    SPRITES,
    TILES_PER_SHEET,
    TRAIN_STYLES,
    EmojiPaths,
    list_classes,
    load_concepts,
    prepare_emoji,
    read_sprites,
)
from ablate.training.data.shards import ShardIndex, index_shards

TIMEOUT_S = 240

CAPTIONS_SHA256 = "164e2acd64bcffe42fa93ffd9ff62f1568ee7b74f31795d098553a8804f5a3f6"
"""Of all captions in order, one a line: results of different versions can be compared as long as
this stays. Change it, together with emoji.FORMAT, only when the dataset is meant to change."""


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> EmojiPaths:
    """A prepared folder that tests only read."""
    return prepare_emoji(tmp_path_factory.mktemp("data") / "emoji")


@pytest.fixture(scope="module")
def index(emoji: EmojiPaths) -> ShardIndex:
    return index_shards(emoji.train_data, cache=None)


@pytest.fixture
def copy(emoji: EmojiPaths, tmp_path: Path) -> Path:
    """A prepared folder that a test may harm."""
    return Path(shutil.copytree(emoji.folder, tmp_path / "emoji"))


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """(modification time, sha256) of every file."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).digest(),
        )
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_it_holds_the_pairs_and_classes_it_states(emoji: EmojiPaths, index: ShardIndex) -> None:
    """Four vendors give 5824 pairs in 8 shards, and 617 classes have two held-out pictures each."""
    assert index.num_samples == emoji.train_num_samples == 5824
    assert len(index.shards) == 8 and index.faults == ()
    folders = [path for path in emoji.val.iterdir() if path.is_dir()]
    assert len(folders) == emoji.num_classes == 617
    assert all(len(list(folder.glob("*.jpg"))) == 2 for folder in folders)
    assert emoji.chance == pytest.approx(0.0016, abs=5e-5)


def test_class_names_fit_the_folders_of_an_image_folder(emoji: EmojiPaths) -> None:
    """classnames.json follows the order in which torchvision numbers the classes."""
    from torchvision.datasets import ImageFolder

    found = ImageFolder(emoji.val)
    names = json.loads((emoji.val / "classnames.json").read_bytes())
    assert len(found) == 1234 and len(set(names)) == len(names) == len(found.classes)
    slugs = {concept.slug: concept.name for concept in load_concepts()}
    assert [slugs[folder.partition("_")[2]] for folder in found.classes] == names


def test_templates_have_a_place_for_the_name(emoji: EmojiPaths) -> None:
    """Each of the six prompts becomes a text with the class's name in it."""
    templates = json.loads((emoji.val / "templates.json").read_bytes())
    assert len(set(templates)) == 6
    assert all("zebra" in template.format("zebra") for template in templates)


def test_open_clip_train_finds_the_same_samples(emoji: EmojiPaths, index: ShardIndex) -> None:
    """The peer reads the shards as they are, in our order, and its sizes.json adds up."""
    peer = peer_samples(emoji.folder / "train" / "00000.tar")
    assert len(peer) == index.shards[0].num_samples
    assert [index.read(i) for i in range(len(peer))] == [pair[1:] for pair in peer]
    sizes = json.loads((emoji.folder / "train" / "sizes.json").read_bytes())
    assert sizes == {Path(shard.path).name: shard.num_samples for shard in index.shards}


def test_pictures_show_what_their_captions_say(index: ShardIndex) -> None:
    """A picture whose caption names a background has its colour in a corner; all are 48 px RGB."""
    named, shown = 0, 0
    for sample in range(index.num_samples):
        image, caption = index.read(sample)
        picture = Image.open(io.BytesIO(image))
        assert picture.size == (SPRITE_PX, SPRITE_PX) and picture.mode == "RGB"
        for name, colour in BACKGROUNDS.items():
            if caption.endswith((f" icon on {name} background", f" isolated on {name}")):
                pixels = np.asarray(picture, np.int16)[[0, 0, -1, -1], [0, -1, 0, -1]]
                named += 1
                shown += bool((np.abs(pixels - colour).max(axis=1) < 12).any())
    assert named > 1000
    assert shown > 0.97 * named  # a few drawings fill all four corners


def test_captions_are_varied_and_fixed(index: ShardIndex) -> None:
    """Nearly all captions differ, none is empty, and they are the same as ever."""
    captions = [index.read(sample)[1] for sample in range(index.num_samples)]
    assert len(set(captions)) > 5000 and all(captions)
    assert hashlib.sha256("\n".join(captions).encode()).hexdigest() == CAPTIONS_SHA256


def test_the_held_out_styles_are_not_trained_on() -> None:
    """Training and zero-shot pictures come from different vendors and share no picture."""
    assert not set(TRAIN_STYLES) & set(HELD_OUT_STYLES)
    digests = {
        style: {hashlib.sha256(sprite.tobytes()).digest() for _, sprite in read_sprites(style)}
        for style in (*TRAIN_STYLES, *HELD_OUT_STYLES)
    }
    for held_out in HELD_OUT_STYLES:
        for style in TRAIN_STYLES:
            assert not digests[held_out] & digests[style]


def test_sheets_hold_a_sprite_for_every_drawn_concept() -> None:
    """Each style has exactly the sheets its concepts fill, and no sprite of a class is blank."""
    for style in (*TRAIN_STYLES, *HELD_OUT_STYLES):
        drawn = sum(style in concept.styles for concept in load_concepts())
        sheets = sorted((SPRITES / style).iterdir())
        assert len(sheets) == -(-drawn // TILES_PER_SHEET)
        with Image.open(sheets[-1]) as last:
            rows = -(-(drawn - (len(sheets) - 1) * TILES_PER_SHEET) // COLUMNS)
            assert last.size == (COLUMNS * SPRITE_PX, rows * SPRITE_PX)
    classes = {concept.slug for concept in list_classes()}
    for style in HELD_OUT_STYLES:
        for concept, sprite in read_sprites(style):
            assert concept.slug in classes
            assert sprite.getchannel("A").getextrema()[1] > 200


def test_licences_and_sources_lie_beside_the_data(emoji: EmojiPaths) -> None:
    """Every style is attributed, and the text of every licence that is named is there."""
    notice = (emoji.folder / "LICENSES.md").read_text(encoding="utf-8")
    for word in (*TRAIN_STYLES, *HELD_OUT_STYLES, "Google", "Twitter", "EmojiOne", "Microsoft"):
        assert word in notice
    texts = {path.name: path.read_text() for path in (emoji.folder / "licenses").iterdir()}
    assert "Apache License" in texts["Apache-2.0.txt"]
    assert "Attribution 4.0 International" in texts["CC-BY-4.0.txt"]
    for name, owner in {
        "MIT-fluentui-emoji.txt": "Microsoft Corporation",
        "MIT-emojilib.txt": "Mu-An Chiou",
        "MIT-unicode-emoji-json.txt": "Mu-An Chiou",
    }.items():
        assert owner in texts[name] and "WITHOUT WARRANTY" in texts[name]


def test_a_second_call_touches_nothing(copy: Path) -> None:
    """A whole folder is used as it is: no file is written, not even a lock beside it."""
    (copy / ".DS_Store").write_bytes(b"not ours")
    before = contents(copy)
    prepare_emoji(copy)
    assert contents(copy) == before
    assert [path.name for path in copy.parent.iterdir()] == ["emoji"]


def test_other_processes_make_the_same_bytes(emoji: EmojiPaths, tmp_path: Path) -> None:
    """Two processes that prepare one folder at once both get it, byte for byte as elsewhere."""
    folder = tmp_path / "new" / "emoji"
    code = (
        "from ablate.training.data.emoji import prepare_emoji as p; "
        f"print(p({str(folder)!r}).folder)"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
        )
        for seed in (1, 2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0 and out.strip() == str(folder), err
    assert (folder / "checksums.json").read_bytes() == (
        emoji.folder / "checksums.json"
    ).read_bytes()
    assert not list(folder.parent.glob(".*.tmp"))


def harm_shard(folder: Path) -> None:
    path = folder / "train" / "00003.tar"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose_picture(folder: Path) -> None:
    next((folder / "val").glob("0100_*/fluent.jpg")).unlink()


def cut_checksums(folder: Path) -> None:
    path = folder / "checksums.json"
    path.write_bytes(path.read_bytes()[:1000])


def come_from_another_version(folder: Path) -> None:
    path = folder / "checksums.json"
    checksums = json.loads(path.read_bytes())
    (folder / "val" / "old.json").write_text("[]")
    checksums["made_from"] = "another version, which had a file more"
    checksums["sha256"]["val/old.json"] = ""
    path.write_text(json.dumps(checksums))


@pytest.mark.parametrize(
    "harm",
    [
        harm_shard,
        *(
            pytest.param(harm, marks=pytest.mark.exhaustive)
            for harm in (lose_picture, cut_checksums, come_from_another_version)
        ),
    ],
)
def test_damage_is_mended(emoji: EmojiPaths, copy: Path, harm) -> None:  # type: ignore[no-untyped-def]
    """A flipped bit, a lost file, a cut list or another version's folder: it is built again."""
    harm(copy)
    (copy.parent / ".emoji.0badcafe.tmp" / "train").mkdir(parents=True)  # of a killed process
    prepare_emoji(copy)
    whole = {name: digest for name, (_, digest) in contents(emoji.folder).items()}
    assert {name: digest for name, (_, digest) in contents(copy).items()} == whole
    assert not list(copy.parent.glob(".*.tmp"))


def test_files_of_others_are_not_deleted(copy: Path, tmp_path: Path) -> None:
    """A folder with anything else in it is refused by name, and left as it is."""
    (copy / "val" / "zebra_crossing").mkdir()
    (copy / "val" / "zebra_crossing" / "mine.jpg").write_bytes(b"my picture")
    before = contents(copy)
    with pytest.raises(DataError, match="'val/zebra_crossing' and 1 more.*another folder"):
        prepare_emoji(copy)
    assert contents(copy) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="is a file; give a folder"):
        prepare_emoji(tmp_path / "notes.txt")
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(tmp_path / "notes.txt", home)
    with pytest.raises(DataError, match="holds 'notes.txt', which is not of the emoji dataset"):
        prepare_emoji(home)
    assert (home / "notes.txt").read_text() == "mine"


def test_shards_carry_nothing_of_this_machine(emoji: EmojiPaths) -> None:
    """No member has a time, an owner or another mode than 0644."""
    with tarfile.open(emoji.folder / "train" / "00000.tar") as tar:
        found = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar.getmembers()}
    assert found == {(0, 0, 0, "", "", 0o644)}
