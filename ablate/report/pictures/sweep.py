"""What a search shows: response curves, importance, the strongest pair, coordinates, its course."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ablate.analysis.axes import Axis
from ablate.analysis.cliff import Cliff
from ablate.analysis.results import FloatArray
from ablate.analysis.sweep import MOVED, NOTHING, Answer, Effect, Pair
from ablate.report.pictures.picture import Picture
from ablate.report.scale import Scale
from ablate.report.sweep import Sweep
from ablate.study import Objective
from ablate.study.table import CellRow, StudyTable
from ablate.trial.identity import Levels, Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_LINES = 400
"""Cells drawn as lines over parallel axes; beyond them the worst are left out."""
_TICKS = 5


@dataclass(frozen=True, slots=True)
class SweepPictures:
    """Empty or None where there is nothing to draw."""

    curves: tuple[Picture, ...] = ()
    """One a factor, the one that moved the score most first."""
    importance: Picture | None = None
    pair: Picture | None = None
    parallel: Picture | None = None
    progress: Picture | None = None
    """In the order of asking, which files' times tell: no part of the core."""

    def core(self) -> tuple[Picture, ...]:
        return (*self.curves, *(p for p in (self.importance, self.pair, self.parallel) if p))

    def everything(self) -> tuple[Picture, ...]:
        return (*self.core(), *((self.progress,) if self.progress else ()))


@dataclass(frozen=True, slots=True)
class _Dot:
    """A cell: its levels, its mean score in the axis' unit; None where its runs diverged."""

    levels: Mapping[str, str]
    score: float | None


def sweep_pictures(table: StudyTable, sweep: Sweep | None, scale: Scale) -> SweepPictures:
    """The pictures of a search; none for other designs."""
    if sweep is None:
        return SweepPictures()
    dots = [dot for cell in table.cells if (dot := _dot(cell, scale)) is not None]
    found = sweep.answer
    goal = table.study.objective
    label = f"{goal.metric}, %" if scale.percent else goal.metric
    return SweepPictures(
        curves=tuple(
            _curve(number, effect, found, dots, label, scale)
            for number, effect in enumerate(found.effects)
        ),
        importance=_importance(found, goal, scale) if found.effects else None,
        pair=_heat(found.pair, label, scale) if found.pair else None,
        parallel=_parallel(found.axes, dots, label, goal) if len(dots) > 1 else None,
        progress=_progress(table, label, scale),
    )


def _dot(cell: CellRow, scale: Scale) -> _Dot | None:
    if cell.count(Outcome.DIVERGED):
        return _Dot(dict(cell.levels), None)
    return None if cell.mean is None else _Dot(dict(cell.levels), cell.mean * scale.factor)


def _at(axis: Axis, dot: _Dot) -> float:
    return axis.position(dot.levels[axis.name])


# ------------------------------------------------------------------ axes


def _ticks(axis: Axis) -> tuple[list[float], list[str]]:
    """Positions and words: levels, or round numbers of a range."""
    if axis.levels:
        return [float(p) for p in axis.nodes], [_short(level) for level in axis.levels]
    if axis.is_log and axis.high / axis.low >= 8:
        first, last = math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high))
        wide = last - first > 3
        values = [f * 10.0**e for e in range(first, last + 1) for f in ((1,) if wide else (1, 3))]
    else:
        from matplotlib.ticker import MaxNLocator

        values = [float(v) for v in MaxNLocator(_TICKS - 1).tick_values(axis.low, axis.high)]
    kept = [v for v in values if axis.low * 0.999 <= v <= axis.high * 1.001]
    return [axis.position(repr(v)) for v in kept], [f"{v:g}" for v in kept]


def _short(text: str, most: int = 14) -> str:
    return text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _plain(axes: Axes, paint: Mapping[str, str]) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color=paint["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=3)
    axes.tick_params(axis="y", length=0)


def _named(axes: Axes, axis: Axis) -> None:
    places, words = _ticks(axis)
    axes.set_xticks(places, words)
    if axis.levels and sum(map(len, words)) > 34:
        axes.tick_params(axis="x", labelrotation=20)
    pad = 0.04 if axis.is_smooth else 0.5
    axes.set_xlim(min(0.0, *places) - pad, max(1.0 if axis.is_smooth else 0.0, *places) + pad)


# ------------------------------------------------------------------ one factor


def _curve(
    number: int, effect: Effect, found: Answer, dots: Sequence[_Dot], label: str, scale: Scale
) -> Picture:
    """Mean and band over a factor, the runs as they were, and where runs diverge."""
    axis = effect.axis
    cliff = next((c for c in found.cliffs if found.axes[c.axis] is axis), None)
    low, mean, high = (y * scale.factor for y in (effect.low, effect.mean, effect.high))
    role = {MOVED: "better", NOTHING: "same"}.get(effect.verdict, "open")

    def draw(figure: Figure, paint: Mapping[str, str]) -> None:
        axes = figure.add_axes((0.105, 0.17, 0.87, 0.70))
        _plain(axes, paint)
        axes.set_title(f"{label} over {axis.name}", loc="left", color=paint["muted"], fontsize=9)
        if axis.is_smooth:
            axes.fill_between(effect.nodes, low, high, color=paint[role], alpha=0.18, linewidth=0)
            axes.plot(effect.nodes, mean, color=paint[role], linewidth=2)
        else:
            axes.vlines(effect.nodes, low, high, color=paint[role], linewidth=6, alpha=0.3)
            axes.plot(effect.nodes, mean, "_", color=paint[role], markersize=22, markeredgewidth=2)
        width = 0.0 if axis.is_smooth else 0.16
        spread = _spread(len(effect.points), width)
        alive = [
            (x + dx, y * scale.factor) for (x, y), dx in zip(effect.points, spread, strict=True)
        ]
        axes.plot(*_columns(alive), "o", color=paint["ink"], markersize=3.5, alpha=0.55)
        _bound(axes, [*(y for _, y in alive), *low, *high])
        bottom = axes.get_ylim()[0]
        lost = [x for dot in dots if dot.score is None and not math.isnan(x := _at(axis, dot))]
        gone = np.array(lost) + _spread(len(lost), width)
        axes.plot(
            gone, [bottom] * len(gone), "x", color=paint["worse"], markersize=5, clip_on=False
        )
        if cliff is not None and not cliff.levels:
            _draw_cliff(axes, cliff, paint)
        _named(axes, axis)

    title = f"{label} over {axis.name}: mean of the model, 90 % band, cells about it"
    return Picture(f"response-{number}", title, 4.6, 2.6, draw)


def _spread(count: int, width: float) -> FloatArray:
    """Sideways shifts, so that cells of one level do not hide each other; always the same."""
    return np.asarray(width * np.sin(np.arange(count) * 2.4))


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _bound(axes: Axes, values: Sequence[float]) -> None:
    """The middle nine tenths and the model, not a few runs far below."""
    kept = np.array([v for v in values if math.isfinite(v)])
    if not len(kept):
        return
    low, high = float(np.quantile(kept, 0.04)), float(kept.max())
    pad = 0.08 * max(high - low, 1e-9)
    axes.set_ylim(low - pad, high + pad)


def _draw_cliff(axes: Axes, cliff: Cliff, paint: Mapping[str, str]) -> None:
    edge = 2.0 if cliff.above else -1.0
    axes.axvspan(cliff.at, edge, color=paint["worse"], alpha=0.10, linewidth=0)
    axes.axvspan(*cliff.interval, color=paint["worse"], alpha=0.14, linewidth=0)
    axes.axvline(cliff.at, color=paint["worse"], linewidth=1, linestyle=(0, (4, 2)))
    axes.text(
        cliff.at,
        0.97,
        " diverges " if cliff.above else " diverges ",
        transform=axes.get_xaxis_transform(),
        ha="left" if cliff.above and cliff.at < 0.8 else "right",
        va="top",
        color=paint["worse"],
        fontsize=8,
    )


def _importance(found: Answer, goal: Objective, scale: Scale) -> Picture:
    """How far each factor moves the score, with its interval, against the margin."""
    rows = found.effects
    height = 0.8 + 0.3 * len(rows)

    def draw(figure: Figure, paint: Mapping[str, str]) -> None:
        axes = figure.add_axes((0.25, 0.5 / height, 0.71, 1 - 0.72 / height))
        for side in ("top", "left", "right"):
            axes.spines[side].set_visible(False)
        axes.grid(axis="x", color=paint["line"], linewidth=0.6)
        axes.set_axisbelow(True)
        margin = goal.margin * scale.factor
        axes.axvspan(0, margin, color=paint["band"], linewidth=0)
        for at, effect in enumerate(rows):
            role = {MOVED: "better", NOTHING: "same"}.get(effect.verdict, "open")
            low, mean, high = (
                max(v, 0.0) * scale.factor
                for v in (effect.span.low, effect.span.mean, effect.span.high)
            )
            axes.plot([low, high], [at, at], color=paint[role], linewidth=2.6)
            axes.plot([mean], [at], "o", color=paint[role], markersize=6.5)
        axes.set_yticks(range(len(rows)), [_short(e.axis.name, 22) for e in rows])
        axes.tick_params(axis="y", length=0, labelcolor=paint["ink"])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(left=0)
        unit = f" {scale.unit}" if scale.unit else ""
        axes.set_xlabel(f"moves the score by,{unit} (shaded: within the margin of {margin:g})")

    return Picture("importance", "How far each factor moves the score", 5.0, height, draw)


# ------------------------------------------------------------------ several factors


def _heat(pair: Pair, label: str, scale: Scale) -> Picture:
    """Score over the two factors that depend on each other most."""
    one, two = pair.axes
    surface = pair.surface * scale.factor

    def draw(figure: Figure, paint: Mapping[str, str]) -> None:
        axes = figure.add_axes((0.15, 0.15, 0.66, 0.73))
        axes.set_title(label, loc="left", color=paint["muted"], fontsize=9)
        x, y = (_edges(nodes) for nodes in pair.nodes)
        # A placeholder is one colour; strength of colour is its opacity.
        low, high = float(surface.min()), float(surface.max())
        strength = (surface - low) / max(high - low, 1e-12)
        for i in range(surface.shape[0]):
            for j in range(surface.shape[1]):
                axes.fill(
                    [x[i], x[i + 1], x[i + 1], x[i]],
                    [y[j], y[j], y[j + 1], y[j + 1]],
                    color=paint["level1"],
                    alpha=0.06 + 0.9 * float(strength[i, j]),
                    linewidth=0,
                )
        for side in axes.spines.values():
            side.set_visible(False)
        axes.set_xticks(*_ticks(one))
        axes.set_yticks(*_ticks(two))
        axes.set_xlim(x[0], x[-1])
        axes.set_ylim(y[0], y[-1])
        axes.set_xlabel(one.name)
        axes.set_ylabel(two.name)
        key = figure.add_axes((0.84, 0.15, 0.03, 0.73))
        for step in range(20):
            key.axhspan(
                low + (high - low) * step / 20,
                low + (high - low) * (step + 1) / 20,
                color=paint["level1"],
                alpha=0.06 + 0.9 * (step + 0.5) / 20,
                linewidth=0,
            )
        key.set_xticks([])
        key.yaxis.tick_right()
        key.set_ylim(low, high)
        for side in key.spines.values():
            side.set_visible(False)

    title = f"{label} over {one.name} and {two.name}, by the model"
    return Picture("pair", title, 4.6, 3.1, draw)


def _edges(nodes: FloatArray) -> FloatArray:
    """Borders of the cells around nodes."""
    if len(nodes) == 1:
        return np.array([nodes[0] - 0.5, nodes[0] + 0.5])
    middle = (nodes[1:] + nodes[:-1]) / 2
    return np.asarray(np.r_[2 * nodes[0] - middle[0], middle, 2 * nodes[-1] - middle[-1]])


def _parallel(
    axes_of: Sequence[Axis], dots: Sequence[_Dot], label: str, goal: Objective
) -> Picture:
    """Every cell as a line over all factors; the better its score, the stronger."""
    sign = goal.sign
    scored = sorted((d for d in dots if d.score is not None), key=lambda d: sign * (d.score or 0))
    scored = scored[-_MOST_LINES:]
    gone = [dot for dot in dots if dot.score is None]

    def draw(figure: Figure, paint: Mapping[str, str]) -> None:
        axes = figure.add_axes((0.05, 0.09, 0.86, 0.79))
        axes.set_axis_off()
        last = len(axes_of)
        values = [dot.score or 0.0 for dot in scored]
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        for dot in gone:
            axes.plot(
                range(last), _places(axes_of, dot), color=paint["worse"], alpha=0.25, linewidth=0.7
            )
        for rank, dot in enumerate(scored):
            share = (rank + 1) / len(scored)
            best = rank >= len(scored) - max(3, len(scored) // 20)
            score = ((dot.score or 0.0) - low) / max(high - low, 1e-12)
            axes.plot(
                range(last + 1),
                [*_places(axes_of, dot), score],
                color=paint["better" if best else "level0"],
                alpha=0.9 if best else 0.08 + 0.3 * share,
                linewidth=1.6 if best else 0.8,
                zorder=2 + share,
            )
        for at, axis in enumerate(axes_of):
            axes.plot([at, at], [0, 1], color=paint["muted"], linewidth=0.9)
            axes.text(at, 1.06, _short(axis.name, 16), ha="center", weight="bold", fontsize=8)
            for place, word in zip(*_ticks(axis), strict=True):
                y = _unit(axis, place)
                axes.text(
                    at + 0.03,
                    y,
                    word,
                    va="center",
                    fontsize=7,
                    color=paint["muted"],
                    zorder=5,
                    bbox={
                        "facecolor": paint["paper"],
                        "edgecolor": "none",
                        "pad": 0.6,
                        "alpha": 0.8,
                    },
                )
        axes.plot([last, last], [0, 1], color=paint["muted"], linewidth=0.9)
        axes.text(last, 1.06, label, ha="center", weight="bold", fontsize=8)
        for y, value in ((0.0, low), (1.0, high)):
            axes.text(last + 0.03, y, f"{value:.4g}", va="center", fontsize=7)
        axes.set_xlim(-0.1, last + 0.25)
        axes.set_ylim(-0.04, 1.12)

    title = "Every cell over all factors and its score; the best in colour, diverged ones in red"
    return Picture("parallel", title, 8.6, 3.4, draw)


def _unit(axis: Axis, position: float) -> float:
    """0 to 1 along a drawn axis, names too."""
    if axis.is_smooth:
        return min(max(position, 0.0), 1.0)
    return position / max(len(axis.levels) - 1, 1)


def _places(axes_of: Sequence[Axis], dot: _Dot) -> list[float]:
    return [_unit(axis, _at(axis, dot)) for axis in axes_of]


# ------------------------------------------------------------------ its course


def _progress(table: StudyTable, label: str, scale: Scale) -> Picture | None:
    """Score of each cell in the order of asking, and the best so far."""
    by_levels: dict[Levels, CellRow] = {cell.levels: cell for cell in table.cells}
    asked = [by_levels[levels] for levels in table.asked if levels in by_levels]
    scores = [(i, cell.mean, cell.count(Outcome.DIVERGED)) for i, cell in enumerate(asked, 1)]
    alive = [(i, y * scale.factor) for i, y, gone in scores if y is not None and not gone]
    if len(alive) < 2:
        return None
    sign = table.study.objective.sign
    best = sign * np.maximum.accumulate([sign * y for _, y in alive])

    def draw(figure: Figure, paint: Mapping[str, str]) -> None:
        axes = figure.add_axes((0.085, 0.17, 0.89, 0.70))
        _plain(axes, paint)
        axes.set_title(f"{label}, best so far", loc="left", color=paint["muted"], fontsize=9)
        axes.set_xlabel("cell, in the order of asking")
        axes.plot(*_columns(alive), "o", color=paint["level0"], markersize=4, alpha=0.7)
        axes.step([i for i, _ in alive], best, where="post", color=paint["level1"], linewidth=2)
        _bound(axes, [y for _, y in alive])
        bottom = axes.get_ylim()[0]
        gone = [i for i, _, count in scores if count]
        axes.plot(
            gone, [bottom] * len(gone), "x", color=paint["worse"], markersize=5, clip_on=False
        )
        axes.locator_params(axis="x", integer=True)

    return Picture("progress", f"{label} by cell, and the best so far", 4.6, 3.1, draw)
