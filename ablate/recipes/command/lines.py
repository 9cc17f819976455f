"""What a command says of itself: lines of JSON, lines that a pattern knows, rows of a table."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ablate.errors import DataError

LONGEST_LINE = 1 << 20
"""Bytes of a line that are kept; what follows them is left out."""

Row = dict[str, float]
RESERVED = ("attempt", "time")
"""Names that the record gives itself."""


def parse_line(line: str, patterns: Sequence[re.Pattern[str]]) -> Row | None:
    """The measurements of a line: a JSON object's numbers, or a pattern's groups; else None."""
    text = line.strip()
    if text.startswith("{") and text.endswith("}"):
        try:
            content = json.loads(text)
        except ValueError:
            content = None
        if isinstance(content, dict):
            return _numbers(content) or None
    for pattern in patterns:
        found = pattern.search(text)
        if found is not None:
            return _numbers(found.groupdict()) or None
    return None


def near_line(line: str, metric: str) -> str:
    """How to read a line that names the metric beside a number, and that nothing reads."""
    name = rf"(?<![\w/.-]){re.escape(metric)}(?![\w/.-])"
    number = r"(?=[-+.]?\d|(?:nan|inf)\b)"
    found = re.search(rf"{name}\D{{0,20}}?{number}", line, re.IGNORECASE)
    if not found or not metric.isidentifier():
        return ""
    before = re.escape(found[0]).replace("\\ ", " ")
    pattern = rf"{before}(?P<{metric}>[^\s,;%)]+)"
    return f"it printed {line.strip()[:100]!r}, which patterns: ['{pattern}'] would read"


def _numbers(content: dict[str, Any]) -> Row:
    found = {}
    for name, value in content.items():
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                continue
        if isinstance(value, (int, float)) and name not in RESERVED:
            found[name] = value
    return found


class Tail:
    """The new whole lines of a file that grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at = 0
        self._rest = b""

    def lines(self) -> Iterator[str]:
        """Lines since the last call; none while the file does not exist."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self._at)
                found = file.read()
        except (FileNotFoundError, IsADirectoryError):
            return
        self._at += len(found)
        *whole, self._rest = (self._rest + found).split(b"\n")
        for line in whole:
            yield line[:LONGEST_LINE].decode(errors="replace")


class Table:
    """The new rows of a metrics.csv that grows, or of a folder of event files at its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tail = Tail(path)
        self._header: list[str] = []

    def rows(self, *, ended: bool) -> Iterator[Row]:
        """Rows since the last call; of event files all, once the command has `ended`."""
        if self.path.is_dir():
            if ended:
                yield from _read_events(self.path)
            return
        for line in self._tail.lines():
            cells = next(csv.reader([line]), [])
            if not self._header:
                self._header = cells
            elif row := _numbers(dict(zip(self._header, cells, strict=False))):
                yield row


def _read_events(folder: Path) -> Iterator[Row]:
    """Scalars of TensorBoard event files, by step; a tag's name is its last part."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise DataError(
            f"{folder} holds event files, which TensorBoard reads: install ablate-runner"
            "[tensorboard], or give a metrics.csv as table"
        ) from error
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    rows: dict[int, Row] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            rows.setdefault(event.step, {"step": event.step})[tag.rpartition("/")[2]] = event.value
    yield from (rows[step] for step in sorted(rows))
