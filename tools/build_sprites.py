"""Draw the sprite sheets that `ablate.training.data.emoji` ships, from the upstream npm packages.

Run once per change of upstream versions; about a minute on one core, about 3 MB of PNG::

    python -m pip install resvg-py                             # draws SVG; not needed at run time
    python tools/build_sprites.py TARBALLS --pack    # `npm pack`s what is missing, draws

A style is one vendor's drawing of the emoji, a concept one emoji without skin tones. Every sheet
holds 64 sprites of 48 x 48 pixels in eight columns, in Unicode order, as a palette PNG with its
own 256 colours with opacity: a palette per sheet instead of one per style costs 12 % more bytes
and halves the error (RMSE 5.7 against 9.7 of 255 for noto).
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ablate.training.data.emoji import (
    COLUMNS,
    HELD_OUT_STYLES,
    SPRITE_PX,
    SPRITES,
    TILES_PER_SHEET,
    TRAIN_STYLES,
)

Pixels = npt.NDArray[np.uint8]
"""RGBA, shape (height, width, 4)."""

PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "emojione": "@iconify-json/emojione@1.2.3",
    "fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "fluent": "@iconify-json/fluent-emoji@1.2.7",
    "concepts": "unicode-emoji-json@0.9.0",
    "keywords": "emojilib@4.0.3",
}

OBJECT_GROUPS = (
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
)
"""Groups whose members are things with a name, as ImageNet's classes are."""


def tarball(folder: Path, package: str) -> Path:
    """Where `npm pack` puts `package` (name@version) inside `folder`."""
    name, _, version = package.rpartition("@")
    return folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"


def pack_missing(folder: Path) -> None:
    """Fetch the packages that are not in `folder` yet, with npm's own configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES.values():
        if not tarball(folder, package).exists():
            subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True)


def read_member(folder: Path, package: str, member: str) -> Any:
    """The JSON file `member` of a package's tarball."""
    with tarfile.open(tarball(folder, package)) as tar:
        file = tar.extractfile(f"package/{member}")
        assert file is not None, f"{package} has no {member}"
        return json.load(file)


def read_concepts(folder: Path) -> list[dict[str, Any]]:
    """All emoji without skin tones, in Unicode order: char, slug, name, group, keywords."""
    keywords = read_member(folder, PACKAGES["keywords"], "dist/emoji-en-US.json")
    concepts = []
    for char, facts in read_member(folder, PACKAGES["concepts"], "data-by-emoji.json").items():
        name = facts["name"].replace("-", " ").lower()
        words = [word.replace("_", " ").lower() for word in keywords.get(char, [])]
        plain = [w for w in words if w.isascii() and w.replace(" ", "").isalpha() and w != name]
        concepts.append(
            {
                "char": char,
                "slug": facts["slug"].replace("_", "-"),
                "name": name,
                "group": facts["group"],
                "keywords": plain[:8],
            }
        )
    return concepts


def compose_svg(icons: Mapping[str, Any], name: str) -> str | None:
    """One icon of an IconifyJSON file as an SVG document; None when it has no such icon."""
    aliases = icons.get("aliases", {})
    while name in aliases:
        if set(aliases[name]) - {"parent"}:
            return None  # a rotated or flipped alias shows another thing
        name = aliases[name]["parent"]
    icon = icons["icons"].get(name)
    if icon is None:
        return None
    left, top, width, height = (
        icon.get(key, icons.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">'
        f"{icon['body']}</svg>"
    )


def draw(svg: str) -> Pixels:
    """Draw an SVG document into a centred square of SPRITE_PX, colourless where transparent."""
    import resvg_py

    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=SPRITE_PX, height=SPRITE_PX, skip_system_fonts=True
    )
    drawn = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    square = Image.new("RGBA", (SPRITE_PX, SPRITE_PX))
    square.paste(drawn, ((SPRITE_PX - drawn.width) // 2, (SPRITE_PX - drawn.height) // 2))
    pixels = np.array(square)
    pixels[pixels[..., 3] == 0] = 0
    return pixels


def draw_style(
    folder: Path, style: str, concepts: list[dict[str, Any]]
) -> Iterator[tuple[str, Pixels]]:
    """(slug, pixels) of each concept that this style draws."""
    icons = read_member(folder, PACKAGES[style], "icons.json")
    names = read_member(folder, PACKAGES[style], "chars.json")
    for concept in concepts:
        code = [f"{ord(char):x}" for char in concept["char"]]
        without_variant = [point for point in code if point != "fe0f"]
        for name in (names.get("-".join(code)), names.get("-".join(without_variant))):
            svg = compose_svg(icons, name) if name else None
            if svg:
                break
        else:
            svg = compose_svg(icons, concept["slug"])
        if svg:
            yield concept["slug"], draw(svg)


def is_class(concept: Mapping[str, Any], drawn: Mapping[str, Mapping[str, Pixels]]) -> bool:
    """Whether the concept is a class of the zero-shot split.

    A class is a thing that all held-out styles and at least three training styles draw. Clock
    faces are left out: they differ by their hands alone, and their names are times of day.
    """
    slug, name = concept["slug"], concept["name"]
    return (
        concept["group"] in OBJECT_GROUPS
        and all(slug in drawn[style] for style in HELD_OUT_STYLES)
        and sum(slug in drawn[style] for style in TRAIN_STYLES) >= 3
        and "clock" not in name
        and "thirty" not in name
    )


def quantise(pixels: Pixels, *, num_colours: int = 256, rounds: int = 12) -> Image.Image:
    """The picture with its best palette: k-means in premultiplied RGBA, entry 0 transparent.

    Premultiplied, because the colour of an almost transparent pixel hardly shows. Colours that
    fill large areas are weighted by the square root of their area, or they would take all entries.
    """
    opacity = pixels[..., 3:].astype(np.float32) / 255
    points = np.concatenate([pixels[..., :3] * opacity, pixels[..., 3:]], axis=-1).reshape(-1, 4)
    colours, back, area = np.unique(
        np.round(points / 2) * 2, axis=0, return_inverse=True, return_counts=True
    )
    weight = np.sqrt(np.minimum(area, 2000)).astype(np.float32)

    rng = np.random.default_rng(0)
    centres = np.zeros((min(num_colours, len(colours)), 4), np.float32)
    distance = (colours**2).sum(1)
    for entry in range(1, len(centres)):  # k-means++: far from all entries so far
        chance = distance * weight
        if chance.sum() == 0:
            break
        centres[entry] = colours[rng.choice(len(colours), p=chance / chance.sum())]
        distance = np.minimum(distance, ((colours - centres[entry]) ** 2).sum(1))
    for _ in range(rounds):
        nearest = _nearest(colours, centres)
        mass = np.bincount(nearest, weight, minlength=len(centres))
        for channel in range(4):
            total = np.bincount(nearest, weight * colours[:, channel], minlength=len(centres))
            np.divide(total, mass, out=centres[:, channel], where=mass > 0, casting="unsafe")
        centres[0] = 0

    alpha = np.clip(np.round(centres[:, 3:]), 0, 255)
    rgb = np.clip(centres[:, :3] * 255 / np.maximum(centres[:, 3:], 1), 0, 255)
    palette = np.concatenate([np.round(rgb) * (alpha > 0), alpha], axis=1).astype(np.uint8)
    indices = _nearest(colours, centres)[back.reshape(-1)].reshape(pixels.shape[:2])
    picture = Image.fromarray(indices.astype(np.uint8))
    picture.putpalette(palette.tobytes(), "RGBA")
    return picture


def _nearest(points: npt.NDArray[Any], centres: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    nearest: npt.NDArray[np.intp] = ((centres**2).sum(1) - 2 * points @ centres.T).argmin(1)
    return nearest


def write_sheets(folder: Path, sprites: list[Pixels]) -> int:
    """Write the sprites of one style as sheets 00.png, 01.png, ...; return their bytes."""
    folder.mkdir(parents=True)
    size = 0
    for sheet, start in enumerate(range(0, len(sprites), TILES_PER_SHEET)):
        tiles = sprites[start : start + TILES_PER_SHEET]
        rows = -(-len(tiles) // COLUMNS)
        pixels = np.zeros((rows * SPRITE_PX, COLUMNS * SPRITE_PX, 4), np.uint8)
        for place, tile in enumerate(tiles):
            y, x = (SPRITE_PX * part for part in divmod(place, COLUMNS))
            pixels[y : y + SPRITE_PX, x : x + SPRITE_PX] = tile
        path = folder / f"{sheet:02d}.png"
        quantise(pixels).save(path, optimize=True)
        size += path.stat().st_size
    return size


def build(tarballs: Path, out: Path) -> None:
    """Draw all styles and write the sheets and concepts.json into `out`."""
    concepts = read_concepts(tarballs)
    drawn = {}
    for style in (*TRAIN_STYLES, *HELD_OUT_STYLES):
        drawn[style] = dict(draw_style(tarballs, style, concepts))
        print(f"{style}: {len(drawn[style])} of {len(concepts)} concepts drawn", flush=True)

    kept = []
    for concept in concepts:
        held_out = HELD_OUT_STYLES if is_class(concept, drawn) else ()
        styles = [style for style in TRAIN_STYLES if concept["slug"] in drawn[style]]
        if styles:
            kept.append({**concept, "styles": [*styles, *held_out]})
    for style in drawn:
        shutil.rmtree(out / style, ignore_errors=True)
        sprites = [drawn[style][c["slug"]] for c in kept if style in c["styles"]]
        print(f"{style}: {len(sprites)} sprites, {write_sheets(out / style, sprites)} bytes")
    lines = ",\n".join(json.dumps(concept, ensure_ascii=False) for concept in kept)
    (out / "concepts.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    num_classes = sum(HELD_OUT_STYLES[0] in concept["styles"] for concept in kept)
    print(f"concepts.json: {len(kept)} concepts, {num_classes} of them classes")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tarballs", type=Path, help="folder with the npm tarballs")
    parser.add_argument("--pack", action="store_true", help="`npm pack` those that are missing")
    parser.add_argument("--out", type=Path, default=SPRITES, help="default: the package's own")
    arguments = parser.parse_args()
    if arguments.pack:
        pack_missing(arguments.tarballs)
    missing = [p for p in PACKAGES.values() if not tarball(arguments.tarballs, p).exists()]
    if missing:
        print(f"not in {arguments.tarballs}: {', '.join(missing)}; add --pack", file=sys.stderr)
        return 1
    build(arguments.tarballs, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
