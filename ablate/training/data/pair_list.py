"""A list of pictures and captions, as open_clip_train's ``--dataset-type csv`` reads it, packed
into WebDataset shards.

::

    filepath<tab>title
    images/0.jpg<tab>a dog on a beach
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from ablate.errors import DataError, suggest
from ablate.records.source import open_text
from ablate.training.data.shard_scan import IMAGE_TYPES
from ablate.training.data.shard_write import Sample, write_shard
from ablate.words import counted

SEPARATORS = "\t;|,"
"""In this order: captions hold commas."""

Pair = tuple[Path, str]


def read_pairs(path: Path, *, image: str = "filepath", caption: str = "title") -> list[Pair]:
    """(picture, caption) of every row; a relative path starts from the working folder, as
    open_clip_train takes it, or from the list's own where the first picture lies there.

    Raises:
        DataError: the list cannot be read, lacks a column or pairs, or names pictures that are not
            there.
    """
    rows = _rows(path)
    names = next(rows, (0, []))[1]
    for name in (image, caption):
        if name not in names:
            raise DataError(
                f"{path}: its first line names no column {name!r}; say which is which with --image "
                f"and --caption. {suggest(name, names)}"
            )
    found: list[tuple[str, str]] = []
    for line, row in rows:
        if len(row) != len(names):
            raise DataError(
                f"{path}:{line}: {len(row)} columns where the first line names {len(names)}"
            )
        found.append((row[names.index(image)], row[names.index(caption)]))
    if not found:
        raise DataError(f"{path}: no pairs below its line of names")
    beside = (path.parent / found[0][0]).is_file() and not Path(found[0][0]).is_file()
    root = path.parent if beside else Path()
    pairs = [(root / name, text) for name, text in found]
    _check_pictures(path, [picture for picture, _ in pairs])
    return pairs


def pack(
    pairs: list[Pair],
    folder: Path,
    *,
    per_shard: int,
    on_shard: Callable[[int, int], None] | None = None,
) -> str:
    """Write the pairs into shards of `per_shard` and return their pattern, for `train_data`.

    Pictures are copied as they are. Lists are often sorted, and a run mixes neighbouring shards
    only: the pairs are mixed once, the same way every time.

    Raises:
        DataError: the folder holds other shards.
    """
    mixed = list(enumerate(pairs))
    random.Random(0).shuffle(mixed)
    starts = range(0, len(mixed), per_shard)
    names = [f"{number:05d}.tar" for number in range(len(starts))]
    folder.mkdir(parents=True, exist_ok=True)
    if others := sorted({path.name for path in folder.glob("*.tar")} - set(names)):
        raise DataError(
            f"{folder} holds {counted(len(others), 'shard')} that would be none of these, the "
            f"first {others[0]}; give a folder of their own"
        )
    for number, (name, start) in enumerate(zip(names, starts, strict=True), start=1):
        write_shard(folder / name, map(_sample, mixed[start : start + per_shard]))
        if on_shard is not None:
            on_shard(number, len(names))
    return str(folder / (f"{{00000..{len(names) - 1:05d}}}.tar" if names[1:] else names[0]))


def _sample(numbered: tuple[int, Pair]) -> Sample:
    number, (picture, text) = numbered
    return Sample(
        f"{number:09d}", picture.read_bytes(), text, image_type=picture.suffix[1:].lower()
    )


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(number of its last line, columns) of each row, empty ones left out.

    A lone quote in a list with tabs is a character of a caption: read as a quote it would swallow
    the rows that follow, as it does in pandas.
    """
    try:
        with open_text(path, error=DataError, newline="") as file:
            first = file.readline()
            file.seek(0)
            separator = next((mark for mark in SEPARATORS if mark in first), ",")
            plain = separator == "\t"
            reader = csv.reader(
                file,
                delimiter=separator,
                quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL,
                strict=True,
            )
            for row in reader:
                if row:
                    yield reader.line_num, [_unquoted(text) for text in row] if plain else row
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.object[error.start]:#04x}); write it anew as UTF-8"
        ) from None
    except csv.Error as error:
        raise DataError(
            f"{path}:{reader.line_num}: {error}: a quote before it is not closed"
        ) from None


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] == '"':
        return text[1:-1].replace('""', '"')
    return text


def _check_pictures(path: Path, pictures: list[Path]) -> None:
    if links := [picture for picture in pictures if ":/" in str(picture)]:
        raise DataError(
            f"{path}: {links[0].name} is a link. img2dataset downloads such a list into shards; "
            "ablate data cc3m shows its line"
        )
    kinds = {picture.suffix.lower() for picture in pictures}
    if others := sorted(kinds - {f".{kind}" for kind in IMAGE_TYPES}):
        raise DataError(
            f"{path}: pictures that end in {', '.join(map(repr, others[:3]))}; shards hold "
            f".{', .'.join(IMAGE_TYPES)}"
        )
    if gone := [picture for picture in pictures if not picture.is_file()]:
        raise DataError(
            f"{path}: {len(gone)} of {len(pictures)} pictures are not there, the first: {gone[0]}. "
            "Take their lines out, or run this where the pictures are"
        )
