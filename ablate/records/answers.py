"""Which images a model got right: one bit each, as text of a row (8.3 kB for 50,000 images)."""

from __future__ import annotations

import base64
import zlib

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]


def pack(right: BoolArray) -> str:
    """One bit an image, in the order of the data."""
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def unpack(text: str, count: int) -> BoolArray:
    """The first `count` bits of what :func:`pack` wrote."""
    bits = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    return np.unpackbits(bits, count=count).astype(bool)


def pack_labels(labels: npt.NDArray[np.int64]) -> str:
    """Class numbers; sorted ones take next to nothing."""
    return base64.b64encode(zlib.compress(labels.astype("<i4").tobytes())).decode()


def unpack_labels(text: str) -> npt.NDArray[np.int32]:
    """What :func:`pack_labels` wrote."""
    found: npt.NDArray[np.int32] = np.frombuffer(
        zlib.decompress(base64.b64decode(text)), dtype="<i4"
    )
    return found
