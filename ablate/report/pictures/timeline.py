"""A picture of when what happened: one trial's curves with its events.

It is a PNG (to look at, for MLflow) or an SVG (to zoom into). matplotlib is imported when a picture
is drawn and never touches a display.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ablate.markers.event import ACCURACY, PRECEDENCE, Context, Event, number
from ablate.markers.rules import RULES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that stay apart for colour-blind readers (Okabe and Ito), and in print by darkness.
_SEVERITY = {"info": "#8fa3b8", "warning": "#e69f00", "severe": "#d1495b", "fatal": "#7b002c"}
_VERDICT = {
    "NUMERIC_FAIL": "#7b002c",
    "DIVERGED": "#7b002c",
    "COLLAPSED": "#d1495b",
    "DEGRADED": "#d1495b",
    "SPIKY": "#b87a00",
    "STABLE": "#2a7f62",
}
MARKERS = [rule.name for rule in RULES]
"""Markers that a picture has a lane for, from top to bottom."""

_CURVE = "#1f4e79"
_PALE = "#9db8d2"
_GREY = "#666666"
_NOTE = 125  # characters of a line across the picture
_POINTS = 1500  # bins that a curve is drawn with: more than a picture has columns


def draw_trial(
    path: Path,
    rows: Iterable[Mapping[str, Any]],
    evaluations: Iterable[Mapping[str, Any]],
    events: Iterable[Event],
    *,
    title: str,
    verdict: str,
    stop_step: int | None = None,
    context: Context | None = None,
) -> None:
    """Loss, gradient norm, temperature and top-1 over steps, with the events in lanes above.

    Writes PNG or SVG, as `path` ends. Quantities that were not measured leave out their panel;
    non-finite values are crosses on the upper edge.
    """
    rows, evaluations, events = list(rows), list(evaluations), list(events)
    context = context or Context()
    unit = "loss / nat" if context.in_nats else "loss"
    chance = "ln(batch)" if context.uniform_loss is None else "chance"
    panels = [
        panel
        for panel in (
            _Panel("loss", unit, rows, level=context.chance_loss, level_name=chance),
            _Panel("grad_norm", "gradient norm", rows, log=True),
            _Panel("logit_scale", "temperature", rows, level=100.0, level_name="limit"),
            _Panel(
                context.accuracy or ACCURACY, "top-1 / %", evaluations, scale=100.0, dots=True,
                level=context.chance_top1, level_name="chance",
            ),
        )
        if panel.measured
    ]  # fmt: skip
    lanes = _lanes(events)
    heights = [0.27 * len(lanes) + 0.15] if lanes else []
    heights += [1.9 if panel.name == "loss" else 1.2 for panel in panels]
    if not heights:  # a trial that died before its first step
        heights = [1.2]
    note = max(events, key=_by_weight).message if events else ""
    figure = _figure(9.0, sum(heights) + 1.1, below=0.56 if note else 0.34)
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    last = max([item["step"] for item in (*rows, *evaluations)], default=0) or 1
    if lanes:
        _draw_lanes(axes[0], lanes, last)
    if not lanes and not panels:
        axes[0].text(0.5, 0.5, "nothing was measured", ha="center", transform=axes[0].transAxes)
        axes[0].set_yticks([])
    for panel, axis in zip(panels, axes[len(axes) - len(panels) :], strict=True):
        panel.draw(axis, events)
        _shade(axis, events, last)
        if stop_step is not None:
            axis.axvline(stop_step, color=_SEVERITY["fatal"], linewidth=1.2, linestyle="--")
    if stop_step is not None and panels:
        _note_stop(axes[len(axes) - len(panels)], stop_step, last)
    axes[-1].set_xlabel("optimizer step")
    axes[-1].set_xlim(0, max(last, 1) * 1.01)
    if events:
        _legend(figure, {item.severity for item in events})
    _head(figure, title, verdict if panels else "", note)
    _save(figure, path)


@dataclass(slots=True)
class _Panel:
    """One quantity over steps."""

    name: str
    label: str
    source: Sequence[Mapping[str, Any]]
    scale: float = 1.0
    log: bool = False
    dots: bool = False
    level: float | None = None
    """A value worth a line, such as chance."""
    level_name: str = ""

    @property
    def measured(self) -> bool:
        return any(number(row.get(self.name)) is not None for row in self.source)

    def draw(self, axis: Axes, events: Sequence[Event]) -> None:
        pairs = [
            (row["step"], value * self.scale)
            for row in self.source
            if (value := number(row.get(self.name))) is not None
        ]
        steps, values = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
        finite = np.isfinite(values) & ((values > 0.0) | (not self.log))
        if finite.any():
            x, y = thin(steps[finite], values[finite])
            style = {"marker": "o", "markersize": 3.5} if self.dots else {}
            crowded = len(steps) > 2 * _POINTS
            axis.plot(x, y, color=_PALE if crowded else _CURVE, linewidth=0.9, **style)  # type: ignore[arg-type]
            if crowded:
                axis.plot(*_middle(steps[finite], values[finite]), color=_CURVE, linewidth=1.1)
            self._limits(axis, values[finite])
        bad = steps[~np.isfinite(values)]
        if len(bad):
            top = np.full(len(bad), 0.96)
            axis.plot(
                bad, top, "x", color=_SEVERITY["fatal"], transform=axis.get_xaxis_transform(),
                markersize=5, clip_on=False,
            )  # fmt: skip
        for item in events:
            peak = item.evidence.get("peak")
            if item.evidence["quantity"] == self.name and isinstance(peak, float):
                axis.plot(
                    item.evidence.get("peak_step", item.first_step), peak * self.scale, "v",
                    color=_SEVERITY[item.severity], markersize=5, zorder=5,
                )  # fmt: skip
        axis.set_ylabel(self.label, fontsize=9)
        axis.grid(alpha=0.25, linewidth=0.5)
        axis.tick_params(labelsize=8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)

    def _limits(self, axis: Axes, values: Any) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

        low, high = float(values.min()), float(values.max())
        if self.log:
            axis.set_yscale("log")
            low, high = low / 1.25, high * 1.25
            subs = (1.0, 2.0, 5.0) if high / low < 300.0 else (1.0,)
            axis.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_locator(NullLocator())
        else:
            if self.dots:
                low = min(low, 0.0)
            room = max(0.07 * (high - low), 0.03 * abs(high), 1e-3)
            low, high = (max(0.0, low - room) if low >= 0.0 else low - room), high + room
        axis.set_ylim(low, high)
        if self.level is None or not low <= (level := self.level * self.scale) <= high:
            return
        axis.axhline(level, color=_GREY, linewidth=0.8, linestyle=":")
        axis.annotate(
            self.level_name, (1.0, level), xycoords=("axes fraction", "data"),
            xytext=(-2, -2 if self.name == "logit_scale" else 2), textcoords="offset points",
            ha="right", va="top" if self.name == "logit_scale" else "bottom",
            fontsize=7, color=_GREY,
            bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5},
        )  # fmt: skip


def thin(steps: Any, values: Any) -> tuple[Any, Any]:
    """At most two points a bin, its lowest and its highest: a spike of one step stays."""
    if len(steps) <= 2 * _POINTS:
        return steps, values
    edges = np.linspace(0, len(steps), _POINTS + 1).astype(int)
    kept: list[int] = []
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        part = values[begin:end]
        kept += sorted({begin + int(part.argmin()), begin + int(part.argmax())})
    return steps[kept], values[kept]


def _middle(steps: Any, values: Any) -> tuple[Any, Any]:
    """Medians of a few hundred stretches: where a noisy curve runs."""
    parts = zip(np.array_split(steps, 300), np.array_split(values, 300), strict=True)
    pairs = [(float(part.mean()), float(np.median(value))) for part, value in parts]
    return np.array([x for x, _ in pairs]), np.array([y for _, y in pairs])


def _lanes(events: Sequence[Event]) -> list[tuple[str, list[Event]]]:
    """Events by marker, in the rules' order."""
    names = sorted({item.marker for item in events}, key=MARKERS.index)
    return [(name, [item for item in events if item.marker == name]) for name in names]


def _draw_lanes(axis: Axes, lanes: list[tuple[str, list[Event]]], last: int) -> None:
    least = last * 0.006
    for place, (_, events) in enumerate(lanes):
        for item in sorted(events, key=_by_weight):
            width = max(item.last_step - item.first_step, least)
            axis.barh(
                place, width, left=item.first_step - least / 2, height=0.62,
                color=_SEVERITY[item.severity],
            )  # fmt: skip
    axis.set_yticks(range(len(lanes)), [name for name, _ in lanes], fontsize=8)
    axis.set_ylim(len(lanes) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", bottom=False, labelbottom=False)
    axis.grid(axis="x", alpha=0.25, linewidth=0.5)
    for side in ("top", "right", "left", "bottom"):
        axis.spines[side].set_visible(False)


def _shade(axis: Axes, events: Sequence[Event], last: int) -> None:
    """Behind a curve: lines for short events, bands for long ones, each place shaded once."""
    covered = np.zeros(last + 2, dtype=bool)
    for item in sorted(events, key=_by_weight, reverse=True):
        if item.severity == "info":
            continue
        colour = _SEVERITY[item.severity]
        if item.last_step - item.first_step < last * 0.01:
            axis.axvline(item.first_step, color=colour, linewidth=0.8, alpha=0.6, zorder=0)
            continue
        for begin, end in _gaps(covered, item.first_step, min(item.last_step, last)):
            axis.axvspan(begin, end, color=colour, alpha=0.10, linewidth=0)
        covered[item.first_step : item.last_step + 1] = True


def _gaps(covered: Any, first: int, last: int) -> list[tuple[int, int]]:
    """The parts of first..last that are not covered yet."""
    free = np.flatnonzero(~covered[first : last + 1]) + first
    if not len(free):
        return []
    parts = np.split(free, np.flatnonzero(np.diff(free) > 1) + 1)
    return [(int(part[0]), int(part[-1]) + 1) for part in parts]


def _note_stop(axis: Axes, step: int, last: int) -> None:
    left = step > 0.8 * last
    axis.annotate(
        f"stop at {step}", (step, 0.97), xycoords=("data", "axes fraction"),
        xytext=(-8 if left else 8, 0), textcoords="offset points",
        ha="right" if left else "left", va="top", fontsize=8, color=_SEVERITY["fatal"],
    )  # fmt: skip


def _by_weight(item: Event) -> tuple[int, int]:
    """Lighter ones first, so that heavier ones are drawn over them."""
    return (list(_SEVERITY).index(item.severity), -PRECEDENCE.index(item.verdict))


def _head(figure: Figure, title: str, verdict: str = "", note: str = "") -> None:
    top = 1.0 - 0.08 / float(figure.get_figheight())
    look: dict[str, Any] = {"va": "top", "fontsize": 11, "fontweight": "bold"}
    figure.suptitle(title, x=0.012, y=top, ha="left", **look)
    colour = _VERDICT.get(verdict, _GREY)
    figure.text(0.988, top, verdict, ha="right", color=colour, **look)
    lower = top - 0.24 / float(figure.get_figheight())
    cut = note if len(note) <= _NOTE else note[: _NOTE - 1] + "…"
    figure.text(0.012, lower, cut, va="top", ha="left", fontsize=8.5, color=_GREY)


def _legend(figure: Figure, severities: Collection[str]) -> None:
    from matplotlib.patches import Patch

    marks: list[Any] = [
        Patch(color=colour, label=name) for name, colour in _SEVERITY.items() if name in severities
    ]
    if not marks:
        return
    figure.legend(
        handles=marks, loc="outside lower left", ncols=len(marks), fontsize=8, frameon=False
    )


def _figure(width: float, height: float, *, below: float = 0.34) -> Figure:
    """A figure whose axes begin `below` inches under its upper edge."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    below_title = ConstrainedLayoutEngine(rect=(0.0, 0.0, 1.0, 1.0 - below / height))
    return Figure(figsize=(width, height), layout=below_title, facecolor="white")


def _save(figure: Figure, path: Path) -> None:
    import matplotlib

    metadata = {"Date": None} if path.suffix == ".svg" else None
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ablate"}):
        figure.savefig(path, dpi=140, metadata=metadata)
