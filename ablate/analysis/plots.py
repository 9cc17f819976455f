"""Pictures of a study as SVG for a page that is light or dark, and as PDF for a paper.

Matplotlib draws; colours are placeholders that :func:`svg` turns into CSS variables, so that one
picture follows the page's theme. Text stays text (selectable, set in the page's font). The same
input gives the same bytes: no dates, ids hashed with a fixed salt, coordinates rounded.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from ablate.analysis.table import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# role -> (colour on paper, which is also the light theme's; colour on a dark page)
PALETTE: dict[str, tuple[str, str]] = {
    "ink": ("#1d2329", "#e6e9ed"),
    "muted": ("#5f6a76", "#9aa5b1"),
    "line": ("#d9dee4", "#343c45"),
    "band": ("#eef1f5", "#262d35"),
    "paper": ("#ffffff", "#14181d"),
    "better": ("#0b7a5c", "#41c79c"),
    "worse": ("#c03221", "#ff7d6b"),
    "open": ("#9a6400", "#e0a93c"),
    "same": ("#4a6aa5", "#8fb0ec"),
    "level0": ("#6b7682", "#a4afbb"),
    "level1": ("#2563c9", "#6ea8ff"),
    "level2": ("#c2560c", "#f59a4d"),
    "level3": ("#7b3fb5", "#c094f0"),
    "level4": ("#0d8578", "#3fc9b9"),
    "level5": ("#b0286f", "#f07fb8"),
    "level6": ("#7a6a00", "#d3c04a"),
}
"""The baseline of a panel is level0; the text of a colour is legible on its page (4.5 to 1)."""

NUM_LEVEL_COLOURS = 6

_PLACEHOLDER = {role: f"#0102{index:02x}" for index, role in enumerate(PALETTE, start=16)}
_POINT = 1 / 72


def level_role(index: int) -> str:
    """Colour role of the index-th level of a panel; 0 is the baseline."""
    return "level0" if index == 0 else f"level{(index - 1) % NUM_LEVEL_COLOURS + 1}"


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
            axes.set_xlim(0, last * 1.02)
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
        alone = sum(map(bool, line.runs)) == 1
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
    """Mean over runs, on the points of the first, as far as all of them go."""
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


# ----------------------------------------------------------------------------- output


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawing that is made when it is written."""

    name: str
    """Letters, digits and dashes; unique on a page (prefix of the ids inside)."""
    title: str
    """What it shows, for those who cannot see it."""
    width: float
    """Inches."""
    height: float
    draw: Callable[[Figure, Mapping[str, str]], None]
    """Draws on a figure, with a colour for every role of PALETTE."""

    def svg(self) -> str:
        """An ``<svg>`` element for a page that defines PALETTE's roles as CSS variables."""
        buffer = io.StringIO()
        with _canvas(self, _PLACEHOLDER) as figure:
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        return _for_page(buffer.getvalue(), self)

    def pdf(self) -> bytes:
        """The same on paper, with its fonts."""
        buffer = io.BytesIO()
        with _canvas(self, {role: light for role, (light, _) in PALETTE.items()}) as figure:
            figure.savefig(buffer, format="pdf", metadata={"CreationDate": None})
        return buffer.getvalue()


@contextmanager
def _canvas(picture: Picture, colours: dict[str, str]) -> Iterator[Figure]:
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "ablate",
        "pdf.fonttype": 42,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so sizes are the same anywhere
        "font.size": 8.5,
        "axes.edgecolor": colours["line"],
        "axes.labelcolor": colours["muted"],
        "axes.linewidth": 0.8,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "text.color": colours["ink"],
        "text.parse_math": False,  # a level named "$x$" is a name
        "xtick.color": colours["line"],
        "ytick.color": colours["line"],
        "xtick.labelcolor": colours["muted"],
        "ytick.labelcolor": colours["muted"],
        "path.simplify": True,
        "axes.unicode_minus": True,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the machine's own matplotlibrc says
        matplotlib.rcParams.update(style)
        figure = Figure(figsize=(picture.width, picture.height))
        picture.draw(figure, colours)
        yield figure


_TAG = re.compile(r"<[^>]*>")
_NUMBER = re.compile(r"-?\d+\.\d{3,}")


def _short(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def _for_page(text: str, picture: Picture) -> str:
    """Matplotlib's document as an element that lives on a page beside others of its kind."""
    start = text.index("<svg")
    body = text[text.index(">", start) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style[^>]*>.*?</style>", "", body, count=1, flags=re.DOTALL)
    # ids are only needed where they are referred to, and must not clash between pictures
    used = set(re.findall(r'(?:url\(#|xlink:href="#)([^")]+)', body))
    body = re.sub(
        r'\s?\bid="([^"]*)"',
        lambda m: f' id="{picture.name}-{m[1]}"' if m[1] in used else "",
        body,
    )
    body = re.sub(r"url\(#", f"url(#{picture.name}-", body)
    body = re.sub(r'xlink:href="#', f'href="#{picture.name}-', body)
    body = _TAG.sub(lambda tag: _NUMBER.sub(_short, tag[0]), body)  # never in text
    body = body.replace("'DejaVu Sans', sans-serif", "var(--font)").replace(
        "'DejaVu Sans'", "var(--font)"
    )
    for role, colour in _PLACEHOLDER.items():
        body = body.replace(colour, f"var(--{role})")
    width, height = picture.width / _POINT, picture.height / _POINT
    return (
        f'<svg class="plot" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(picture.title)}" stroke-linejoin="round">'
        f"{body.strip()}"
    )
