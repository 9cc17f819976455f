"""The small set of clips: shipped emoji set in motion, for classes of motion and for captions.

384 things, each drawn by four vendors and moved in four of twelve ways, are 1536 training clips;
the drawing of a fifth vendor, in a fifth motion, is held out: 384 clips, so what was moved and how
it moved are never seen together before. Where a clip begins (place, size, tilt) is drawn alike for
all motions, so that the first frame alone does not tell the class. Built in seconds, without
network::

    FOLDER/train/MOTION/SLUG-STYLE.png   8 frames of 32 px side by side; the folder is the class
    FOLDER/val/MOTION/SLUG-STYLE.png
    FOLDER/train.json, val.json          [{"video": path, "caption": text}, ...] of the same clips
    FOLDER/LICENSES.md, licenses/        sources, authors, licences of the drawings
    FOLDER/checksums.json                sha256 of every other file

No random generator is involved: every choice is a hash of what it is made for.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from ablate.training.data.emoji import (
    BACKGROUNDS,
    HELD_OUT_STYLES,
    SPRITE_PX,
    SPRITES,
    TRAIN_STYLES,
    Choices,
    Concept,
    digest_sprites,
    list_classes,
    read_sprites,
)
from ablate.training.data.prepared import Prepared, write_listing

FRAMES = 8
SIDE = 32
"""Pixels of a frame."""
CONCEPTS = 384
COLOURS = 64
HELD_OUT = HELD_OUT_STYLES[0]
FORMAT = 1
"""Raise it when the same sprites are to give other clips."""


@dataclass(frozen=True, slots=True)
class Pose:
    """Where and how a drawing is in one frame."""

    x: float
    y: float
    size: float
    """Side of the drawing, pixels."""
    tilt: float
    """Degrees, anticlockwise."""
    shown: float = 1.0
    """Opacity."""


def _wave(frame: int, phase: float) -> float:
    return math.sin(2 * math.pi * (frame / FRAMES + phase))


Motion = Callable[[Pose, int, float], Pose]
"""(pose of the first frame, frame, phase 0 to 1) -> pose of the frame."""

MOTIONS: dict[str, tuple[str, Motion]] = {
    "right": ("moving right", lambda p, t, _: replace(p, x=p.x + 1.5 * t)),
    "left": ("moving left", lambda p, t, _: replace(p, x=p.x - 1.5 * t)),
    "up": ("rising", lambda p, t, _: replace(p, y=p.y - 1.5 * t)),
    "down": ("falling", lambda p, t, _: replace(p, y=p.y + 1.5 * t)),
    "clockwise": ("turning clockwise", lambda p, t, _: replace(p, tilt=p.tilt - 20 * t)),
    "anticlockwise": ("turning anticlockwise", lambda p, t, _: replace(p, tilt=p.tilt + 20 * t)),
    "grow": ("growing", lambda p, t, _: replace(p, size=p.size * 1.07**t)),
    "shrink": ("shrinking", lambda p, t, _: replace(p, size=p.size / 1.07**t)),
    "jump": ("jumping", lambda p, t, f: replace(p, y=p.y - 6 * abs(_wave(t, f)))),
    "sway": ("swaying", lambda p, t, f: replace(p, x=p.x + 5 * _wave(t, f))),
    "blink": ("blinking", lambda p, t, f: replace(p, shown=1.0 if (t + round(f)) % 2 else 0.3)),
    "still": ("standing still", lambda p, t, _: p),
}
"""Name of the class -> words of its captions, and how it moves."""


@dataclass(frozen=True, slots=True)
class VideoPaths:
    """A prepared folder."""

    folder: Path
    train_clips: int
    val_clips: int
    num_classes: int


def prepare_emoji_video(folder: str | Path) -> VideoPaths:
    """Make sure that `folder` holds the whole set; see :meth:`Prepared.prepare`.

    Raises:
        DataError: the folder holds files that are not of this set.
    """
    folder = Path(folder).expanduser().absolute()
    SET.prepare(folder)
    train = CONCEPTS * len(TRAIN_STYLES)
    return VideoPaths(folder, train_clips=train, val_clips=CONCEPTS, num_classes=len(MOTIONS))


@dataclass(frozen=True, slots=True)
class _Clip:
    """What one clip shows."""

    split: str
    concept: Concept
    style: str
    motion: str

    @property
    def path(self) -> str:
        return f"{self.split}/{self.motion}/{self.concept.slug}-{self.style}.png"

    @property
    def caption(self) -> str:
        name = self.concept.name
        return f"{'an' if name[0] in 'aeiou' else 'a'} {name} {MOTIONS[self.motion][0]}"


def _clips() -> Iterator[_Clip]:
    """All clips: a thing moves in another way in each drawing."""
    wanted = {*TRAIN_STYLES, HELD_OUT}
    drawn = [concept for concept in list_classes() if wanted <= set(concept.styles)]
    motions = tuple(MOTIONS)
    for number in range(CONCEPTS):
        concept = drawn[number * len(drawn) // CONCEPTS]
        for turn, style in enumerate(TRAIN_STYLES):
            motion = motions[(number + 3 * turn) % len(motions)]
            yield _Clip("train", concept, style, motion)
        yield _Clip("val", concept, HELD_OUT, motions[(number + 1) % len(motions)])


def draw_clip(sprite: Image.Image, motion: str, choices: Choices) -> Image.Image:
    """The frames of a moving drawing (RGBA) side by side, on a ground of one colour."""

    def between(low: float, high: float) -> float:
        return low + (high - low) * choices.below(1000) / 999

    ground = BACKGROUNDS[choices.one_of(tuple(BACKGROUNDS))]
    first = Pose(x=between(12, 20), y=between(12, 20), size=between(16, 22), tilt=between(-20, 20))
    phase = between(0, 1)
    strip = Image.new("RGB", (FRAMES * SIDE, SIDE), ground)
    for frame in range(FRAMES):
        pose = MOTIONS[motion][1](first, frame, phase)
        strip.paste(_draw(sprite, pose, ground), (frame * SIDE, 0))
    return strip.quantize(COLOURS)


def _draw(sprite: Image.Image, pose: Pose, ground: tuple[int, int, int]) -> Image.Image:
    """One frame: the drawing turned, scaled and placed by one resampling."""
    # Each pixel of the frame is looked up in the drawing: the inverse of turn, scale and shift.
    scale = SPRITE_PX / pose.size
    angle = math.radians(pose.tilt)
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    middle = SPRITE_PX / 2
    looked_up = (
        cos, -sin, middle - cos * pose.x + sin * pose.y,
        sin, cos, middle - sin * pose.x - cos * pose.y,
    )  # fmt: skip
    moved = sprite.transform(
        (SIDE, SIDE), Image.Transform.AFFINE, looked_up, resample=Image.Resampling.BICUBIC
    )
    if pose.shown < 1:
        moved.putalpha(moved.getchannel("A").point(lambda alpha: round(alpha * pose.shown)))
    frame = Image.new("RGBA", (SIDE, SIDE), (*ground, 255))
    frame.alpha_composite(moved)
    return frame.convert("RGB")


def _build(folder: Path) -> None:
    listed: dict[str, list[dict[str, str]]] = {"train": [], "val": []}
    sprites = {
        style: {concept.slug: sprite for concept, sprite in read_sprites(style)}
        for style in (*TRAIN_STYLES, HELD_OUT)
    }
    for split in listed:
        for motion in MOTIONS:
            (folder / split / motion).mkdir(parents=True)
    for clip in _clips():
        choices = Choices("clip", clip.path)
        strip = draw_clip(sprites[clip.style][clip.concept.slug], clip.motion, choices)
        strip.save(folder / clip.path, optimize=False)
        listed[clip.split].append({"video": clip.path, "caption": clip.caption})
    for split, rows in listed.items():
        write_listing(folder / f"{split}.json", rows)
    shutil.copyfile(SPRITES / "LICENSES.md", folder / "LICENSES.md")
    shutil.copytree(SPRITES / "licenses", folder / "licenses", copy_function=shutil.copyfile)


SET = Prepared(
    what="emoji-video",
    made_from=lambda: f"video {FORMAT} {digest_sprites()}",
    files=lambda: {
        "LICENSES.md",
        *(f"licenses/{path.name}" for path in (SPRITES / "licenses").iterdir()),
        "train.json",
        "val.json",
        *(clip.path for clip in _clips()),
    },
    build=_build,
)
