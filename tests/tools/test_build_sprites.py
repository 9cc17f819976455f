"""Making the sprite sheets: reading icon sets, choosing classes, quantising."""

from __future__ import annotations

import io

import numpy as np
import pytest
from build_sprites import PACKAGES, compose_svg, is_class, quantise, tarball
from PIL import Image

from ablate.training.data.emoji import HELD_OUT_STYLES, SPRITES, TRAIN_STYLES

ICONS = {
    "height": 32,
    "icons": {"cat": {"body": "<path/>", "width": 24, "left": 2}},
    "aliases": {
        "kitty": {"parent": "pussy-cat"},
        "pussy-cat": {"parent": "cat"},
        "cat-upside-down": {"parent": "cat", "vFlip": True},
    },
}


def test_aliases_lead_to_their_icon() -> None:
    """An alias of an alias is drawn as the icon, with the set's defaults for what it lacks."""
    svg = compose_svg(ICONS, "kitty")
    assert svg is not None and svg == compose_svg(ICONS, "cat")
    assert 'viewBox="2 0 24 32" width="24" height="32"><path/></svg>' in svg


def test_transformed_aliases_and_unknown_icons_are_left_out() -> None:
    """An alias that turns its parent shows another thing, so it is not drawn at all."""
    assert compose_svg(ICONS, "cat-upside-down") is None
    assert compose_svg(ICONS, "dog") is None


def test_a_picture_of_few_colours_keeps_them() -> None:
    """Up to 256 colours with opacity survive quantising and PNG to within rounding."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (40, 4), dtype=np.uint8)
    colours[:, 3] = rng.choice([64, 128, 255], 40)
    colours[0] = 0
    pixels = colours[rng.integers(0, 40, (48, 48))]
    file = io.BytesIO()
    quantise(pixels).save(file, "PNG", optimize=True)
    read = np.array(Image.open(file).convert("RGBA"))
    opacity = pixels[..., 3:].astype(float) / 255
    shown = np.abs(read[..., :3] * opacity - pixels[..., :3] * opacity)
    assert np.abs(read[..., 3].astype(int) - pixels[..., 3]).max() <= 1
    assert shown.max() <= 2


def test_a_picture_of_many_colours_stays_close() -> None:
    """A smooth gradient over 16,384 colours is off by few of 255 levels in 256 colours."""
    ramp = np.arange(128, dtype=np.uint8) * 2
    pixels = np.zeros((128, 128, 4), np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 3] = ramp[:, None], ramp[None, :], 255
    error = np.array(quantise(pixels).convert("RGBA")).astype(float) - pixels
    assert np.sqrt((error[..., :3] ** 2).mean()) < 6


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"group": "Flags"}, False),
        ({"name": "alarm clock"}, False),
        ({"name": "nine thirty"}, False),
        ({"lacks": HELD_OUT_STYLES[0]}, False),
        ({"lacks": TRAIN_STYLES[0]}, True),
    ],
)
def test_the_rule_for_classes(change: dict[str, str], expected: bool) -> None:
    """Things with a name, drawn by both held-out and at least three training styles, no clocks."""
    change = dict(change)
    lacks = change.pop("lacks", None)
    concept = {"slug": "cat", "name": "cat", "group": "Animals & Nature", **change}
    styles = [style for style in (*TRAIN_STYLES, *HELD_OUT_STYLES) if style != lacks]
    pixels = np.zeros((1, 1, 4), np.uint8)
    drawn = {style: {} for style in (*TRAIN_STYLES, *HELD_OUT_STYLES)}
    for style in styles:
        drawn[style] = {"cat": pixels}
    assert is_class(concept, drawn) is expected


def test_the_sources_stand_in_the_notice() -> None:
    """Every upstream package is named with its version in the notice that ships."""
    notice = (SPRITES / "LICENSES.md").read_text(encoding="utf-8")
    for package in PACKAGES.values():
        name, _, version = package.rpartition("@")
        assert f"`{name}` {version}" in notice


def test_tarballs_are_named_as_npm_names_them(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """`npm pack` drops the @ of a scope and joins with dashes."""
    path = tarball(tmp_path, "@iconify-json/noto-v1@1.2.5")
    assert path == tmp_path / "iconify-json-noto-v1-1.2.5.tgz"
