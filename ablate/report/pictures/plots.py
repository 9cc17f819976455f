"""What a report shows: effects with intervals, curves, events, cells, interactions, a path."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ablate.report.pictures.picture import Picture
from ablate.study.table import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Effect:
    """A row of the effect plot; numbers in the axis's unit."""

    group: str
    """Factor."""
    label: str
    """Level against reference."""
    delta: float | None
    interval: tuple[float, float] | None
    role: str
    """better, worse, same or open: the verdict's colour."""
    words: str
    """The verdict, said at the right."""
    outer: tuple[float, float] | None = None
    """The simultaneous interval over all rows, drawn thin."""
    note: str = ""
    """Said where there is nothing to draw."""
    hollow: bool = False
    """The difference is not the whole story (runs diverged)."""


@dataclass(frozen=True, slots=True)
class Line:
    """One cell (or one level over several cells) in a panel of curves."""

    role: str
    runs: tuple[Curve, ...]
    """One per seed."""
    completed: tuple[bool, ...]
    """Which of them count in the mean; the others end in a cross."""
    marks: tuple[tuple[float, float, str], ...] = ()
    """(x, y, severity) of events."""


def effect_plot(
    effects: Sequence[Effect], *, unit: str, margin: float | None, better_up: bool, name: str
) -> Picture:
    """Differences to the reference with their intervals; the band is what would not matter."""
    heights = [0.0]
    groups: list[tuple[str, float]] = []
    y = 0.0
    for index, effect in enumerate(effects):
        if index == 0 or effect.group != effects[index - 1].group:
            y += 1.35 if index else 0.6
            groups.append((effect.group, y))
        y += 1.0
        heights.append(y)
    rows = heights[1:]
    limit = _effect_limit(effects, margin)

    def draw(figure: Figure, paint: Mapping[str, str]) -> None:
        axes = figure.add_axes((0.235, 0.62 / _inches(y), 0.515, 1 - 0.84 / _inches(y)))
        axes.set_xlim(-limit, limit)
        axes.set_ylim(y + 0.7, -0.1)
        for side in ("top", "left", "right"):
            axes.spines[side].set_visible(False)
        axes.set_yticks([])
        axes.tick_params(axis="x", length=3)
        axes.grid(axis="x", color=paint["line"], linewidth=0.6)
        axes.set_axisbelow(True)
        if margin:
            axes.axvspan(-margin, margin, color=paint["band"], linewidth=0, zorder=0)
        axes.axvline(0, color=paint["muted"], linewidth=1)
        left, right = ("worse", "better") if better_up else ("better", "worse")
        band = f" (shaded: within the margin of {margin:g})" if margin else ""
        axes.set_xlabel(
            f"\N{LEFTWARDS ARROW} {left}     difference, {unit}{band}     "
            f"{right} \N{RIGHTWARDS ARROW}",
            color=paint["muted"],
        )
        beside = axes.get_yaxis_transform()
        for text, at in groups:
            axes.text(
                -0.455, at, text, transform=beside, va="center", weight="bold", color=paint["ink"]
            )
        for effect, at in zip(effects, rows, strict=True):
            _draw_effect(axes, effect, at, limit, paint)

    return Picture(
        name, "Effects: difference to the reference with intervals", 8.6, _inches(y), draw
    )


def _inches(height: float) -> float:
    return 0.84 + 0.27 * (height + 0.8)


def _effect_limit(effects: Sequence[Effect], margin: float | None) -> float:
    """Half the axis: holds most intervals; those that would dwarf all others are cut."""
    reach = [
        max(abs(end) for end in (*(e.outer or e.interval or ()), e.delta) if math.isfinite(end))
        for e in effects
        if e.delta is not None and math.isfinite(e.delta)
    ]
    least = 1.6 * margin if margin else 0.0
    if not reach:
        return least or 1.0
    typical = float(np.median(reach))
    kept = [value for value in reach if value <= 5 * typical]
    return max(max(kept) * 1.12, least) or 1.0


def _draw_effect(
    axes: Axes, effect: Effect, at: float, limit: float, paint: Mapping[str, str]
) -> None:
    beside = axes.get_yaxis_transform()
    colour = paint[effect.role]
    axes.text(-0.428, at, effect.label, transform=beside, va="center", color=paint["ink"])
    axes.text(1.03, at, effect.words, transform=beside, va="center", color=colour)
    if effect.delta is None or not math.isfinite(effect.delta):
        axes.text(
            0,
            at,
            f" {effect.note} ",
            va="center",
            ha="center",
            color=paint["muted"],
            style="italic",
            bbox={"facecolor": paint["paper"], "edgecolor": "none", "pad": 1},
        )
        return
    for interval, width in ((effect.outer, 1.0), (effect.interval, 2.6)):
        if interval is None:
            continue
        low, high = (min(max(end, -limit), limit) for end in interval)
        axes.plot(
            [low, high],
            [at, at],
            color=colour,
            linewidth=width,
            solid_capstyle="butt",
            linestyle=(0, (2, 1.2)) if effect.hollow else "-",
        )
        for end, shown, marker in ((interval[0], low, "<"), (interval[1], high, ">")):
            if abs(end) > limit:
                axes.plot([shown], [at], marker=marker, color=colour, markersize=6, clip_on=False)
    if abs(effect.delta) <= limit:
        solid = effect.interval is not None and not effect.hollow
        axes.plot(
            [effect.delta],
            [at],
            marker="o",
            markersize=6.5,
            color=colour,
            markerfacecolor=colour if solid else paint["paper"],
            markeredgewidth=1.5,
        )


def score_panel(lines: Sequence[Line], *, label: str, name: str, scale: float = 1.0) -> Picture:
    """Objective over epochs: seeds thin, mean of completed seeds thick."""
    return _panel(lines, x_label="epoch", y_label=label, name=name, scale=scale)


def loss_panel(lines: Sequence[Line], *, name: str) -> Picture:
    """Training loss over optimizer steps, with the markers' events."""
    return _panel(
        lines, x_label="optimizer step", y_label="training loss, nat", name=name, scale=1.0
    )


def _panel(
    lines: Sequence[Line], *, x_label: str, y_label: str, name: str, scale: float
) -> Picture:
    def draw(figure: Figure, paint: Mapping[str, str]) -> None:
        axes = figure.add_axes((0.085, 0.165, 0.89, 0.735))
        _frame(axes, paint)
        axes.set_xlabel(x_label)
        axes.set_title(y_label, loc="left", color=paint["muted"], fontsize=9)
        drawn = False
        for order, line in enumerate(lines):
            drawn = _draw_line(axes, line, scale, paint, zorder=3 + order) or drawn
        for line in lines:
            for x, y, severity in line.marks:
                grave = severity in ("fatal", "severe")
                axes.plot(
                    [x],
                    [y * scale],
                    marker="v",
                    markersize=5.5,
                    linestyle="none",
                    zorder=20,
                    color=paint["worse" if grave else "open"],
                    markeredgecolor=paint["paper"],
                    markeredgewidth=0.8,
                )
        if not drawn:
            axes.text(
                0.5,
                0.5,
                "nothing measured yet",
                transform=axes.transAxes,
                ha="center",
                va="center",
                color=paint["muted"],
            )
            axes.set_xticks([])
            axes.set_yticks([])
        else:
            last = max(run.x[-1] for line in lines for run in line.runs if run.x)
            axes.set_xlim(0, 1.02 * (last or 1.0))
            if scale == 100:
                axes.set_ylim(bottom=0)

    return Picture(name, f"{y_label} over {x_label}", 4.6, 2.75, draw)


def _draw_line(
    axes: Axes, line: Line, scale: float, paint: Mapping[str, str], *, zorder: int
) -> bool:
    colour = paint[line.role]
    for run, completed in zip(line.runs, line.completed, strict=True):
        if not run.x:
            continue
        y = np.asarray(run.y) * scale
        alone = sum(bool(other.x) for other in line.runs) == 1
        axes.plot(
            run.x,
            y,
            color=colour,
            linewidth=1.6 if alone else 0.7,
            alpha=1.0 if alone else 0.45,
            zorder=zorder,
        )
        if not completed:
            axes.plot(
                [run.x[-1]],
                [y[-1]],
                marker="x",
                markersize=5,
                color=colour,
                markeredgewidth=1.4,
                zorder=zorder,
            )
    whole = [run for run, ok in zip(line.runs, line.completed, strict=True) if ok and run.x]
    mean = mean_curve(whole)
    if len(whole) > 1:
        axes.plot(mean.x, np.asarray(mean.y) * scale, color=colour, linewidth=2, zorder=zorder)
    return any(run.x for run in line.runs)


def mean_curve(runs: Sequence[Curve]) -> Curve:
    """Mean over the runs that have points, on those of the first, as far as all of them go."""
    runs = [run for run in runs if run.x]
    if not runs:
        return Curve()
    start = max(run.x[0] for run in runs)
    end = min(run.x[-1] for run in runs)
    grid = [x for x in runs[0].x if start <= x <= end]
    if not grid:
        return Curve()
    mean = np.mean([np.interp(grid, run.x, run.y) for run in runs], axis=0)
    return Curve(tuple(grid), tuple(float(y) for y in mean))


def _frame(axes: Axes, paint: Mapping[str, str]) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color=paint["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=3)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="y", nbins=6)
    axes.locator_params(axis="x", nbins=7, integer=True)


@dataclass(frozen=True, slots=True)
class Strip:
    """A row of the plot of cells: one dot per seed; numbers in the axis's unit."""

    label: str
    values: tuple[float, ...]
    """Of completed runs."""
    mean: float | None
    diverged: int
    role: str
    """level0 for the baseline, ink for the others."""


def strip_plot(strips: Sequence[Strip], *, label: str, name: str) -> Picture:
    """Every run of every cell, and each cell's mean."""
    height = 0.62 + 0.235 * (len(strips) + 0.4)

    def draw(figure: Figure, paint: Mapping[str, str]) -> None:
        left = _label_share([strip.label for strip in strips])
        axes = figure.add_axes((left, 0.46 / height, 0.89 - left, 1 - 0.54 / height))
        for side in ("top", "left", "right"):
            axes.spines[side].set_visible(False)
        axes.set_ylim(len(strips) - 0.3, -0.7)
        axes.set_yticks([])
        axes.grid(axis="x", color=paint["line"], linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(axis="x", length=3)
        axes.set_xlabel(label)
        beside = axes.get_yaxis_transform()
        for at, strip in enumerate(strips):
            colour = paint[strip.role]
            axes.axhline(at, color=paint["line"], linewidth=0.5, zorder=0)
            axes.text(
                -0.015,
                at,
                strip.label,
                transform=beside,
                va="center",
                ha="right",
                color=paint["ink"],
            )
            axes.plot(
                strip.values,
                [at] * len(strip.values),
                marker="o",
                markersize=4,
                linestyle="none",
                color=colour,
                alpha=0.55,
                markeredgewidth=0,
            )
            if strip.mean is not None:
                axes.plot(
                    [strip.mean] * 2, [at - 0.3, at + 0.3], color=colour, linewidth=2, zorder=5
                )
            if strip.diverged:
                words = f"{strip.diverged} diverged"
                axes.text(1.01, at, words, transform=beside, va="center", color=paint["worse"])
        means = [strip.mean for strip in strips if strip.role == "level0"]
        if means and means[0] is not None:
            axes.axvline(means[0], color=paint["level0"], linewidth=0.8, linestyle=(0, (3, 2)))

    return Picture(name, f"{label} of every run, by cell", 8.6, height, draw)


def _label_share(labels: Sequence[str]) -> float:
    """Part of a full-width picture that row labels of this length need."""
    return 0.03 + 0.0092 * max(map(len, labels))


@dataclass(frozen=True, slots=True)
class Track:
    """A row of the timeline: one run."""

    label: str
    end: float
    """Last step."""
    diverged: bool
    events: tuple[tuple[float, float, str], ...]
    """(first step, last step, severity)."""


def timeline(tracks: Sequence[Track], *, name: str) -> Picture:
    """When the markers saw something, run by run."""
    height = 0.62 + 0.215 * (len(tracks) + 0.4)

    def draw(figure: Figure, paint: Mapping[str, str]) -> None:
        left = _label_share([track.label for track in tracks])
        axes = figure.add_axes((left, 0.46 / height, 0.97 - left, 1 - 0.54 / height))
        for side in ("top", "left", "right"):
            axes.spines[side].set_visible(False)
        axes.set_ylim(len(tracks) - 0.3, -0.7)
        axes.set_xlim(0, 1.02 * (max(track.end for track in tracks) or 1.0))  # none has a step
        axes.set_yticks([])
        axes.locator_params(axis="x", nbins=8, integer=True)
        axes.tick_params(axis="x", length=3)
        axes.set_xlabel("optimizer step")
        beside = axes.get_yaxis_transform()
        for at, track in enumerate(tracks):
            axes.text(
                -0.015,
                at,
                track.label,
                transform=beside,
                va="center",
                ha="right",
                color=paint["ink"],
            )
            _draw_track(axes, at, track, paint)

    return Picture(name, "Events of the markers over steps, by run", 8.6, height, draw)


def _draw_track(axes: Axes, at: int, track: Track, paint: Mapping[str, str]) -> None:
    axes.plot([0, track.end], [at, at], color=paint["line"], linewidth=2.2, zorder=1)
    for first, last, severity in track.events:
        colour = paint[severity_role(severity)]
        if last > first:
            axes.plot(
                [first, last],
                [at, at],
                color=colour,
                linewidth=4,
                alpha=0.4,
                solid_capstyle="butt",
                zorder=2,
            )
        axes.plot(
            [first],
            [at],
            marker="o",
            markersize=4.5,
            color=colour,
            markeredgecolor=paint["paper"],
            markeredgewidth=0.6,
            zorder=3,
        )
    if track.diverged:
        axes.plot(
            [track.end],
            [at],
            marker="x",
            markersize=6,
            color=paint["worse"],
            markeredgewidth=1.6,
            zorder=4,
        )


def severity_role(severity: str) -> str:
    """Colour of an event."""
    if severity in ("fatal", "severe"):
        return "worse"
    return "open" if severity == "warning" else "same"


def step_plot(
    lines: Sequence[tuple[str, str, Sequence[Sequence[float | None]]]],
    *,
    ticks: Sequence[str],
    label: str,
    name: str,
    title: str,
    width: float = 4.6,
) -> Picture:
    """Means over a few named positions: (role, label, values of each seed at each position).

    Interactions (a line per level; parallel lines mean none) and the steps of a path.
    """

    def draw(figure: Figure, paint: Mapping[str, str]) -> None:
        axes = figure.add_axes((0.105, 0.21, 0.74, 0.69))
        _frame(axes, paint)
        axes.set_title(label, loc="left", color=paint["muted"], fontsize=9)
        axes.set_xticks(range(len(ticks)), ticks)
        if sum(map(len, ticks)) > 9 * width:  # they would run into each other
            axes.tick_params(axis="x", labelrotation=20)
            for tick in axes.get_xticklabels():
                tick.set(ha="right", rotation_mode="anchor")
        axes.set_xlim(-0.3, len(ticks) - 0.7)
        for role, words, positions in lines:
            at = [x for x, values in enumerate(positions) if any(v is not None for v in values)]
            means = [float(np.mean([v for v in positions[x] if v is not None])) for x in at]
            for x in at:
                dots = [v for v in positions[x] if v is not None]
                axes.plot(
                    [x] * len(dots),
                    dots,
                    marker="o",
                    markersize=3.5,
                    linestyle="none",
                    color=paint[role],
                    alpha=0.45,
                    markeredgewidth=0,
                )
            axes.plot(at, means, color=paint[role], linewidth=2, marker="o", markersize=5)
            if at:
                axes.annotate(
                    words,
                    (at[-1], means[-1]),
                    xytext=(9, 0),
                    textcoords="offset points",
                    va="center",
                    color=paint[role],
                    annotation_clip=False,
                )

    return Picture(name, title, width, 2.75, draw)


def trade_plot(
    points: Sequence[tuple[float, float, int | None]],
    *,
    x_label: str,
    y_label: str,
    less_is_better: bool,
    name: str,
) -> Picture:
    """(cost, score, number on the front or None) of each cell: what a better score costs.

    `less_is_better`: of the cost. The front is a staircase: nothing is known between its cells.
    """

    def draw(figure: Figure, paint: Mapping[str, str]) -> None:
        axes = figure.add_axes((0.085, 0.165, 0.86, 0.735))
        _frame(axes, paint)
        axes.locator_params(axis="x", nbins=6, integer=False)
        axes.set_title(y_label, loc="left", color=paint["muted"], fontsize=9)
        axes.set_xlabel(x_label)
        axes.margins(x=0.07, y=0.12)
        rest = [(x, y) for x, y, number in points if number is None]
        axes.plot(
            [x for x, _ in rest],
            [y for _, y in rest],
            marker="o",
            markersize=4,
            linestyle="none",
            color=paint["level0"],
            alpha=0.55,
            markeredgewidth=0,
        )
        front = sorted((x, y) for x, y, number in points if number is not None)
        axes.plot(
            [x for x, _ in front],
            [y for _, y in front],
            color=paint["level1"],
            linewidth=1.2,
            marker="o",
            markersize=5.5,
            drawstyle="steps-post" if less_is_better else "steps-pre",
        )
        for x, y, number in points:
            if number is not None:
                axes.annotate(
                    str(number),
                    (x, y),
                    xytext=(-6 if less_is_better else 6, 5),
                    textcoords="offset points",
                    ha="right" if less_is_better else "left",
                    color=paint["ink"],
                    weight="bold",
                    annotation_clip=False,
                )

    return Picture(name, f"{y_label} over {x_label}, by cell", 6.4, 3.2, draw)
