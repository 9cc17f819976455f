"""Names of shards: brace patterns and lists, as open_clip_train's --train-data takes them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path

from ablate.errors import DataError

MAX_SHARDS = 300_000
"""A pattern that gives more is a slip of the keyboard (LAION-2B has 231,349)."""

_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*):")
_GLOB = re.compile(r"[*?]")
_GLUED = re.compile(r"\.tar[\s,;]+\S")
_RANGE = re.compile(r"(-?\d+|[A-Za-z])\.\.(-?\d+|[A-Za-z])(?:\.\.(-?\d+))?")


def expand_shards(pattern: str, *, root: Path | None = None) -> list[str]:
    """All shard paths of a pattern like ``a/{000..575}.tar::b/{x,y}.tar``, as the shell expands it.

    Relative paths are taken from `root`. Only local files can be indexed; `pipe:` (which the
    webdataset library runs as a shell command) and other schemes raise DataError.
    """
    paths = [os.path.expanduser(name) for name in _names(pattern)]
    paths = paths if root is None else [os.path.join(root, path) for path in paths]
    for path in paths:
        _refuse_glob(path)
    return paths


@lru_cache(maxsize=4)  # a plan asks for each cell
def _names(pattern: str) -> tuple[str, ...]:
    parts = pattern.split("::")
    if not all(parts):
        raise DataError(f"the shard list {pattern!r} has an empty part; expected a::b")
    names = tuple(islice((name for part in parts for name in _expand_braces(part)), MAX_SHARDS + 1))
    if len(names) > MAX_SHARDS:
        raise DataError(f"the shard list {pattern!r} gives more than {MAX_SHARDS:,} names")
    for name in names:
        _refuse_scheme(name)
    return names


def _refuse_glob(path: str) -> None:
    """What a shell would expand, or take for two names."""
    glued = _GLUED.search(path)
    if glued is None and not _GLOB.search(path) or os.path.exists(path):
        return
    if glued is not None:
        raise DataError(
            f"{path!r} names several shards in one: join them with ::, as in a.tar::b.tar"
        )
    raise DataError(
        f"{path!r}: * and ? are not expanded, so that a missing shard is noticed; write the range, "
        "as in {00000..00575}.tar"
    )


def _refuse_scheme(path: str) -> None:
    scheme = _SCHEME.match(path)
    if scheme is None:
        return
    if scheme[1].lower() == "pipe":
        raise DataError(
            f"{path!r} would run a shell command for every shard, which is refused; "
            "copy the shards to a local or mounted folder and give its path"
        )
    raise DataError(
        f"{path!r}: shards are read from local or mounted folders only, not from "
        f"{scheme[1]}:; give a plain path (a local name with a colon starts with ./)"
    )


def _expand_braces(text: str) -> Iterator[str]:
    """{a,b}, {01..12}, {a..e}, {0..10..2}, nested; braces that are neither stay as they are."""
    group = _first_group(text)
    if group is None:
        yield text
        return
    start, end, options = group
    for option in options:
        for rest in _expand_braces(text[end:]):
            yield text[:start] + option + rest


def _first_group(text: str) -> tuple[int, int, Iterable[str]] | None:
    """(start, end, expanded options) of the first outermost pair of braces that means something."""
    for start in (match.start() for match in re.finditer(r"\{", text)):
        depth, commas = 0, []
        for place in range(start, len(text)):
            char = text[place]
            depth += (char == "{") - (char == "}")
            if char == "," and depth == 1:
                commas.append(place)
            if depth == 0:
                inner = text[start + 1 : place]
                if commas:
                    edges = [start, *commas, place]
                    parts = [text[a + 1 : b] for a, b in zip(edges, edges[1:], strict=False)]
                    return start, place + 1, (o for part in parts for o in _expand_braces(part))
                numbers = _expand_range(inner)
                if numbers is not None:
                    return start, place + 1, numbers
                break
    return None


def _expand_range(text: str) -> Iterable[str] | None:
    match = _RANGE.fullmatch(text)
    if match is None:
        return None
    first, last, step = match.groups()
    if first.lstrip("-").isdigit() != last.lstrip("-").isdigit():
        return None
    stride = abs(int(step or 1)) or 1
    if not first.lstrip("-").isdigit():
        return (chr(code) for code in _inclusive(ord(first), ord(last), stride))
    padded = any(len(n.lstrip("-")) > 1 and n.lstrip("-")[0] == "0" for n in (first, last))
    width = max(len(first), len(last)) if padded else 0
    return (f"{number:0{width}d}" for number in _inclusive(int(first), int(last), stride))


def _inclusive(first: int, last: int, stride: int) -> range:
    return range(first, last + 1, stride) if first <= last else range(first, last - 1, -stride)
