"""Class names, prompt templates and class folders of labelled images."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ablate.datasets.shard_names import expand_shards
from ablate.errors import DataError

if TYPE_CHECKING:
    pass


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
    else ImageNet's, for which there must be 1000 class folders (of shards that is checked when
    they are read). Templates are None for ImageNet's 80.

    Raises:
        DataError: names and folders do not match.
    """
    shards = str(data).endswith(".tar")
    folder = Path(expand_shards(str(data))[0]).parent if shards else Path(data)
    num_classes = None if shards else len(class_folders(folder))
    names_file, templates_file = folder / "classnames.json", folder / "templates.json"
    if names_file.exists() != templates_file.exists():
        missing = templates_file if names_file.exists() else names_file
        raise DataError(f"{missing} is missing: classnames.json and templates.json go together")
    if not names_file.exists():
        if num_classes not in (None, 1000):
            raise DataError(
                f"{folder} has {num_classes} classes and no classnames.json, and open_clip's "
                "ImageNet names are for 1000. Add classnames.json and templates.json to it"
            )
        return [], None
    names = json.loads(names_file.read_text(encoding="utf-8"))
    templates = json.loads(templates_file.read_text(encoding="utf-8"))
    if num_classes not in (None, len(names)):
        raise DataError(f"{names_file} names {len(names)} classes, {folder} has {num_classes}")
    if not templates or not all("{}" in template for template in templates):
        raise DataError(f"{templates_file} must list texts that hold {{}} for the class name")
    return names, templates
