"""The small real dataset: emoji drawn by several vendors, a miniature of pairs from the web.

Four vendors' drawings with generated, noisy captions are the training pairs (5824); two styles of
a fifth vendor, never seen in training, are the zero-shot split: 617 classes of things with two
pictures each, so chance is 1/617 = 0.16 %. The sprites ship inside the package (about 3 MB, see
``emoji_sprites/LICENSES.md``), so preparing needs no network and takes a few seconds::

    FOLDER/train/{00000..00007}.tar   WebDataset shards, 48 px JPEG + caption, as CC3M is stored
    FOLDER/train/sizes.json           samples per shard, which open_clip_train looks for
    FOLDER/val/NNNN_slug/STYLE.jpg    image folder; the number keeps the order of the classes
    FOLDER/val/classnames.json        names of the classes, in that order
    FOLDER/val/templates.json         prompts, with {} for the name
    FOLDER/LICENSES.md, licenses/     sources, authors, licences, what was changed
    FOLDER/checksums.json             sha256 of every other file

``classnames.json`` and ``templates.json`` are a convention of this project: an image folder that
carries them is scored with its own classes and prompts, any other with those that the recipe has
for such.

No random generator is involved: every choice (background, caption, place in the shards) is a hash
of what it is made for, so the same package writes the same bytes everywhere.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ablate.training.data.prepared import Prepared, digest_file, write_listing
from ablate.training.data.shard_write import Sample, write_shard

SPRITES = Path(__file__).with_name("emoji_sprites")
"""Folder of the shipped sheets, concepts.json and licences."""

TRAIN_STYLES = ("noto", "noto-v1", "twemoji", "emojione")
HELD_OUT_STYLES = ("fluent-flat", "fluent")

SPRITE_PX = 48
COLUMNS = 8
TILES_PER_SHEET = 64

FORMAT = 1
"""Raise it when the same sprites are to give other files; prepared folders are then rebuilt."""

NUM_SHARDS = 8
JPEG_QUALITY = 90
BACKGROUNDS = {
    "white": (255, 255, 255),
    "gray": (205, 205, 205),
    "yellow": (255, 241, 170),
    "blue": (176, 214, 255),
    "green": (190, 235, 190),
    "pink": (255, 205, 215),
    "black": (25, 25, 30),
    "orange": (255, 214, 165),
}
CAPTIONS = (
    "{name}",
    "{a} {name}",
    "picture of {a} {name}",
    "{name} icon on {background} background",
    "{name}, {words}",
    "{words} {name}",
    "cartoon {name} clip art",
    "drawing of {a} {name} , {words}",
    "{a} {name} isolated on {background}",
    "the {name} emoji",
)
TEMPLATES = (
    "a {}",
    "the {} emoji",
    "picture of a {}",
    "{}",
    "cartoon {} clip art",
    "{} icon on white background",
)


@dataclass(frozen=True, slots=True)
class EmojiPaths:
    """A prepared folder."""

    folder: Path
    train_data: str
    """Brace pattern of the shards, absolute."""
    train_num_samples: int
    val: Path
    num_classes: int

    @property
    def chance(self) -> float:
        """Top-1 of a model that has learnt nothing, as a fraction."""
        return 1 / self.num_classes


@dataclass(frozen=True, slots=True)
class Concept:
    """One emoji without skin tones, and the styles that draw it."""

    char: str
    slug: str
    name: str
    group: str
    keywords: tuple[str, ...]
    styles: tuple[str, ...]


def prepare_emoji(folder: str | Path) -> EmojiPaths:
    """Make sure that `folder` holds the whole dataset, unharmed, and say where its parts are.

    Every file is checked against its checksum (0.1 s); see :meth:`Prepared.prepare`.

    Raises:
        DataError: the folder holds files that are not of this dataset.
    """
    folder = Path(folder).expanduser().absolute()
    SET.prepare(folder)
    return _paths(folder)


@functools.cache
def load_concepts() -> tuple[Concept, ...]:
    """The shipped concepts, in Unicode order."""
    rows = json.loads((SPRITES / "concepts.json").read_text(encoding="utf-8"))
    return tuple(
        Concept(
            char=row["char"],
            slug=row["slug"],
            name=row["name"],
            group=row["group"],
            keywords=tuple(row["keywords"]),
            styles=tuple(row["styles"]),
        )
        for row in rows
    )


def list_classes() -> list[Concept]:
    """The classes of the zero-shot split, in order (the rule: ``build_sprites.is_class``)."""
    return [c for c in load_concepts() if set(HELD_OUT_STYLES) <= set(c.styles)]


def read_sprites(style: str) -> Iterator[tuple[Concept, Image.Image]]:
    """Every concept that `style` draws with its picture (RGBA, SPRITE_PX square)."""
    concepts = [concept for concept in load_concepts() if style in concept.styles]
    for start in range(0, len(concepts), TILES_PER_SHEET):
        path = SPRITES / style / f"{start // TILES_PER_SHEET:02d}.png"
        with Image.open(path) as picture:
            sheet = picture.convert("RGBA")
        for place, concept in enumerate(concepts[start : start + TILES_PER_SHEET]):
            y, x = (SPRITE_PX * part for part in divmod(place, COLUMNS))
            yield concept, sheet.crop((x, y, x + SPRITE_PX, y + SPRITE_PX))


class Choices:
    """A stream of choices that depends on `key` alone."""

    def __init__(self, *key: str) -> None:
        self._key = "\0".join(key)
        self._count = 0

    def below(self, limit: int) -> int:
        """The next number of 0 .. limit - 1."""
        digest = hashlib.sha256(f"{self._key}\0{self._count}".encode()).digest()
        self._count += 1
        return int.from_bytes(digest[:8], "big") % limit

    def one_of(self, options: tuple[str, ...]) -> str:
        return options[self.below(len(options))]

    def some_of(self, options: tuple[str, ...], number: int) -> list[str]:
        """`number` different options (all of them when there are fewer), in any order."""
        rest = list(options)
        return [rest.pop(self.below(len(rest))) for _ in range(min(number, len(rest)))]


def compose_caption(concept: Concept, background: str, choices: Choices) -> str:
    """One of ten forms, as noisy as alt texts: name, keywords, background, in any mixture."""
    words = choices.some_of(concept.keywords, 1 + choices.below(3))
    text = choices.one_of(CAPTIONS).format(
        name=concept.name,
        a="an" if concept.name[0] in "aeiou" else "a",
        background=background,
        words=" ".join(words),
    )
    return " ".join(text.split()).rstrip(" ,")


def _encode(sprite: Image.Image, background: tuple[int, int, int]) -> bytes:
    ground = Image.new("RGBA", sprite.size, (*background, 255))
    ground.alpha_composite(sprite)
    file = io.BytesIO()
    # Full colour resolution: at 48 px the usual halving smears the colours of neighbouring parts.
    ground.convert("RGB").save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return file.getvalue()


def _train_samples() -> list[tuple[bytes, str]]:
    """(JPEG, caption) of all training pairs, shuffled by hash."""
    samples = []
    for style in TRAIN_STYLES:
        for concept, sprite in read_sprites(style):
            choices = Choices(style, concept.slug)
            white = choices.below(2) == 0
            background = "white" if white else choices.one_of(tuple(BACKGROUNDS))
            caption = compose_caption(concept, background, choices)
            place = hashlib.sha256(f"order\0{style}\0{concept.slug}".encode()).digest()
            samples.append((place, _encode(sprite, BACKGROUNDS[background]), caption))
    samples.sort(key=lambda sample: sample[0])
    return [(image, caption) for _, image, caption in samples]


def _shard_name(shard: int) -> str:
    return f"{shard:05d}.tar"


def _class_folder(place: int, concept: Concept) -> str:
    return f"{place:04d}_{concept.slug}"


def _build(folder: Path) -> None:
    train = folder / "train"
    train.mkdir()
    samples = _train_samples()
    sizes = {}
    for shard in range(NUM_SHARDS):
        first, last = (len(samples) * part // NUM_SHARDS for part in (shard, shard + 1))
        sizes[_shard_name(shard)] = write_shard(
            train / _shard_name(shard),
            (
                Sample(key=f"{shard:05d}{place:04d}", image=image, caption=caption)
                for place, (image, caption) in enumerate(samples[first:last])
            ),
        )
    write_listing(train / "sizes.json", sizes)

    val = folder / "val"
    classes = list_classes()
    folders = {c.slug: val / _class_folder(place, c) for place, c in enumerate(classes)}
    for path in folders.values():
        path.mkdir(parents=True)
    for style in HELD_OUT_STYLES:
        for concept, sprite in read_sprites(style):
            image = _encode(sprite, BACKGROUNDS["white"])
            (folders[concept.slug] / f"{style}.jpg").write_bytes(image)
    write_listing(val / "classnames.json", [concept.name for concept in classes])
    write_listing(val / "templates.json", list(TEMPLATES))

    shutil.copyfile(SPRITES / "LICENSES.md", folder / "LICENSES.md")
    shutil.copytree(SPRITES / "licenses", folder / "licenses", copy_function=shutil.copyfile)


def _planned_files() -> set[str]:
    """Every file of a prepared folder but its checksums, relative to it."""
    return {
        "LICENSES.md",
        *(f"licenses/{path.name}" for path in (SPRITES / "licenses").iterdir()),
        "train/sizes.json",
        *(f"train/{_shard_name(shard)}" for shard in range(NUM_SHARDS)),
        "val/classnames.json",
        "val/templates.json",
        *(
            f"val/{_class_folder(place, concept)}/{style}.jpg"
            for place, concept in enumerate(list_classes())
            for style in HELD_OUT_STYLES
        ),
    }


def _paths(folder: Path) -> EmojiPaths:
    sizes = json.loads((folder / "train" / "sizes.json").read_bytes())
    return EmojiPaths(
        folder=folder,
        train_data=str(folder / "train" / f"{{00000..{NUM_SHARDS - 1:05d}}}.tar"),
        train_num_samples=sum(sizes.values()),
        val=folder / "val",
        num_classes=len(list_classes()),
    )


@functools.cache
def digest_sprites() -> str:
    """sha256 over everything shipped."""
    digest = hashlib.sha256()
    for path in sorted(SPRITES.rglob("*")):
        if path.is_file():
            name = path.relative_to(SPRITES).as_posix()
            digest.update(f"{name} {digest_file(path)}\n".encode())
    return digest.hexdigest()


SET = Prepared(
    what="emoji",
    made_from=lambda: f"{FORMAT} {digest_sprites()}",
    files=_planned_files,
    build=_build,
)
