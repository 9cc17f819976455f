"""Class names, prompt templates and class folders of labelled images."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from ablate.errors import DataError
from ablate.training.data.shard_names import expand_shards


def class_folders(folder: Path) -> list[Path]:
    """Class folders of an image folder, in torchvision's order: a class's number is its place.

    Raises:
        DataError: there are none.
    """
    if folder.is_dir():
        found = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir())
        if found:
            return [Path(path) for path in found]
    raise DataError(
        f"{folder} holds no class folders. Give imagenet_val, or an evaluation's path, a folder "
        "with one folder of images for each class (for the small data set: ablate data emoji)"
    )


def zero_shot_classes(data: Path | str) -> tuple[list[str], list[str] | None]:
    """Class names and prompt templates of labelled images: a folder of class folders, or shards.

    With ``classnames.json`` (a list, in the order of the class numbers) and ``templates.json``
    (a list of texts with ``{}`` for the name) in the folder, or beside the first shard, those;
    else ImageNet's, for which there must be ImageNet's 1000 class folders (of shards
    :func:`refuse_other_labels` sees it when they are read). Templates are None for ImageNet's 80.

    Raises:
        DataError: names and folders do not match, or a file does not hold what it should.
    """
    shards = str(data).endswith(".tar")
    folder = Path(expand_shards(str(data))[0]).parent if shards else Path(data)
    folders = None if shards else [path.name for path in class_folders(folder)]
    names_file, templates_file = folder / "classnames.json", folder / "templates.json"
    if names_file.exists() != templates_file.exists():
        missing = templates_file if names_file.exists() else names_file
        raise DataError(f"{missing} is missing: classnames.json and templates.json go together")
    if not names_file.exists():
        if folders is not None:
            _refuse_other_folders(folder, folders)
        return [], None
    names, templates = _read_texts(names_file), _read_texts(templates_file)
    if folders is not None and len(folders) != len(names):
        raise DataError(f"{names_file} names {len(names)} classes, {folder} has {len(folders)}")
    if folders is not None:
        _refuse_unpadded(folder, folders)
    if not templates or not all("{}" in template for template in templates):
        raise DataError(f"{templates_file} must list texts that hold {{}} for the class name")
    return names, templates


def refuse_other_labels(path: str, labels: Iterable[int]) -> None:
    """Raise DataError for shards without names of their own whose labels are not ImageNet's."""
    found = set(labels)
    if len(found) < _MOST_CLASSES:
        raise DataError(
            f"{path} has {len(found)} different class numbers, {min(found)} to {max(found)}, and "
            "no classnames.json beside it, so they would be read as numbers of ImageNet's 1000 "
            "classes. Put classnames.json and templates.json beside the shards"
        )


_MOST_CLASSES = 900
"""Different labels from which on a labelled set is taken for ImageNet's 1000 classes."""
_WORDNET = re.compile(r"n\d{8}")


def _read_texts(path: Path) -> list[str]:
    """A JSON list of texts."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: {error.msg}; it must be JSON") from error
    if isinstance(found, list) and all(isinstance(item, str) for item in found):
        return found
    what = "a mapping" if isinstance(found, dict) else "something else"
    raise DataError(
        f"{path} must hold a list of texts, in the order of the class numbers, and holds {what}: "
        'write ["red square", "green square", ...]'
    )


def _refuse_other_folders(folder: Path, names: Sequence[str]) -> None:
    """Raise DataError for folders that ImageNet's class names do not fit."""
    if len(names) != 1000:
        raise DataError(
            f"{folder} has {len(names)} classes and no classnames.json, and open_clip's "
            "ImageNet names are for 1000. Add classnames.json and templates.json to it"
        )
    _refuse_unpadded(folder, names)
    numbered = [name.isdecimal() and int(name) == place for place, name in enumerate(names)]
    if not all(map(_WORDNET.fullmatch, names)) and not all(numbered):
        raise DataError(
            f"{folder} has 1000 class folders ({names[0]}, {names[1]}, ...) that are neither "
            "WordNet's ids (n01440764, ...) nor 0000 to 0999, so ImageNet's class names would be "
            "put on them in the wrong order. Rename them, or add classnames.json and templates.json"
        )


def _refuse_unpadded(folder: Path, names: Sequence[str]) -> None:
    """Raise DataError for numbers as names whose order as texts is another."""
    if all(name.isdecimal() for name in names):
        swapped = [(a, b) for a, b in pairwise(names) if int(a) > int(b)]
        if swapped:
            raise DataError(
                f"{folder}: class folders count in the order of their names as texts, in which "
                f"{swapped[0][0]} comes before {swapped[0][1]}. Pad the numbers with zeros "
                f"({int(names[0]):0{max(map(len, names))}d}, ...)"
            )
