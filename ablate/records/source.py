"""Text written by a person: problems told by line, files and CSV."""

from __future__ import annotations

import contextlib
import csv
import io
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from pydantic import BaseModel, ValidationError

from ablate.errors import AblateError, StudyError, suggest
from ablate.records.names import find_alike
from ablate.records.yaml_text import Place, Spot, dotted, name_template

_MOST_BYTES = 2**30
_PACKED = "packed ({}); unpack it, and give the file that it holds"
_BOOK = "no text but {}; save the table in it as CSV"
_KINDS = {
    b"\x1f\x8b": _PACKED.format("gzip"),
    b"BZh": _PACKED.format("bzip2"),
    b"\xfd7zXZ": _PACKED.format("xz"),
    b"(\xb5/\xfd": _PACKED.format("zstd"),
    b"PK\x03\x04": "packed (zip) or a workbook; unpack it, or save the table in it as CSV",
    b"\xd0\xcf\x11\xe0": _BOOK.format("a workbook of Excel's"),
    b"PAR1": _BOOK.format("a parquet file"),
    b"ARROW1": _BOOK.format("a Feather file"),
    b"\x93NUMPY": _BOOK.format("an array of NumPy's"),
    b"\x89HDF": _BOOK.format("an HDF5 file"),
    b"\x80\x04": _BOOK.format("a pickle"),
    b"\x80\x05": _BOOK.format("a pickle"),
    b"SQLite format 3": _BOOK.format("an SQLite database"),
}
"""First bytes of what is brought in place of text, and what to do with it."""
_NOTHING = ("none", "nil", "na", "n/a", "undefined")
_QUOTES = "\u2018\u2019\u201c\u201d\u201e\u00ab"
_WANTED = {"dict_type": "write a mapping, NAME: ..."}
"""In place of what the validator calls it."""


class Problems:
    """Collects what is wrong, and tells it all at once with the line of each place."""

    def __init__(self, path: str, spots: Mapping[Place, Spot], *, tags: Iterable[str] = ()) -> None:
        self._path = path
        self._spots = spots
        self._tags = frozenset(tags)  # names of union branches, which are no places
        self._found: list[tuple[int, str, Place]] = []

    def add(self, place: Place, message: str) -> None:
        self._found.append((self._line(place), f"{dotted(place)}: {message}", place))

    def at(self, place: Place) -> bool:
        return any(found[: len(place)] == place for _, _, found in self._found)

    def add_validation(self, error: ValidationError, place: Place, model: type[BaseModel]) -> None:
        for item in error.errors(include_url=False):
            is_key = item["type"] == "extra_forbidden"
            key = item["loc"][-1:] if is_key else ()  # the file's own, also where it is like a tag
            loc = tuple(part for part in item["loc"] if part in key or not self._is_tag(part))
            where = (*place, *loc)
            if is_key:
                name, elsewhere = str(loc[-1]), getattr(model, "ELSEWHERE", {})
                advice = elsewhere.get(name) if len(loc) == 1 else None
                known = _fields_at(model, loc[:-1])
                alike = find_alike(name)
                message = f"unknown key {name!r}; {advice or suggest(name, known)}"
                message += f"; it holds {alike}" if alike else ""
            elif item["type"] == "missing":
                message = f"is missing; add {dotted(where)}: ..."
            elif item["type"] == "value_error":
                message = str(item["ctx"]["error"])
            elif item["type"] == "too_short":
                message = f"is empty; write at least {item['ctx']['min_length']}"
            else:
                given = item["input"]
                shown = _short(given) if isinstance(given, str) else self._spelt(where, given)
                advice = _advise(item["type"], given, shown)
                wanted = _WANTED.get(item["type"]) or _lower(item["msg"])
                message = f"{wanted}, not {shown}{advice}"
            self.add(where, message)

    def raise_if_any(self) -> None:
        if self._found:
            raise self.error()

    def error(self) -> StudyError:
        ordered = sorted(dict.fromkeys((line, text) for line, text, _ in self._found))
        return StudyError("\n".join(f"{self._path}:{line}: {text}" for line, text in ordered))

    def _is_tag(self, part: object) -> bool:
        return isinstance(part, str) and (
            part in self._tags or "[" in part or part.startswith("constrained-")
        )

    def _line(self, place: Place) -> int:
        spot = self._spot(place)
        return spot.line if spot else 1

    def _spelt(self, place: Place, value: Any) -> str:
        """A value as it stands in the file: 0123, and not the 123 that it is read as."""
        spot = None if isinstance(value, (Mapping, list, tuple)) else self._spot(place)
        return spot.written if spot and spot.written else _short(value)

    def _spot(self, place: Place) -> Spot | None:
        """That of the place, or of what it stands in."""
        for length in range(len(place), 0, -1):
            if place[:length] in self._spots:
                return self._spots[place[:length]]
        return None


def _advise(kind: str, given: Any, shown: str) -> str:
    """What to write instead of a plain value of another kind."""
    if kind == "string_type" and isinstance(given, (bool, int, float)):
        return f"; put it in quotes: '{shown}'"
    if not isinstance(given, str):
        return ""
    text = given.strip()
    if template := name_template(text):
        return f"; {template} looks like a template that was not filled in"
    if text.lower() in _NOTHING:
        return "; write null where none is meant"
    if re.fullmatch(r"[-+]?\d+(?:\.\d*)?\s*%", text):
        return f"; write {float(text.rstrip('% ')) / 100:g}"
    if alike := find_alike(text):
        return f"; it holds {alike}"
    if text[:1] in _QUOTES:
        return "; write straight quotes, or none"
    return ""


def _fields_at(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    """Names of the fields of the model that stands at `loc` inside `model`."""
    schema = model.model_json_schema()
    node: Any = schema
    for part in loc:
        node = node.get("properties", {}).get(part, {})
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    if "properties" not in node:  # a union of designs: all their options
        named = [schema["$defs"][ref] for ref in schema.get("$defs", {})]
        return sorted({name for item in named for name in item.get("properties", {})})
    return list(node["properties"])


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@contextlib.contextmanager
def open_text(
    path: Path, *, error: type[AblateError], errors: str = "strict", newline: str | None = None
) -> Iterator[TextIO]:
    """A file that a person gave, opened as the text that it is; raises `error` for what is none."""
    try:
        if path.exists() and not path.is_file():
            raise error(f"{path} is no file that can be read whole; give a file")
        with path.open("rb") as file:
            begin = file.read(max(map(len, _KINDS)))
        if kind := next((kind for mark, kind in _KINDS.items() if begin.startswith(mark)), None):
            raise error(f"{path} is {kind}")
        wide = begin.startswith((b"\xff\xfe", b"\xfe\xff"))  # Excel's, and a redirect of PowerShell
        encoding = "utf-16" if wide else "utf-8-sig"
        with path.open(encoding=encoding, errors=errors, newline=newline) as text:
            yield text
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror}); check the path") from None


def read_text(path: Path, *, error: type[AblateError], errors: str = "strict") -> str:
    """The whole text of such a file; raises `error` where it is too much, or not UTF-8."""
    with open_text(path, error=error, errors=errors) as file:
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise error(
                f"{path} has {size / 2**30:.1f} GiB, more than the {_MOST_BYTES / 2**30:g} GiB "
                "that are read; give the needed columns, or every tenth line"
            )
        try:
            return file.read()
        except UnicodeDecodeError:
            raise error(f"{path}: is not UTF-8 text; save it as CSV UTF-8") from None


def at_header(text: str, *, delimiters: str = ",;\t") -> tuple[str, str, str]:
    """A table's text with blank lines in place of what stands before its header, so that lines
    keep their numbers; the header; and what divides its columns.

    Comments before the header are left out (NumPy's header is one itself, and stays), and so is
    Excel's ``sep=;``.
    """
    lines = text.split("\n")
    at = next((k for k, line in enumerate(lines) if line.strip()), 0)
    said = re.fullmatch(r"sep=(.)\s*", lines[at])
    end = at + 1 if said else at
    while end < len(lines) and lines[end].startswith("#"):
        end += 1
    if end > at and end < len(lines) and re.match(r"\s*[-+.\d]", lines[end]):
        end -= 1
        lines[end] = lines[end].lstrip("# ")
    lines[at:end] = [""] * (end - at)
    header = lines[end] if end < len(lines) else ""
    divides = max(delimiters, key=lambda mark: (header.count(mark), mark == ","))
    return "\n".join(lines), header, said[1] if said else divides


def read_csv(
    text: str, path: Path, *, error: type[AblateError], delimiter: str = ","
) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of the lines that are not empty; raises `error` with the line."""
    reader = csv.reader(io.StringIO(text), delimiter=delimiter)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield reader.line_num, cells
    except csv.Error as problem:
        raise error(
            f"{path}:{reader.line_num}: no line of a CSV ({problem}); look for a quote that is "
            "never closed"
        ) from None


def sqlite_tables(path: str | Path) -> frozenset[str]:
    """Names of the tables of an SQLite file, which is only read; none where it is no such file."""
    file = Path(path).absolute()
    if not file.is_file():
        return frozenset()
    try:
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as store:
            rows = store.execute("select name from sqlite_master where type = 'table'").fetchall()
    except sqlite3.DatabaseError:
        return frozenset()
    return frozenset(name for (name,) in rows)
