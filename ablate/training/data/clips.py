"""Video clips: where they lie, what they show, and their frames.

A clip is a video file that PyAV reads, an animated GIF, WebP or PNG, or a strip: a still PNG whose
square frames stand side by side. Clips are found in three forms::

    FOLDER/CLASS/CLIP.mp4    a folder of class folders
    LIST.csv                 lines of ``path label``, paths relative to the file
    LIST.json                [{"video": path, "caption": text}, ...], paths relative to the file
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ablate.errors import DataError

Frames = npt.NDArray[np.uint8]
"""Frames of a clip: T x H x W x 3."""

VIDEO = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg")
PICTURES = (".png", ".gif", ".webp")
NEEDS_AV = (
    "video files are read by PyAV, which is not installed: pip install 'ablate-runner[video]'"
)


@dataclass(frozen=True, slots=True)
class ClipSource:
    """Clips and what each shows."""

    paths: tuple[Path, ...]
    labels: npt.NDArray[np.int64]
    """Class number of each clip; empty where clips have captions instead."""
    texts: tuple[str, ...]
    """Caption of each clip; empty where clips have labels instead."""
    classes: tuple[str, ...]
    """Names of the classes by number: folders, or the numbers of a list."""
    place: str
    """Where they were found, for messages."""

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def fingerprint(self) -> str:
        """sha256 over names, sizes and labels or captions: a run goes on with the same clips only.

        Contents are left out: a set of videos is too large to be read for it.
        """
        digest = hashlib.sha256()
        root = Path(self.place) if Path(self.place).is_dir() else Path(self.place).parent
        for number, path in enumerate(self.paths):
            shown = self.texts[number] if self.texts else str(self.labels[number])
            size = path.stat().st_size if path.exists() else -1
            digest.update(f"{os.path.relpath(path, root)}\t{size}\t{shown}\n".encode())
        return digest.hexdigest()


def find_clips(place: str) -> ClipSource:
    """The clips of a folder of class folders, or of a list.

    Raises:
        DataError: there are none, a class has none, or a line of the list is no clip.
    """
    path = Path(place)
    if path.is_dir():
        return _in_folders(path)
    if path.suffix not in (".csv", ".txt", ".json"):
        raise DataError(
            f"{place} holds no clips: give a folder of class folders, a .csv of 'path label' "
            "lines, or a .json list of {video, caption}"
        )
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{place} cannot be read: {error}") from error
    return _captioned(path, content) if path.suffix == ".json" else _labelled(path, content)


def _in_folders(folder: Path) -> ClipSource:
    paths: list[Path] = []
    labels: list[int] = []
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    for label, name in enumerate(classes):
        found = sorted(
            path for path in (folder / name).rglob("*") if path.suffix.lower() in VIDEO + PICTURES
        )
        if not found:
            raise DataError(f"{folder / name} holds no clips; a class needs at least one")
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise DataError(f"{folder} has no class folders: clips are looked for as CLASS/CLIP.mp4")
    return ClipSource(tuple(paths), np.array(labels, np.int64), (), tuple(classes), str(folder))


def _labelled(path: Path, content: str) -> ClipSource:
    """Lines of a path and a class number, apart by a space, a comma or a tab, as PySlowFast's."""
    paths: list[Path] = []
    labels: list[int] = []
    for number, line in enumerate(filter(None, map(str.strip, content.splitlines())), 1):
        match = re.fullmatch(r"(.+?)[\s,]+(\d+)", line)
        if match is None:
            raise DataError(
                f"{path}, line {number}: {line[:80]!r} is no path and class number (0, 1, ...)"
            )
        paths.append(path.parent / match[1])
        labels.append(int(match[2]))
    if not paths:
        raise DataError(f"{path} lists no clips")
    classes = tuple(map(str, range(max(labels) + 1)))
    return ClipSource(tuple(paths), np.array(labels, np.int64), (), classes, str(path))


def _captioned(path: Path, content: str) -> ClipSource:
    try:
        rows: list[dict[str, Any]] = json.loads(content)
        pairs = [(str(row["video"]), str(row["caption"]).strip()) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'{path} is no list of {{"video": path, "caption": text}}: {error!r}'
        ) from error
    empty = next((video for video, caption in pairs if not caption), None)
    if empty is not None or not pairs:
        raise DataError(f"{path}: {f'{empty} has no caption' if empty else 'it lists no clips'}")
    return ClipSource(
        paths=tuple(path.parent / video for video, _ in pairs),
        labels=np.zeros(0, np.int64),
        texts=tuple(caption for _, caption in pairs),
        classes=(),
        place=str(path),
    )


# --------------------------------------------------------------------------- frames


def needs_av(source: ClipSource) -> bool:
    """Whether reading these clips takes PyAV."""
    return any(path.suffix.lower() in VIDEO for path in source.paths)


def count_frames(path: Path) -> int:
    """Frames of a clip.

    Raises:
        DataError: it cannot be read.
    """
    try:
        if path.suffix.lower() not in VIDEO:
            with Image.open(path) as picture:
                return _frames_in(picture)
        with _open_video(path) as container:
            stream = container.streams.video[0]
            # Some containers do not say it; then packets are counted, without decoding them.
            return int(stream.frames) or sum(packet.size > 0 for packet in container.demux(stream))
    except DataError:
        raise
    except Exception as error:  # of Pillow and FFmpeg, of many kinds
        raise DataError(f"{path} cannot be read as a clip: {error}") from error


def read_frames(path: Path, wanted: Sequence[int] | None = None) -> Frames:
    """Frames `wanted` (ascending or not, repeated or not) of a clip, all of them by default.

    A video is decoded from its beginning: seeking is exact in few containers.

    Raises:
        DataError: it cannot be read, or has fewer frames than asked for.
    """
    last = max(wanted) if wanted is not None else None
    needed = None if wanted is None else set(wanted)
    found: dict[int, Frames] = {}
    try:
        for number, frame in enumerate(_decode(path)):
            if needed is None or number in needed:
                found[number] = frame() if callable(frame) else frame
            if number == last:
                break
    except DataError:
        raise
    except Exception as error:  # of Pillow and FFmpeg, of many kinds
        raise DataError(f"{path} cannot be read as a clip: {error}") from error
    numbers = list(found) if wanted is None else list(wanted)
    if not numbers or any(number not in found for number in numbers):
        raise DataError(f"{path} has {len(found)} of the {len(numbers)} frames that are wanted")
    return np.stack([found[number] for number in numbers])


def _decode(path: Path) -> Iterator[Any]:
    """Frames in order, each an array or a function that makes one: most are not wanted."""
    if path.suffix.lower() in VIDEO:
        with _open_video(path) as container:
            for frame in container.decode(video=0):
                yield lambda frame=frame: frame.to_ndarray(format="rgb24")
        return
    with Image.open(path) as picture:
        if getattr(picture, "is_animated", False):
            for number in range(_frames_in(picture)):
                picture.seek(number)
                yield np.asarray(_on_white(picture))
            return
        strip = np.asarray(_on_white(picture))
        side = strip.shape[0]
        for number in range(_frames_in(picture)):
            yield strip[:, number * side : (number + 1) * side]


def _frames_in(picture: Image.Image) -> int:
    """Frames of an animated picture, or of a strip of squares; 1 of any other still."""
    animated = int(getattr(picture, "n_frames", 1))
    width, height = picture.size
    return animated if animated > 1 else width // height if width % height == 0 else 1


def _on_white(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB":
        return picture
    whole = picture.convert("RGBA")
    ground = Image.new("RGBA", whole.size, (255, 255, 255, 255))
    ground.alpha_composite(whole)
    return ground.convert("RGB")


def _open_video(path: Path) -> Any:
    try:
        import av
    except ImportError:
        raise DataError(f"{path}: {NEEDS_AV}") from None
    return av.open(str(path))
