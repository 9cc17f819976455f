"""Reading a shard once, from the first byte to the last: its samples, its faults, its sha256.

A shard is a tar file in which neighbouring members with the same key (path up to the first dot of
the last part) make one sample: ``000000012.jpg`` + ``000000012.txt``. What belongs to a sample
follows open_clip_train 3.3.0 (`group_by_keys_nothrow`, `filter_no_caption_or_no_image`, the order
of image types in `rename`), so a clean shard gives the same samples in the same order. What
open_clip_train skips without a word is counted here.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ablate.errors import DataError

IMAGE_TYPES = ("jpg", "png", "jpeg", "webp")
"""Extensions of image members; the first that a sample has is taken, as open_clip_train does."""

CAPTION_TYPE = "txt"

FAULTS = {
    "missing_shard": "the file does not exist",
    "unreadable_shard": "the file cannot be read as a tar archive",
    "empty_shard": "an archive without any image and caption",
    "truncated": "the file ends in the middle of a member; an incomplete last sample is lost",
    "no_end_marker": "the file ends between two members; an incomplete last sample is lost",
    "damaged_header": "a member's header is damaged; the rest of the shard is not read",
    "unsupported_member": "a member no image has (sparse, over 2 GiB); the rest is not read",
    "missing_caption": "a sample without .txt, or with an empty one",
    "missing_image": "a sample without .jpg, .png, .jpeg or .webp, or with an empty one",
    "not_adjacent": "a sample whose image and caption do not stand side by side: write the shard "
    "with tar --sort=name",
    "caption_not_utf8": "a sample whose caption is not UTF-8: write the captions anew as UTF-8",
    "duplicate_key": "a second sample of the same key in a shard; the first is kept",
    "grey_16_bit": "an image with 16 bits of grey, which open_clip decodes to white",
}
"""Kinds of faults and what they mean."""
LOST_SAMPLES = (
    "missing_caption",
    "missing_image",
    "not_adjacent",
    "caption_not_utf8",
    "duplicate_key",
)
"""Kinds that are counted per sample, each of which is left out."""
SEEN_SAMPLES = ("grey_16_bit",)
"""Kinds that are counted per sample, each of which is trained on all the same."""

MAX_MEMBER_BYTES = 2**31 - 1

BLOCK = 512
"""Bytes of a tar header; everything in a tar file starts at a multiple of it."""
_CHUNK = 8192 * BLOCK
_PNG_HEAD = 26
"""Bytes of a PNG up to its bit depth and colour type."""
_IMAGE_ENDINGS = tuple(f".{kind}" for kind in IMAGE_TYPES)
_NAME_BYTES = 100
_EXAMPLES = 5
_META = re.compile(r"__[^/]*__($|/)")
"""Members that webdataset skips: ``__index__`` and the like, and folders of such names."""
_PAX_RECORD = re.compile(rb"(\d{1,15}) ([^=]+)=")


@dataclass(frozen=True, slots=True)
class ShardScan:
    """What one shard holds. Arrays have shape (samples,), offsets and lengths are in bytes."""

    size: int
    sha256: str
    image_offset: npt.NDArray[np.int64]
    image_length: npt.NDArray[np.int32]
    text_offset: npt.NDArray[np.int64]
    text_length: npt.NDArray[np.int32]
    faults: dict[str, tuple[int, tuple[str, ...]]]
    """kind (see FAULTS) -> how many, and the keys or members of the first few."""


def scan_shard(path: str) -> ShardScan:
    """Read one shard from the first byte to the last."""
    gatherer = _Gatherer()
    before = os.stat(path)
    with open(path, "rb", buffering=0) as file:
        window = _Window(file)
        _walk_members(window, gatherer)
        sha256 = window.finish()
    if not gatherer.rows and not gatherer.faults:
        gatherer.report("empty_shard", f"{window.end} bytes")
    after = os.stat(path)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError(f"shard {path} changed while it was read; wait until it is written")
    rows = np.array(gatherer.rows, dtype=np.int64).reshape(-1, 4)
    return ShardScan(
        size=window.end,
        sha256=sha256,
        image_offset=rows[:, 0].copy(),
        image_length=rows[:, 1].astype(np.int32),
        text_offset=rows[:, 2].copy(),
        text_length=rows[:, 3].astype(np.int32),
        faults=gatherer.faults,
    )


class _Gatherer:
    """Puts neighbouring members together into samples, and counts what cannot be used."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, int, int]] = []
        self.faults: dict[str, tuple[int, tuple[str, ...]]] = {}
        self._seen: set[str] = set()
        self._key: str | None = None
        self._parts: dict[str, tuple[int, int]] = {}
        self._not_text = ""
        self._halves: dict[str, str] = {}

    def add(self, name: str, offset: int, length: int, *, not_text: str = "") -> None:
        """A member; `not_text` says why a caption is no text."""
        folder, slash, base = name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not dot or not stem or _META.match(name):
            return
        key, extension = folder + slash + stem, extension.lower()
        if key != self._key or extension in self._parts:
            self.finish_sample()
            self._key = key
        self._parts[extension] = (offset, length)
        self._not_text = not_text or self._not_text

    def finish_sample(self, *, readable_to: int | None = None) -> str | None:
        """Close the current sample.

        Nothing can be read beyond byte `readable_to`; the key of a sample that is lost because of
        that is returned, for the caller reports the end of the shard.
        """
        key, parts, not_text = self._key, self._parts, self._not_text
        self._key, self._parts, self._not_text = None, {}, ""
        if key is None:
            return None
        image = next((parts[kind] for kind in IMAGE_TYPES if kind in parts), (0, 0))
        text = parts.get(CAPTION_TYPE, (0, 0))
        if readable_to is not None and (
            not image[1] or not text[1] or max(sum(image), sum(text)) > readable_to
        ):
            return key
        if not image[1]:
            self._report_half("missing_image", key)
        elif not text[1]:
            self._report_half("missing_caption", key)
        elif not_text:
            self.report("caption_not_utf8", f"{key}, {not_text}")
        elif key in self._seen:
            self.report("duplicate_key", key)
        else:
            self.rows.append((*image, *text))
            self._seen.add(key)
        return None

    def _report_half(self, kind: str, key: str) -> None:
        """Half of a sample; with its other half further up it is one that was torn apart."""
        other = self._halves.pop(key, kind)
        if other == kind:
            self._halves[key] = kind
            self.report(kind, key)
            return
        count, examples = self.faults[other]
        kept = tuple(name for name in examples if name != key)
        self.faults[other] = count - 1, kept
        if count == 1:
            del self.faults[other]
        self.report("not_adjacent", key)

    def report(self, kind: str, what: str) -> None:
        count, examples = self.faults.get(kind, (0, ()))
        self.faults[kind] = count + 1, examples + ((what,) if len(examples) < _EXAMPLES else ())


class _Window:
    """A file read once from start to end, hashed on the way, of which the latest part is kept."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._kept = b""
        self.end = 0  # bytes read so far

    def bytes_at(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on, fewer at the end of the file. Offsets never go back."""
        while offset + length > self.end:
            kept = self._kept[offset - self.end :] if offset < self.end else b""
            if not self._advance(kept):
                break
        start = len(self._kept) - (self.end - offset)
        return self._kept[start : start + length] if offset < self.end else b""

    def finish(self) -> str:
        """Read the rest and return the sha256 of the whole file."""
        while self._advance(b""):
            pass
        return self._digest.hexdigest()

    def _advance(self, kept: bytes) -> bool:
        data = self._file.read(_CHUNK) or b""
        self._digest.update(data)
        self._kept = kept + data
        self.end += len(data)
        return bool(data)


def _walk_members(window: _Window, gatherer: _Gatherer) -> None:
    """Give every plain file of the archive to the gatherer; report it when reading ends early.

    Headers are decoded here because `tarfile` takes several times as long. Pax headers are common:
    webdataset's own writer puts one before every member, for the fraction of its time stamp.
    """
    header = 0  # offset of the next header
    said_name, said_length = None, None  # what an extension header says about the next member
    while True:
        block = window.bytes_at(header, BLOCK)
        if len(block) < BLOCK:
            size = window.end
            lost = gatherer.finish_sample(readable_to=size)
            kind = "no_end_marker" if header == size else "truncated"
            gatherer.report(kind if size else "unreadable_shard", lost or f"byte {size}")
            return
        if block[0] == 0 and not any(block):
            gatherer.finish_sample()
            return
        member = _read_header(block)
        if member is None:
            gatherer.finish_sample()
            gatherer.report("damaged_header" if header else "unreadable_shard", f"byte {header}")
            return
        flag, name, length = member
        body = header + BLOCK
        if flag in "xL":
            said = window.bytes_at(body, min(length, _CHUNK))
            if flag == "L":
                said_name = _text(said)
            else:
                said_name, said_length = _read_pax(said, name=said_name)
        elif flag in "0\x007":
            name, length = said_name or name, length if said_length is None else said_length
            said_name, said_length = None, None
            if length > MAX_MEMBER_BYTES:
                gatherer.finish_sample()
                gatherer.report("unsupported_member", name)
                return
            if not name.endswith("/"):
                lower = name.lower()
                not_text = ""
                if lower.endswith(f".{CAPTION_TYPE}"):
                    not_text = _not_utf8(window.bytes_at(body, min(length, _CHUNK)))
                elif lower.endswith(_IMAGE_ENDINGS):
                    if _is_grey_16(window.bytes_at(body, _PNG_HEAD)):
                        gatherer.report("grey_16_bit", name)
                gatherer.add(name, body, length, not_text=not_text)
        elif flag in "123456":  # links, devices and folders have no data
            length, said_name, said_length = 0, None, None
        elif flag not in "gK":
            gatherer.finish_sample()
            gatherer.report("unsupported_member", name)
            return
        header = body + -(-length // BLOCK) * BLOCK


def _not_utf8(caption: bytes) -> str:
    """Where a caption stops being UTF-8; empty where it is."""
    try:
        caption.decode("utf-8")
    except UnicodeDecodeError as error:
        if len(caption) == _CHUNK and error.end >= _CHUNK:  # only cut here
            return ""
        return f"byte 0x{caption[error.start]:02x} at {error.start}"
    return ""


def _is_grey_16(head: bytes) -> bool:
    """Whether an image file is a PNG of one channel of 16 bits (RFC 2083, section 4.1.1)."""
    return head.startswith(b"\x89PNG\r\n\x1a\n") and head[24:26] == b"\x10\x00"


def _read_header(block: bytes) -> tuple[str, str, int] | None:
    """(type flag, name, length) of a member; None when the block is no header."""
    try:
        checksum = int(block[148:156].strip(b" \0"), 8)
        if sum(block) - sum(block[148:156]) + 8 * ord(" ") != checksum:
            return None
        if block[124] & 0x80:  # a length of 8 GiB or more is binary
            length = int.from_bytes(block[125:136], "big")
        else:
            length = int(block[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        return None
    name = member_name(block)
    if block[345]:
        name = f"{_text(block[345:500])}/{name}"
    return chr(block[156]), name, length


def _read_pax(data: bytes, *, name: str | None) -> tuple[str | None, int | None]:
    """The name (or the one given) and the length that a pax header states for the next member."""
    length = None
    if b" path=" in data or b" size=" in data:
        start = 0
        while match := _PAX_RECORD.match(data, start):
            end = start + int(match[1])
            value = data[match.end() : end - 1].decode("utf-8", "backslashreplace")
            if match[2] == b"path":
                name = value
            elif match[2] == b"size" and re.fullmatch("[0-9]{1,15}", value):
                length = int(value)
            if end <= match.end():
                break
            start = end
    return name, length


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def member_name(header: bytes) -> str:
    """The name in a tar header: cut to 100 bytes when an extension header holds the whole one."""
    return _text(header[:_NAME_BYTES])
