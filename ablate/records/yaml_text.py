"""YAML 1.2 as people write it: plain values, each with its line and the text that stands there.

PyYAML reads the text into nodes; which text is a number is decided here, by the core schema of
YAML 1.2 (https://yaml.org/spec/1.2.2/#1032-tag-resolution): 010 is ten, 1:30 and 2026-01-01 are
text, 1e-3 is a number, and only true and false are booleans.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from ablate.errors import StudyError
from ablate.records.names import find_odd, look_of

_MAX_NODES = 100_000  # an alias bomb expands far beyond any study a person would write
_MAX_DEPTH = 20
_MAX_DIGITS = 4000
"""Python itself reads no longer number."""

_MAX_SHOWN = 60

_CORE = "tag:yaml.org,2002:"
_SHAPES = {
    "null": (re.compile(r"^(?:null|Null|NULL|~|)$"), ["n", "N", "~", ""]),
    "bool": (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    "int": (re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    "float": (
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+0123456789."),
    ),
    "merge": (re.compile(r"^<<$"), ["<"]),
}
_TEMPLATE = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|<%.*?%>|\$\{[^}]*\}")

Place = tuple[Any, ...]
"""The keys and indices that lead to a value."""


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a value stands, and how it is spelt there."""

    line: int
    written: str | None
    """None for mappings and lists."""


class _Loader(yaml.SafeLoader):
    """Resolves plain scalars by the core schema."""

    yaml_implicit_resolvers: dict[str, Any] = {}


for _name, (_pattern, _first) in _SHAPES.items():
    _Loader.add_implicit_resolver(_CORE + _name, _pattern, _first)


def parse_yaml(text: str, path: str) -> tuple[dict[str, Any], dict[Place, Spot]]:
    """The content of a YAML text, keys as they are spelt, and the spot of each place in it.

    Refused are equal keys however they are spelt, keys that are no text, tags that would build
    more than plain values, templates that were not filled in, deep nesting and alias bombs.

    Raises:
        StudyError: the text is not YAML, or no mapping; starts with ``path:line:``.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except RecursionError:
        raise _refuse(path, 1, "nested too deeply") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _refuse(
            path, line, f"not valid YAML: the character U+{ord(text[error.position]):04X} cannot "
            "stand in a text; remove it",
        ) from None  # fmt: skip
    except yaml.MarkedYAMLError as error:
        raise _refuse(path, *_explain(error, text)) from None
    if not isinstance(node, yaml.MappingNode):
        what = "the file holds nothing" if node is None else f"this is {_kind(node)}"
        raise _refuse(
            path, 1, f"{what}; a study file is a mapping with recipe, baseline, factors, ..."
        )
    spots: dict[Place, Spot] = {}
    for count, (place, spot) in enumerate(_walk(node, (), path)):
        if count > _MAX_NODES:
            raise _refuse(path, 1, f"more than {_MAX_NODES} values; this is no study")
        spots[place] = spot
    return _mapping(node, path), spots


def name_template(text: str) -> str | None:
    """The part of a text that a template program should have replaced; None without one."""
    found = _TEMPLATE.search(text)
    return found.group() if found else None


def dotted(place: Place) -> str:
    """A place in a file as a person writes it: ``factors.lr[1]``."""
    text = ""
    for part in place:
        if isinstance(part, int):
            text += f"[{part}]"
            continue
        name = str(part) if find_odd(str(part)) is None else ascii(part)  # never to a terminal
        name = name if len(name) <= _MAX_SHOWN else f"{name[: _MAX_SHOWN - 3]}..."
        text += f".{name}" if text else name
    return text or "study"


def _refuse(path: str, line: int, why: str) -> StudyError:
    return StudyError(f"{path}:{line}: {why}")


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    return "a list" if isinstance(node, yaml.SequenceNode) else "plain text"


def _explain(error: yaml.MarkedYAMLError, text: str) -> tuple[int, str]:
    """The line and the reason of what is no YAML, with the likely cause where one is seen."""
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    rows = text.splitlines() or [""]
    for number in range(max(line - 1, 1), min(line, len(rows)) + 1):
        row = rows[number - 1]
        odd = find_odd(row.replace("\t", " "))
        if odd is not None:
            return number, f"not valid YAML: the line holds {odd}; write a plain blank, or nothing"
        template = name_template(row)
        if template is not None:
            return number, f"{template} looks like a template that was not filled in"
    if error.problem == "but found another document":
        return line, "a second document begins here; a study file holds one"
    advice = "; indent with blanks, not with tabs" if "'\\t'" in str(error.problem) else ""
    return line, f"not valid YAML: {error.problem}{advice}"


def _walk(node: yaml.Node, place: Place, path: str) -> Iterator[tuple[Place, Spot]]:
    """Every place below a node; refuses what no study may hold."""
    if len(place) > _MAX_DEPTH:
        raise _refuse(path, _line(node), "nested too deeply")
    if isinstance(node, yaml.MappingNode):
        _refuse_tag(node, path, "map")
        seen: dict[Any, str] = {}
        for key, value in node.value:
            name = _name_key(key, place, path)
            same = _comparable(key, path)
            if same in seen:
                first = seen[same]
                spelt = f" (above it is spelt {ascii(first)})" if first != name else ""
                raise _refuse(
                    path,
                    _line(key),
                    f"{dotted((*place, name))}: the key stands here a second time{spelt}; keep one",
                )
            seen[same] = name
            yield (*place, name), Spot(_line(key), _written(value, path))
            yield from _walk(value, (*place, name), path)
    elif isinstance(node, yaml.SequenceNode):
        _refuse_tag(node, path, "seq")
        for index, value in enumerate(node.value):
            yield (*place, index), Spot(_line(value), _written(value, path))
            yield from _walk(value, (*place, index), path)


def _refuse_tag(node: yaml.Node, path: str, *allowed: str) -> None:
    if node.tag == "!" or node.tag in {_CORE + name for name in allowed}:
        return
    short = node.tag.replace(_CORE, "!!")
    raise _refuse(
        path, _line(node), f"the tag {short} is not read; write the plain value without it"
    )


def _name_key(key: yaml.Node, place: Place, path: str) -> str:
    if isinstance(key, yaml.ScalarNode):
        return _text(key, path)
    template = isinstance(key, yaml.MappingNode) and key.flow_style
    hint = "; {{ ... }} looks like a template that was not filled in" if template else ""
    where = f"{dotted(place)}: " if place else ""
    raise _refuse(path, _line(key), f"{where}a key must be plain text, not {_kind(key)}{hint}")


def _comparable(key: yaml.ScalarNode, path: str) -> Any:
    """Equal for keys that a reader would take for one: 1 and 1.0, accents however composed, and
    letters of other alphabets that look alike."""
    value = _scalar(key, path)
    if isinstance(value, str):
        return look_of(unicodedata.normalize("NFC", value))
    return (type(value) is bool, value)


def _written(node: yaml.Node, path: str) -> str | None:
    return _text(node, path) if isinstance(node, yaml.ScalarNode) else None


def _text(node: yaml.ScalarNode, path: str) -> str:
    """What is spelt, with characters that JSON escapes in two halves put together."""
    try:
        return str(node.value).encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise _refuse(path, _line(node), "an escape \\uD8.. stands for half a character") from None


def _value(node: yaml.Node, path: str) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, path) for item in node.value]
    assert isinstance(node, yaml.ScalarNode)
    return _scalar(node, path)


def _mapping(node: yaml.MappingNode, path: str) -> dict[str, Any]:
    """What is merged in first, so that the mapping's own values win."""
    merged: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for key, value in node.value:
        if key.tag == _CORE + "merge":
            for source in reversed(_sources(value, path)):  # of several the first counts
                merged.update(_mapping(source, path))
        else:
            own[_text(key, path)] = _value(value, path)
    return {**merged, **own}


def _sources(node: yaml.Node, path: str) -> list[yaml.MappingNode]:
    listed = node.value if isinstance(node, yaml.SequenceNode) else [node]
    for item in listed:
        if not isinstance(item, yaml.MappingNode):
            raise _refuse(
                path, _line(item), f"<< merges a mapping, or a list of mappings, not {_kind(item)}"
            )
    return list(listed)


def _scalar(node: yaml.ScalarNode, path: str) -> Any:
    """The value of a scalar; refuses tags of other kinds and text that does not fit its tag."""
    _refuse_tag(node, path, "null", "bool", "int", "float", "merge", "str")
    kind, text = node.tag.removeprefix(_CORE), _text(node, path)
    if kind in ("!", "str", "merge"):
        return text
    fits = _SHAPES[kind][0].match(text) or (kind == "float" and _SHAPES["int"][0].match(text))
    if not fits or len(text) > _MAX_DIGITS:
        given = repr(text) if len(text) <= _MAX_DIGITS else f"a number of {len(text)} digits"
        raise _refuse(path, _line(node), f"{given} is no {kind} that can be read")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text, base)
    digits = text.lower().replace(".inf", "inf").replace(".nan", "nan")
    return float(int(text, 0)) if text[:2] in ("0o", "0x") else float(digits)


def drop_notes(content: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping without its ``x-...`` keys: a home for anchors and notes, which is not read."""
    return {key: value for key, value in content.items() if not key.startswith("x-")}
