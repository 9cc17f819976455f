"""The shipped emoji by Unicode's nine groups: images and classes, as models without captions need.

::

    FOLDER/train/GROUP/STYLE-SLUG.png    four vendors' drawings on white (5824)
    FOLDER/val/GROUP/STYLE-SLUG.png      two styles of a fifth vendor, never trained on
    FOLDER/LICENSES.md, licenses/        sources, authors, licences

The layout is torchvision.ImageFolder's, which the trainers of such models read.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from PIL import Image

from ablate.errors import DataError
from ablate.training.data.emoji import HELD_OUT_STYLES, SPRITES, TRAIN_STYLES, read_sprites

_WHOLE = ".whole"
"""A hidden file that is written last."""
FORMAT = "1"
"""Raise it when the same sprites are to give other files; prepared folders are then refused."""


@dataclass(frozen=True, slots=True)
class EmojiGroups:
    """A prepared folder."""

    folder: Path
    train: int
    val: int
    classes: tuple[str, ...]


def prepare_emoji_groups(folder: str | Path) -> EmojiGroups:
    """Make sure that `folder` holds the images, and say how many; callers wait for one another.

    Raises:
        DataError: the folder holds something else.
    """
    folder = Path(folder).expanduser().absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not (folder / _WHOLE).is_file():
            if folder.exists():
                raise DataError(
                    f"{folder} is there and was not written by this; move it away, or prepare the "
                    "emoji in another folder"
                )
            _build_beside(folder)
    stored = (folder / _WHOLE).read_text()
    if stored != FORMAT:
        raise DataError(f"{folder} is of another version ({stored}); move it away")
    return EmojiGroups(
        folder=folder,
        train=sum(1 for _ in (folder / "train").rglob("*.png")),
        val=sum(1 for _ in (folder / "val").rglob("*.png")),
        classes=tuple(sorted(entry.name for entry in (folder / "val").iterdir())),
    )


def _build_beside(folder: Path) -> None:
    new = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        for split, styles in (("train", TRAIN_STYLES), ("val", HELD_OUT_STYLES)):
            for style in styles:
                for concept, sprite in read_sprites(style):
                    place = new / split / _slug(concept.group)
                    place.mkdir(parents=True, exist_ok=True)
                    _on_white(sprite).save(place / f"{style}-{concept.slug}.png")
        shutil.copyfile(SPRITES / "LICENSES.md", new / "LICENSES.md")
        shutil.copytree(SPRITES / "licenses", new / "licenses", copy_function=shutil.copyfile)
        (new / _WHOLE).write_text(FORMAT)
        os.rename(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _on_white(sprite: Image.Image) -> Image.Image:
    ground = Image.new("RGBA", sprite.size, (255, 255, 255))
    ground.alpha_composite(sprite)
    return ground.convert("RGB")


def _slug(group: str) -> str:
    return re.sub(r"[^a-z]+", "_", group.lower()).strip("_")
