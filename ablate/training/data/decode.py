"""Image files and captions, as the peer's loader reads them; no torch."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, features

from ablate.errors import DataError

if TYPE_CHECKING:
    from ablate.training.data.shards import ShardIndex

Bytes = npt.NDArray[np.uint8]
"""A decoded image: H x W x 3."""

BLACK: Bytes = np.zeros((8, 8, 3), np.uint8)


def open_pair(
    index: ShardIndex, sample: int, at_least: tuple[int, int] | None = None
) -> tuple[Bytes, str]:
    """Decoded image and caption.

    Raises:
        DataError: the caption is empty, or the image cannot be decoded; says which and why.
    """
    data, caption = index.read(sample)
    if not caption.strip():
        raise DataError(f"the caption of {index.describe(sample)} is empty")
    try:
        return decode(data, at_least), caption
    except DataError as error:
        raise DataError(f"{index.describe(sample)}: {error}") from error


def read_pair(
    index: ShardIndex, sample: int, at_least: tuple[int, int] | None = None
) -> tuple[Bytes, str] | None:
    """As :func:`open_pair`; None for a bad sample."""
    try:
        return open_pair(index, sample, at_least)
    except (DataError, OSError):
        return None


def decode(data: bytes, at_least: tuple[int, int] | None = None) -> Bytes:
    """An image file as H x W x 3 bytes, as the peer's loader decodes it.

    With `at_least` (height, width) a JPEG is decoded at the smallest of 1/1, 1/2, 1/4, 1/8 of its
    side that is no smaller than that: libjpeg then computes only the coefficients it needs.

    Raises:
        DataError: it cannot be decoded.
    """
    return np.asarray(decode_image(data, at_least))


def decode_image(data: bytes, at_least: tuple[int, int] | None = None) -> Image.Image:
    """As :func:`decode`, as an image of Pillow's.

    Raises:
        DataError: it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if at_least is not None:
                image.draft("RGB", (at_least[1], at_least[0]))  # other formats ignore it
            return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:
        # A damaged file is one whatever its decoder raises: Pillow's own raise OSError, ValueError
        # and SyntaxError, that of AVIF RuntimeError, others what they like.
        said = f"{type(error).__name__}: {error}"
        raise DataError(f"the image cannot be decoded ({said})") from error


def decoders() -> str:
    """Pillow and the libraries that it decodes with: others may round a JPEG differently."""
    found = [f"{name} {features.version(name)}" for name in features.get_supported()]
    return "; ".join([PIL.__version__, *sorted(found)])
