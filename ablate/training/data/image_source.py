"""Image files and what they show: folders of class folders, shards with class numbers, captions."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ablate.errors import DataError
from ablate.training.data import cache
from ablate.training.data.shard_names import expand_shards
from ablate.training.data.shard_scan import IMAGE_TYPES
from ablate.training.data.shards import ShardIndex

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Encoded images and what each shows."""

    labels: npt.NDArray[np.int64]
    """Class number of each image; empty where images have captions instead."""
    texts: tuple[str, ...]
    """Caption of each image; empty where images have labels instead."""
    read: Callable[[int], bytes]
    """The file of image i."""
    describe: Callable[[int], str]
    """Where image i lies, for messages."""
    facts: tuple[object, ...]
    """They change when the images do."""
    first_equal: npt.NDArray[np.int64] | None = None
    """For each image the first one of the same file; None where that is not known."""
    place: str = ""
    """Folder or shards, for messages."""
    folders: tuple[str, ...] = ()
    """Names of the class folders by class number; empty for shards, which have numbers alone."""
    names: tuple[str, ...] = ()
    """What classnames.json calls the classes, by number; empty without one."""

    def __len__(self) -> int:
        return max(len(self.labels), len(self.texts))


def image_folder(folder: Path) -> ImageSource:
    """A folder of class folders, in torchvision.ImageFolder's order.

    Raises:
        DataError: a class without images.
    """
    paths, labels, folders = list_images(folder)
    return ImageSource(
        labels=labels,
        texts=(),
        read=lambda number: paths[number].read_bytes(),
        describe=lambda number: str(paths[number]),
        facts=(
            folder.resolve(),
            *((os.path.relpath(path, folder), *cache.facts_of(path)) for path in paths),
        ),
        place=str(folder),
        folders=folders,
        names=_class_names(folder),
    )


def list_images(folder: Path) -> tuple[list[Path], npt.NDArray[np.int64], tuple[str, ...]]:
    """Images of an image folder, their class numbers, and the classes' names by number.

    The order is torchvision.ImageFolder's.

    Raises:
        DataError: a class without images.
    """
    paths: list[Path] = []
    labels: list[int] = []
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    for label, name in enumerate(classes):
        before = len(paths)
        for root, _, files in sorted(os.walk(folder / name, followlinks=True)):
            found = [Path(root, file) for file in sorted(files)]
            paths += [path for path in found if path.suffix.lower() in IMAGE_ENDINGS]
        if len(paths) == before:
            raise DataError(f"{folder / name} holds no images; a class needs at least one")
        labels += [label] * (len(paths) - before)
    return paths, np.array(labels, np.int64), tuple(classes)


def labelled_shards(pattern: str) -> ImageSource:
    """WebDataset shards whose samples are an image and a class number (``.cls``), in their order.

    Raises:
        DataError: a shard cannot be read, or a sample has no whole number as its class.
    """
    paths = [Path(path) for path in expand_shards(pattern)]
    places: list[tuple[Path, int, int, str]] = []
    labels: list[int] = []
    for path in paths:
        try:
            with tarfile.open(path) as tar:
                for key, parts in _samples(tar).items():
                    image = next((parts[kind] for kind in IMAGE_TYPES if kind in parts), None)
                    label = parts.get("cls")
                    if image is None or label is None:
                        raise DataError(
                            f"{path}: sample {key} has {', '.join(parts)}; a labelled sample is "
                            "an image and a .cls file with its class number"
                        )
                    file = tar.extractfile(label)
                    assert file is not None
                    labels.append(_class_number(file.read(), f"{path}: {label.name}"))
                    places.append((path, image.offset_data, image.size, image.name))
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"shard {path} cannot be read: {error}") from error
    if not places:
        raise DataError(f"{pattern} holds no labelled images")

    def read(number: int) -> bytes:
        path, offset, size, _ = places[number]
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)

    return ImageSource(
        labels=np.array(labels, np.int64),
        texts=(),
        read=read,
        describe=lambda number: f"{places[number][0]}: {places[number][3]}",
        facts=tuple((path.resolve(), *cache.facts_of(path)) for path in paths),
        place=pattern,
        names=_class_names(paths[0].parent),
    )


def _class_names(folder: Path) -> tuple[str, ...]:
    try:
        names = json.loads((folder / "classnames.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


def open_labelled(path: str) -> ImageSource:
    """Images and their classes: of a folder of class folders, or of shards with class numbers.

    Raises:
        DataError: there are none.
    """
    if path.endswith(".tar"):
        return labelled_shards(path)
    if not Path(path).is_dir():
        raise DataError(f"{path} is no folder; give a folder of class folders, or shards (.tar)")
    source = image_folder(Path(path))
    if not len(source):
        raise DataError(f"{path} has no class folders; each class needs a folder of images")
    return source


def count_classes(path: str) -> int:
    """Classes of :func:`open_labelled`; of a folder its class folders, which are not opened.

    Raises:
        DataError: there are none.
    """
    if path.endswith(".tar"):
        source = labelled_shards(path)
        return len(source.names) or len(np.unique(source.labels))
    if not Path(path).is_dir():
        raise DataError(f"{path} is not on this machine")
    return sum(entry.is_dir() for entry in Path(path).iterdir())


def pair_labels(images: ImageSource, reference: ImageSource) -> npt.NDArray[np.int64]:
    """Class of each of `images`, in the numbers of `reference`: the folder of the same name, where
    both have folders, else the same number.

    Raises:
        DataError: a class of `images` occurs nowhere in `reference`, so nothing can answer it; or
            a number has two names.
    """
    known = set(np.unique(reference.labels).tolist())
    found = np.unique(images.labels).tolist()
    if images.folders and reference.folders:
        place = {name: number for number, name in enumerate(reference.folders)}
        numbers = {number: place.get(images.folders[number], -1) for number in found}
    else:
        numbers = {number: number for number in found}
        for number, one, other in zip(itertools.count(), images.names, reference.names):
            if number in numbers and one != other:
                raise DataError(
                    f"class {number} is {one!r} in {images.place} and {other!r} in "
                    f"{reference.place}: number the classes of path and train_path alike"
                )
    lacking = [number for number, other in numbers.items() if other not in known]
    if lacking:
        names = images.folders or {number: str(number) for number in lacking}
        raise DataError(
            f"{len(lacking)} of {len(numbers)} classes of {images.place} do not occur in "
            f"{reference.place}, so no neighbour and no probe can answer them: "
            f"{', '.join(names[number] for number in lacking[:3])}. Give path and train_path the "
            "same classes, of the same names"
        )
    return np.array([numbers[number] for number in images.labels.tolist()], np.int64)


def _samples(tar: tarfile.TarFile) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Members by key (the path up to the first dot of its last part) and ending, in order."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in tar:
        folder, slash, base = member.name.rpartition("/")
        stem, dot, ending = base.partition(".")
        if member.isfile() and dot and stem and not member.name.startswith("__"):
            samples.setdefault(folder + slash + stem, {})[ending.lower()] = member
    return samples


def _class_number(content: bytes, where: str) -> int:
    try:
        number = int(content)
    except ValueError:
        number = -1
    if number < 0:
        raise DataError(f"{where} holds {content[:40]!r}, which is no class number (0, 1, ...)")
    return number


def captioned_shards(index: ShardIndex) -> ImageSource:
    """All images and captions of WebDataset shards."""
    texts, files = [], []
    for number in range(index.num_samples):
        image, text = index.read(number)
        texts.append(text)
        files.append(hashlib.sha256(image).digest())
    return ImageSource(
        labels=np.zeros(0, np.int64),
        texts=tuple(texts),
        first_equal=first_equal(np.array(files)),
        read=lambda number: index.read(number)[0],
        describe=index.describe,
        facts=(index.fingerprint,),
    )


def first_equal(rows: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """For each row the number of the first row that is equal to it."""
    _, first, place = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    found: npt.NDArray[np.int64] = first[place.reshape(-1)]
    return found
