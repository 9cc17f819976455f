"""ImageNet as class folders: sorted, counted, and named as open_clip names its classes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from ablate.errors import DataError
from ablate.training.data.image_source import list_images
from ablate.trial.recipe import Prepared

CLASSES = 1000
SETS = {50_000: "validation", 1_281_167: "training"}
"""Images of each part (Russakovsky et al. 2015, arXiv 1409.0575, table 2)."""
EACH = {"validation": (50, 50), "training": (732, 1300)}
"""Least and most images of a class, of each part (the same)."""
_ROW = re.compile(r"(ILSVRC2012_val_\d{8})\S*?[\s,]+(n\d{8})")
_WORDNET = re.compile(r"n\d{8}")
_SHOWN = 3


def data_sets() -> dict[str, Callable[..., Prepared]]:
    """What ``ablate data`` prepares for this recipe."""
    return {"imagenet": prepare}


def prepare(
    folder: Path,
    *,
    labels: Path | None = None,
    classes: int = CLASSES,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Prepared:
    """Check class folders of ImageNet, and write ``synsets.json``.

    `labels`: of a validation set that lies flat, a text that names image and synset in a line
    (LOC_val_solution.csv, valprep.sh); its images are sorted into class folders first. `classes`:
    how many there should be, for parts such as ImageNet-100.

    Raises:
        DataError: no class folders, and no labels to make them by.
    """
    if labels is not None:
        _sort(folder, labels)
    found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not found:
        raise DataError(
            f"{folder} holds no class folders. Of a flat validation set give the labels, e.g. "
            "--labels LOC_val_solution.csv"
        )
    paths, numbers, synsets = list_images(folder)
    problems = _count(paths, [int(n) for n in numbers], synsets, classes)
    problems += _unreadable(paths, tell)
    size = sum(path.stat().st_size for path in paths)
    whole = classes == CLASSES and len(synsets) == CLASSES
    if whole and all(map(_WORDNET.fullmatch, synsets)):
        (folder / "synsets.json").write_text(_names(synsets), encoding="utf-8")
    part = SETS.get(len(paths), "") if whole else ""
    return Prepared(
        facts={
            "images": f"{len(paths):,}" + (f", the {part} set" if part else ""),
            "classes": f"{len(synsets):,}",
            "size": f"{size / 2**30:.2f} GiB",
        },
        problems=tuple(problems),
    )


def _sort(folder: Path, labels: Path) -> None:
    """Move flat images into folders of their synsets."""
    text = labels.read_text(encoding="utf-8", errors="replace")
    synset_of = dict(_ROW.findall(text))
    if not synset_of:
        raise DataError(
            f"{labels} names no image with its synset; a line is such as "
            "ILSVRC2012_val_00000001.JPEG n01751748"
        )
    for path in sorted(folder.glob("ILSVRC2012_val_*")):
        synset = synset_of.get(path.name.split(".")[0])
        if synset is None:
            raise DataError(f"{labels} does not name {path.name}; it is of another set")
        (folder / synset).mkdir(exist_ok=True)
        path.rename(folder / synset / path.name)


def _count(
    paths: list[Path], numbers: list[int], synsets: tuple[str, ...], classes: int
) -> list[str]:
    problems = []
    if len(synsets) != classes:
        problems.append(f"there are {len(synsets)} class folders, and should be {classes}")
    odd = [name for name in synsets if not _WORDNET.fullmatch(name)]
    if odd:
        problems.append(
            f"{len(odd)} folders are not called after their synset (n01440764, ...), e.g. "
            f"{', '.join(odd[:_SHOWN])}: names of classes would be put on the wrong ones"
        )
    if classes != CLASSES:
        return problems
    if len(paths) not in SETS:
        wanted = " or ".join(f"{number:,} ({part})" for number, part in SETS.items())
        problems.append(f"there are {len(paths):,} images, and should be {wanted}")
    part = "training" if len(paths) > 10 * 50_000 else "validation"
    low, high = EACH[part]
    counts = [0] * len(synsets)
    for number in numbers:
        counts[number] += 1
    wrong = [
        f"{name} ({count})"
        for name, count in zip(synsets, counts, strict=True)
        if not low <= count <= high
    ]
    if wrong:
        each = f"{low}" if low == high else f"{low} to {high}"
        problems.append(
            f"{len(wrong)} classes do not have {each} images: {', '.join(wrong[:_SHOWN])}"
        )
    return problems


def _unreadable(paths: list[Path], tell: Callable[[int, int], None]) -> list[str]:
    bad = []
    for done, path in enumerate(paths, start=1):
        try:
            with Image.open(path) as image:
                side = min(image.size)
            if not side or path.stat().st_size < 100:
                raise OSError("empty")
        except OSError:
            bad.append(path.name)
        if done % 500 == 0 or done == len(paths):
            tell(done, len(paths))
    if not bad:
        return []
    return [f"{len(bad)} files are no images: {', '.join(bad[:_SHOWN])}"]


def _names(synsets: tuple[str, ...]) -> str:
    """Synset -> its number and the name that a prompt says."""
    from open_clip import IMAGENET_CLASSNAMES

    named = {
        synset: {"number": number, "name": IMAGENET_CLASSNAMES[number]}
        for number, synset in enumerate(synsets)
    }
    return json.dumps(named, indent=1, ensure_ascii=False) + "\n"
