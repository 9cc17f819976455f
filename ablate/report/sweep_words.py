"""The answer of a search in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ablate.analysis.axes import Axis
from ablate.analysis.cliff import Cliff
from ablate.analysis.results import Cell
from ablate.analysis.sweep import MOVED, NOTHING, Answer, Effect, Estimate
from ablate.report.scale import Scale
from ablate.study import Study
from ablate.words import are, counted


@dataclass(frozen=True, slots=True)
class SweepRow:
    """What is said of one factor."""

    factor: str
    role: str
    """better, same, open or worse: how the chip is coloured."""
    chip: str
    sentence: str


def levels_of(axes: Sequence[Axis], cell: Cell) -> dict[str, str]:
    """Factor -> level."""
    return {axis.name: level for axis, level in zip(axes, cell, strict=True)}


def name_of(study: Study, axes: Sequence[Axis], cell: Cell) -> str:
    """What differs from the baseline."""
    return study.change_name(levels_of(axes, cell))


# ------------------------------------------------------------------ sentences


def amount(scale: Scale, number: float) -> str:
    """A size with its unit."""
    text = scale.delta(abs(number)).lstrip("+")
    return f"{text} {scale.unit}" if scale.unit else text


def between(scale: Scale, found: Estimate) -> str:
    """An interval of sizes: "0.4 to 1.9"."""
    low, high = (scale.delta(end).lstrip("+") for end in (found.low, found.high))
    return f"{low} to {high}"


def use_sentence(study: Study, found: Answer, scale: Scale) -> str:
    """What to use and how good that is believed to be."""
    use = found.use
    metric = study.objective.metric
    if use is None:
        if found.completed:
            return "Nothing to use yet: each cell that completed has something against it."
        return f"Nothing to use yet: {found.why_no_model}."
    name = name_of(study, found.axes, use.cell)
    if not math.isfinite(use.score.low):
        return (
            f"Best observed: {name}, {metric} {scale.value(use.score.mean)}. How much of that is "
            f"luck is not known: {found.why_no_model}."
        )
    believed = (
        f"{metric} {scale.value(use.score.mean)} "
        f"({scale.value(use.score.low)} to {scale.value(use.score.high)})"
    )
    if name == "baseline":
        return f"Keep the baseline: no cell is believed to be better. Its {believed}."
    text = f"Use {name}: {believed}"
    if use.gain is None:
        return text + ". The baseline has no score to compare it with."
    text += f", {scale.delta(use.gain.mean)} {scale.unit}".rstrip()
    text += f" over the baseline ({scale.interval((use.gain.low, use.gain.high))})."
    if use.gain.low <= 0:
        text += " That it is better than the baseline is not shown."
    return text


def left_sentence(study: Study, found: Answer, scale: Scale) -> str:
    """What could still be gained; empty where that is not known."""
    if found.left is None:
        return ""
    margin = study.objective.margin
    text = (
        f"The best setting of this space is expected to gain {amount(scale, found.left.mean)} "
        f"more ({between(scale, found.left)})"
    )
    if found.left.mean < margin:
        return f"{text}, less than your margin of {amount(scale, margin)}: stop here."
    return f"{text}, more than your margin of {amount(scale, margin)}: it is worth going on."


def effect_row(
    effect: Effect, cliffs: Sequence[Cliff], axes: Sequence[Axis], scale: Scale
) -> SweepRow:
    """What is said of one factor."""
    axis = effect.axis
    words = {MOVED: ("better", "moved it"), NOTHING: ("same", "did nothing")}
    role, chip = words.get(effect.verdict, ("open", "not known"))
    best = level_words(axis, float(effect.nodes[effect.best]))
    worst = level_words(axis, float(effect.nodes[effect.worst]))
    span = f"{amount(scale, effect.span.mean)} ({between(scale, effect.span)})"
    if effect.verdict == NOTHING:
        where = f"Anywhere from {_ends(effect)}" if axis.is_smooth else "Whichever level it has"
        text = f"{where}, it changes the score by less than the margin: choose freely."
    elif effect.verdict == MOVED:
        text = f"It moves the score by {span}. Best at {best}. {_good(effect)}"
    elif effect.span.low > 0:
        text = (
            f"It moves the score by {span}: best at {best}, worst at {worst}. Whether that is more "
            "than the margin is open."
        )
    else:
        text = f"{span} between {best}, its best so far, and {worst}: neither shown nor ruled out."
    if axis.only_if:
        where = " and ".join(f"{k}={' or '.join(sorted(v))}" for k, v in axis.only_if)
        text += f" It counts only with {where}."
    for cliff in cliffs:
        if axes[cliff.axis] is axis:
            text += " " + _cliff_sentence(axis, cliff)
    return SweepRow(axis.name, role, chip, text)


def level_words(axis: Axis, position: float) -> str:
    """A level for people: a range's value with two digits."""
    if axis.levels:
        return axis.level(position)
    value = axis.value(position)
    return str(round(value)) if axis.is_whole and abs(value) < 1e6 else f"{value:.2g}"


def _ends(effect: Effect) -> str:
    first, last = (float(effect.nodes[i]) for i in (0, -1))
    return f"{level_words(effect.axis, first)} to {level_words(effect.axis, last)}"


def _good(effect: Effect) -> str:
    """Which part of the axis is within the margin of the best."""
    axis = effect.axis
    if all(effect.good):
        return ""
    if not axis.is_smooth:
        rest = [
            axis.level(float(p))
            for i, (p, good) in enumerate(zip(effect.nodes, effect.good, strict=True))
            if good and i != effect.best
        ]
        if not rest:
            return "No other level is within the margin of it."
        return f"{', '.join(rest)} {are(len(rest))} within the margin of it."
    low = high = effect.best
    while low > 0 and effect.good[low - 1]:
        low -= 1
    while high < len(effect.good) - 1 and effect.good[high + 1]:
        high += 1
    if low == high:
        return "Nothing else that was asked is within the margin of it."
    one, two = (level_words(axis, float(effect.nodes[i])) for i in (low, high))
    return f"From {one} to {two} it is within the margin of the best."


def _cliff_sentence(axis: Axis, cliff: Cliff) -> str:
    if cliff.levels:
        bad = [f"{name} ({k} of {n})" for name, k, n in cliff.levels if n and 2 * k > n]
        listed = ", ".join(bad) or ", ".join(f"{name} ({k} of {n})" for name, k, n in cliff.levels)
        return f"Runs diverge at {listed}."
    side = "Above" if cliff.above else "Below"
    if axis.levels:
        return f"{side} about {axis.level(min(max(cliff.at, 0.0), 1.0))} runs diverge."
    low, high = (level_words(axis, p) for p in cliff.interval)
    return f"{side} {level_words(axis, cliff.at)} ({low} to {high}) runs diverge."


def pair_sentence(found: Answer, scale: Scale) -> str:
    """The strongest pair of factors, and whether it is shown; empty with one factor."""
    pair = found.pair
    if pair is None:
        return ""
    one, two = (axis.name for axis in pair.axes)
    (a, b), (c, d) = pair.at
    size = f"{amount(scale, pair.size.mean)} ({between(scale, pair.size)})"
    if not pair.is_shown:
        return (
            f"No two factors are shown to depend on each other; the strongest pair is {one} and "
            f"{two}, {size}."
        )
    return (
        f"{one} and {two} depend on each other: what {one} changes from {a} to {b} differs by "
        f"{size} between {two}={c} and {two}={d}."
    )


def divergence_sentence(found: Answer) -> str:
    """What diverged, and where divergence begins."""
    if not found.diverged:
        return "No run diverged."
    text = f"Runs of {counted(found.diverged, 'cell')} diverged"
    if not found.cliffs:
        return f"{text}; no factor explains that yet."
    words = " ".join(
        f"{found.axes[cliff.axis].name}: {_cliff_sentence(found.axes[cliff.axis], cliff)}"
        for cliff in found.cliffs
    )
    return f"{text}. {words}"


def basis_sentence(found: Answer, scale: Scale) -> str:
    """What the answer rests on, and what took no part."""
    text = f"From {counted(found.completed, 'cell')} with a completed run"
    if found.noise is not None:
        text += (
            ", by a model of the score (a Gaussian process of single factors and pairs) that puts "
            f"the noise of one run at {amount(scale, found.noise)} (sd)"
        )
    text += ". Intervals are 95 %."
    if found.diverged:
        text += " Diverged runs say where divergence begins, not how good a setting is."
    if found.pruned:
        text += (
            f" {counted(found.pruned, 'cell')} {are(found.pruned)} left out, having been ended "
            "early: such a score is not one of the whole schedule."
        )
    return text
