"""Curves in a terminal, drawn with the dots of Braille: two by four in every character."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")
_ROWS = 8
_LABEL = 9
"""Characters before the axis."""
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Bit of each dot of a Braille character, by column and row."""


@dataclass(frozen=True, slots=True)
class Line:
    """A curve with its name."""

    name: str
    points: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, name: str, rows: Iterable[Mapping[str, Any]], key: str) -> Line:
        """The finite values of a measurement over steps."""
        found = [(float(r["step"]), float(r[key])) for r in rows if key in r]
        return cls(name, tuple(point for point in found if math.isfinite(point[1])))


def draw(title: str, lines: Sequence[Line], *, width: int, rows: int = _ROWS) -> RenderableType:
    """The curves over one another; where two meet, the later one's colour stays."""
    columns = max(width - _LABEL - 1, 10)
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_range, y_range = _wide(min(xs), max(xs)), _wide(min(ys), max(ys))
    bits = [[0] * columns for _ in range(rows)]
    colours: list[list[str]] = [[""] * columns for _ in range(rows)]
    for number, line in enumerate(lines):
        for x, y in _dots(line.points, x_range, y_range, across=2 * columns, down=4 * rows):
            bits[y // 4][x // 2] |= _DOTS[x % 2][y % 4]
            colours[y // 4][x // 2] = _COLOURS[number % len(_COLOURS)]
    drawn = []
    for row in range(rows):
        label = {0: f"{y_range[1]:.4g}", rows - 1: f"{y_range[0]:.4g}"}.get(row, "")
        text = Text(f"{label:>{_LABEL - 2}} ┤", style="dim", no_wrap=True)
        for bit, colour in zip(bits[row], colours[row], strict=True):
            text.append(chr(0x2800 + bit) if bit else " ", style=colour)
        drawn.append(text)
    head = Text(title, style="bold")
    for number, line in enumerate(lines):
        head.append(f"  ━ {line.name}", style=_COLOURS[number % len(_COLOURS)])
    left, right = f"step {x_range[0]:g}", f"{x_range[1]:g}"
    foot = Text(" " * _LABEL + left + right.rjust(columns - len(left)), style="dim")
    return Group(head, *drawn, foot)


def _wide(low: float, high: float) -> tuple[float, float]:
    """A range that is wider than nothing."""
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _dots(
    points: Sequence[tuple[float, float]],
    xs: tuple[float, float],
    ys: tuple[float, float],
    *,
    across: int,
    down: int,
) -> Iterable[tuple[int, int]]:
    """Dots of a curve, (column, row) from the upper left; neighbours are joined by a line."""
    placed = [
        (
            round((x - xs[0]) / (xs[1] - xs[0]) * (across - 1)),
            round((ys[1] - y) / (ys[1] - ys[0]) * (down - 1)),
        )
        for x, y in points
    ]
    yield from placed
    for (x1, y1), (x2, y2) in zip(placed, placed[1:], strict=False):
        steps = max(abs(x2 - x1), abs(y2 - y1))
        for i in range(1, steps):
            yield round(x1 + (x2 - x1) * i / steps), round(y1 + (y2 - y1) * i / steps)
