"""Text written by a person: YAML and CSV with the lines of values, and problems told by line."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ablate.errors import AblateError, StudyError, suggest

_MOST_BYTES = 2**30
_MAX_NODES = 100_000  # an alias bomb expands far beyond any study a person would write


class Problems:
    """Collects what is wrong, and tells it all at once with the line of each place."""

    def __init__(
        self, path: str, lines: Mapping[tuple[Any, ...], int], *, tags: Iterable[str] = ()
    ) -> None:
        self._path = path
        self._lines = lines
        self._tags = frozenset(tags)  # names of union branches, which are no places
        self._found: list[tuple[int, str, tuple[Any, ...]]] = []

    def add(self, place: tuple[Any, ...], message: str) -> None:
        self._found.append((self._line(place), f"{dotted(place)}: {message}", place))

    def at(self, place: tuple[Any, ...]) -> bool:
        return any(found[: len(place)] == place for _, _, found in self._found)

    def add_validation(
        self, error: ValidationError, place: tuple[Any, ...], model: type[BaseModel]
    ) -> None:
        for item in error.errors(include_url=False):
            loc = tuple(part for part in item["loc"] if not self._is_tag(part))
            where = (*place, *loc)
            if item["type"] == "extra_forbidden":
                fields = _fields_at(model, loc[:-1])
                message = f"unknown key {str(loc[-1])!r}; {suggest(str(loc[-1]), fields)}"
            elif item["type"] == "missing":
                message = f"is missing; add {dotted(where)}: ..."
            elif item["type"] == "value_error":
                message = str(item["ctx"]["error"])
            else:
                message = f"{_lower(item['msg'])}, not {_short(item['input'])}"
            self.add(where, message)

    def raise_if_any(self) -> None:
        if self._found:
            raise self.error()

    def error(self) -> StudyError:
        ordered = sorted(dict.fromkeys((line, text) for line, text, _ in self._found))
        return StudyError("\n".join(f"{self._path}:{line}: {text}" for line, text in ordered))

    def _is_tag(self, part: object) -> bool:
        return isinstance(part, str) and (part in self._tags or "[" in part)

    def _line(self, place: tuple[Any, ...]) -> int:
        for length in range(len(place), -1, -1):
            if place[:length] in self._lines:
                return self._lines[place[:length]]
        return 1


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


def dotted(place: tuple[Any, ...]) -> str:
    """A place in a file as a person writes it: ``factors.lr[1]``."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else str(part))
    return text or "study"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: 1e-3 is a number, and only true and false are booleans."""

    yaml_implicit_resolvers: dict[str, Any] = {}


for _first, _rules in yaml.SafeLoader.yaml_implicit_resolvers.items():
    _Loader.yaml_implicit_resolvers[_first] = [
        (tag, pattern)
        for tag, pattern in _rules
        if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    ]
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|nan)$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, path: str) -> tuple[Any, dict[tuple[Any, ...], int]]:
    """The content of a YAML text and the line of each place in it.

    A place is the tuple of keys and indices that leads to it. Keys that stand twice, deep nesting
    and alias bombs are refused.

    Raises:
        StudyError: the text is not YAML, or no mapping; starts with ``path:line:``.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise StudyError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise StudyError(f"{path}:1: not valid YAML: {error}") from None
    if not isinstance(node, yaml.MappingNode):
        raise StudyError(f"{path}:1: a study file is a mapping with recipe, baseline, factors, ...")
    lines: dict[tuple[Any, ...], int] = {}
    for count, (place, line) in enumerate(_walk(node, (), path)):
        if count > _MAX_NODES:
            raise StudyError(f"{path}:1: more than {_MAX_NODES} values; this is no study")
        lines[place] = line
    try:
        return _Loader("").construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise StudyError(f"{path}:{line}: not valid YAML: {error.problem}") from None


def _walk(
    node: yaml.Node, place: tuple[Any, ...], path: str
) -> Iterator[tuple[tuple[Any, ...], int]]:
    if len(place) > 20:
        raise StudyError(f"{path}:{node.start_mark.line + 1}: nested too deeply")
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = key.value
            if name in seen:
                raise StudyError(
                    f"{path}:{key.start_mark.line + 1}: {dotted((*place, name))}: "
                    "the key stands here a second time; keep one"
                )
            seen.add(name)
            yield (*place, name), key.start_mark.line + 1
            yield from _walk(value, (*place, name), path)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*place, index), value.start_mark.line + 1
            yield from _walk(value, (*place, index), path)


def read_text(path: Path, *, error: type[AblateError], errors: str = "strict") -> str:
    """The text of a file that a person gave; raises `error` for what is no text of theirs."""
    try:
        if path.exists() and not path.is_file():
            raise error(f"{path} is no file that can be read whole; give a file")
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise error(
                f"{path} has {size / 2**30:.1f} GiB, more than the {_MOST_BYTES / 2**30:g} GiB "
                "that are read; give the needed columns, or every tenth line"
            )
        return path.read_text(encoding="utf-8-sig", errors=errors)
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise error(f"{path}: is not UTF-8 text; save it as CSV UTF-8") from None


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
