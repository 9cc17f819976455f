"""Which pictures a report has: from the table and the judgement to drawings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ablate.analysis import verdict
from ablate.analysis.verdict import MOST_SEEDS
from ablate.report.pareto import weigh
from ablate.report.path import walked
from ablate.report.pictures import plots
from ablate.report.pictures.picture import NUM_LEVEL_COLOURS, Picture, level_role
from ablate.report.pictures.sweep import SweepPictures, sweep_pictures
from ablate.report.questions import Question, verdict_role, verdict_words
from ablate.report.scale import Scale
from ablate.report.sweep import Sweep
from ablate.study import (
    FractionalFactorial,
    FullFactorial,
    OneAtATime,
    PlackettBurman,
    Search,
    Study,
)
from ablate.study.table import CellRow, StudyTable, TrialRow
from ablate.trial.identity import Outcome

_LABEL_WIDTH = 27
_WORDS_WIDTH = 30
_CELL_WIDTH = 40
_LINES = NUM_LEVEL_COLOURS
_MOST_ROWS = 48
"""Rows of the plots of cells and events: two thirds of a printed page."""
_MOST_INTERACTIONS = 6


@dataclass(frozen=True, slots=True)
class Figures:
    """Every picture of a report; the page leaves out what is None or empty."""

    effects: dict[str, Picture]
    """By the question's key."""
    curves: tuple[CurveGroup, ...]
    thin_line: str
    """What a thin line of the curves is."""
    cells: Picture | None
    events: Picture | None
    interactions: tuple[Picture, ...]
    path: Picture | None
    sweep: SweepPictures
    """Of a search."""
    trade: Picture | None
    """Score against cost: part of the cost, not of the core."""

    def core(self) -> dict[str, Picture]:
        """All but the cost's, by name."""
        found = [
            *self.effects.values(),
            *(picture for group in self.curves for picture in group.panels),
            *self.interactions,
            *self.sweep.core(),
            *(picture for picture in (self.cells, self.events, self.path) if picture),
        ]
        return {picture.name: picture for picture in found}


def figures_of(
    table: StudyTable, asked: Sequence[Question], scale: Scale, sweep: Sweep | None = None
) -> Figures:
    """The pictures that this study has something to show in."""
    return Figures(
        effects={q.key: effect_picture(q, table.study, scale) for q in asked},
        curves=curve_groups(table, scale),
        thin_line="mean of one cell" if _is_crossed(table.study) else "one seed",
        cells=cells_picture(table, scale),
        events=events_picture(table),
        interactions=tuple(p for q in asked for p in interaction_pictures(table, q, scale)),
        path=path_picture(table, scale),
        sweep=sweep_pictures(table, sweep, scale),
        trade=trade_picture(table, scale),
    )


# --------------------------------------------------------------------------- effects


def effect_picture(question: Question, study: Study, scale: Scale) -> Picture:
    """The forest plot of a question."""
    rows = []
    for contrast in question.analysis.contrasts:
        diverged, runs = contrast.diverged
        words = verdict_words(contrast)
        if diverged:
            words += f", {diverged}/{runs} diverged"
        elif contrast.verdict == verdict.INCONCLUSIVE and contrast.needs_seeds:
            few = contrast.needs_seeds <= MOST_SEEDS
            words += f", +{contrast.needs_seeds} seeds" if few else f", > {MOST_SEEDS} seeds"
        rows.append(
            plots.Effect(
                group=_cut(contrast.factor, _LABEL_WIDTH),
                label=_cut(contrast.level, _LABEL_WIDTH - 2),
                delta=None if contrast.delta is None else contrast.delta * scale.factor,
                interval=_times(contrast.ci, scale.factor),
                outer=_times(contrast.ci_adjusted, scale.factor),
                role=verdict_role(contrast),
                words=_cut(words, _WORDS_WIDTH),
                note="no seed with both runs complete",
                hollow=bool(contrast.divergence and contrast.divergence.any),
            )
        )
    unit = "percentage points of " if scale.percent else ""
    return plots.effect_plot(
        rows,
        unit=f"{unit}{study.objective.metric}",
        margin=study.objective.margin * scale.factor,
        better_up=study.objective.direction == "maximize",
        name=f"effects-{question.key}",
    )


def _times(interval: tuple[float, float] | None, factor: float) -> tuple[float, float] | None:
    if interval is None or not all(map(math.isfinite, interval)):
        return None
    return interval[0] * factor, interval[1] * factor


# --------------------------------------------------------------------------- learning curves


@dataclass(frozen=True, slots=True)
class Key:
    """One entry of a panel's legend."""

    role: str
    label: str
    note: str


@dataclass(frozen=True, slots=True)
class CurveGroup:
    """Panels that share a legend."""

    title: str
    keys: tuple[Key, ...]
    panels: tuple[Picture, ...]
    """Of the scores, where a run was measured more than once; and of the losses."""


def curve_groups(table: StudyTable, scale: Scale) -> tuple[CurveGroup, ...]:
    """Panels by factor where a level has runs of its own, else by cells."""
    study = table.study
    groups: list[tuple[str, list[tuple[str, list[CellRow]]]]] = []
    if _is_crossed(study):
        for factor in study.compared:
            names = _names(study, factor.name)
            groups.append(
                (factor.name, [(name, _cells_at(table, factor.name, name)) for name in names])
            )
    elif isinstance(study.design, OneAtATime):
        for factor in study.compared:
            names = _names(study, factor.name)
            found = [(name, table.cell({factor.name: name})) for name in names]
            groups.append((factor.name, [(name, [cell]) for name, cell in found if cell]))
    else:
        groups = _grouped_cells(table)
    made = []
    for number, (title, members) in enumerate(groups):
        shown = [(label, [cell for cell in cells if cell.trials]) for label, cells in members]
        parts = range(0, max(len(shown) - 1, 1), _LINES)
        for part in parts:
            # The first member, the reference, stands in every part.
            lines = [shown[0], *shown[1 + part : 1 + part + _LINES]]
            if (
                not any(
                    row.score.x or row.loss.x
                    for _, cells in lines[1:]
                    for cell in cells
                    for row in cell.trials
                )
                and len(shown) > 1
            ):
                continue
            words = f"{title}, {part // _LINES + 1} of {len(parts)}" if len(parts) > 1 else title
            made.append(_curve_group(table, scale, words, lines, f"{number}-{part // _LINES}"))
    return tuple(made)


def _is_crossed(study: Study) -> bool:
    """Several factors change from cell to cell, so a level stands in many cells."""
    return isinstance(study.design, (FullFactorial, FractionalFactorial, PlackettBurman))


def _cells_at(table: StudyTable, factor: str, level: str) -> list[CellRow]:
    return [cell for cell in table.cells if dict(cell.levels)[factor] == level]


def _grouped_cells(table: StudyTable) -> list[tuple[str, list[tuple[str, list[CellRow]]]]]:
    study = table.study
    base = table.baseline
    others = [cell for cell in table.cells if cell is not base]
    if isinstance(study.design, Search):
        sign = study.objective.sign
        ranked = [cell for cell in others if cell.score(table.chance) is not None]
        ranked.sort(key=lambda cell: -sign * (cell.score(table.chance) or 0.0))
        title, others = f"The best {min(len(ranked), _LINES)} cells found", ranked[:_LINES]
    else:
        title = "Cells"
    return [(title, [(cell.name, [cell]) for cell in [base, *others]])]


def _curve_group(
    table: StudyTable,
    scale: Scale,
    title: str,
    members: Sequence[tuple[str, Sequence[CellRow]]],
    tag: str,
) -> CurveGroup:
    keys, scores, losses = [], [], []
    for index, (label, cells) in enumerate(members):
        role = level_role(index)
        rows = [row for cell in cells for row in cell.trials if row.score.x or row.loss.x]
        values = [value for cell in cells for value in cell.values()]
        diverged = sum(cell.count(Outcome.DIVERGED) for cell in cells)
        note = scale.value(sum(values) / len(values)) if values else "no completed run"
        if diverged:
            note += f", {diverged} diverged"
        keys.append(
            Key(role, label + (" (baseline)" if _is_usual(table, index, label) else ""), note)
        )
        alone = len(cells) == 1
        if alone:
            complete = tuple(row.state != Outcome.DIVERGED for row in rows)
            scores.append(plots.Line(role, tuple(row.score for row in rows), complete))
            losses.append(plots.Line(role, tuple(row.loss for row in rows), complete, _marks(rows)))
        else:
            means = [
                [row for row in cell.trials if row.state == Outcome.COMPLETED] for cell in cells
            ]
            means = [mine for mine in means if mine]
            whole = (True,) * len(means)
            scores.append(
                plots.Line(
                    role, tuple(plots.mean_curve([r.score for r in m]) for m in means), whole
                )
            )
            losses.append(
                plots.Line(role, tuple(plots.mean_curve([r.loss for r in m]) for m in means), whole)
            )
    label = _score_label(table.study, scale)
    panels = [plots.loss_panel(losses, name=f"loss-{tag}")]
    if any(len(run.x) > 1 for line in scores for run in line.runs):
        panels.insert(
            0, plots.score_panel(scores, label=label, name=f"score-{tag}", scale=scale.factor)
        )
    return CurveGroup(title, tuple(keys), tuple(panels))


def _is_usual(table: StudyTable, index: int, label: str) -> bool:
    return index == 0 and label != "baseline"


def _marks(rows: Sequence[TrialRow]) -> tuple[tuple[float, float, str], ...]:
    return tuple(
        (float(event["first_step"]), peak, str(event.get("severity", "warning")))
        for row in rows
        for event, peak in zip(row.events, row.peaks, strict=True)
        if peak is not None and event.get("severity") != "info"
    )


# --------------------------------------------------------------------------- cells and events


def cells_picture(table: StudyTable, scale: Scale) -> Picture | None:
    """Every run as a dot; in the design's order, a search's and a factorial's by score."""
    cells = [cell for cell in table.cells if any(row.ended for row in cell.trials)]
    if len(cells) < 2:
        return None
    if isinstance(table.study.design, (Search, FullFactorial)):
        sign = table.study.objective.sign
        unknown = -math.inf
        cells.sort(key=lambda cell: -sign * mean if (mean := cell.mean) is not None else -unknown)
    strips = [
        plots.Strip(
            label=_cut(cell.name, _CELL_WIDTH),
            values=tuple(value * scale.factor for value in cell.values()),
            mean=None if cell.mean is None else cell.mean * scale.factor,
            diverged=cell.count(Outcome.DIVERGED),
            role="level0" if cell is table.baseline else "level1",
        )
        for cell in cells[:_MOST_ROWS]
    ]
    return plots.strip_plot(strips, label=_score_label(table.study, scale), name="cells")


def events_picture(table: StudyTable) -> Picture | None:
    """The runs in which a marker saw something, with when it did."""
    tracks = [
        plots.Track(
            label=f"{_cut(cell.name, _CELL_WIDTH)}, seed {row.seed}",
            end=float(max(row.step, *(int(event["last_step"]) for event in row.events))),
            diverged=row.state == Outcome.DIVERGED,
            events=tuple(
                (float(e["first_step"]), float(e["last_step"]), str(e.get("severity", "warning")))
                for e in row.events
            ),
        )
        for cell in table.everything
        for row in cell.trials
        if row.events
    ]
    return plots.timeline(tracks[:_MOST_ROWS], name="events") if tracks else None


# --------------------------------------------------------------------------- interactions, paths


def interaction_pictures(
    table: StudyTable, question: Question, scale: Scale
) -> tuple[Picture, ...]:
    """The largest estimable interactions: parallel lines mean that there is none."""
    found = sorted(question.analysis.interactions, key=lambda i: -abs(i.delta))
    pairs: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for interaction in found:
        pairs.setdefault(interaction.factors, []).append(interaction.levels)
    return tuple(
        _interaction_picture(table, question, pair, levels, scale, number)
        for number, (pair, levels) in enumerate(list(pairs.items())[:_MOST_INTERACTIONS])
    )


def _interaction_picture(
    table: StudyTable,
    question: Question,
    pair: tuple[str, str],
    levels: Sequence[tuple[str, str]],
    scale: Scale,
    number: int,
) -> Picture:
    first, second = pair
    reference = question.analysis.baseline
    across = list(dict.fromkeys([reference[first], *(one for one, _ in levels)]))
    along = list(dict.fromkeys([reference[second], *(two for _, two in levels)]))
    cells = _crossed(table, pair, [(one, two) for one in across for two in along])
    lines = [
        (
            level_role(index),
            _cut(two, 14),
            [
                [_scaled(_mean_of(cells[one, two], seed), scale) for seed in table.study.seeds]
                for one in across
            ],
        )
        for index, two in enumerate(along)
    ]
    return plots.step_plot(
        lines,
        ticks=[_cut(level, 16) for level in across],
        label=f"{_score_label(table.study, scale)}, by {_cut(first, 18)}; "
        f"lines: {_cut(second, 18)}",
        name=f"interaction-{question.key}-{number}",
        title=f"Interaction of {first} and {second}",
    )


def _crossed(
    table: StudyTable, pair: tuple[str, str], corners: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], list[CellRow]]:
    """Cells of each corner, for those settings of the other factors in which all corners ran.

    Other cells would mix the other factors' effects into the picture.
    """
    settings: dict[tuple[tuple[str, str], ...], dict[tuple[str, str], CellRow]] = {}
    for cell in table.cells:
        named = dict(cell.levels)
        corner = (named.pop(pair[0]), named.pop(pair[1]))
        if corner in corners and cell.values():
            settings.setdefault(tuple(named.items()), {})[corner] = cell
    whole = [found for found in settings.values() if len(found) == len(corners)]
    return {corner: [found[corner] for found in whole] for corner in corners}


def _mean_of(cells: Sequence[CellRow], seed: int) -> float | None:
    """Mean over cells of the runs of one seed; None unless all of them completed."""
    values = [r.value for cell in cells for r in cell.trials if r.seed == seed]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(cells) else None


def path_picture(table: StudyTable, scale: Scale) -> Picture | None:
    """The executed path from the baseline to the target, one change a step."""
    study = table.study
    steps = walked(table)
    if len(steps) < 2:
        return None
    positions = [[_scaled(row.value, scale) for row in cell.trials] for _, cell in steps]
    return plots.step_plot(
        [("level1", "", positions)],
        ticks=["baseline", *(_cut(f"+ {change}", 15) for change, _ in steps[1:])],
        label=_score_label(study, scale),
        name="path",
        title="The path from the baseline to the target",
        width=6.4,
    )


def trade_picture(table: StudyTable, scale: Scale) -> Picture | None:
    """Score against cost, with the cells that nothing beats in both; None without a trade."""
    study = table.study
    trade = weigh(table)
    if trade is None:
        return None
    place = {id(point): number for number, point in enumerate(trade.front, start=1)}
    return plots.trade_plot(
        [(p.cost, p.score * scale.factor, place.get(id(p))) for p in trade.points],
        x_label=trade.label,
        y_label=_score_label(study, scale),
        less_is_better=study.objective.cost_direction == "minimize",
        name="trade",
    )


def _names(study: Study, factor: str) -> list[str]:
    """Levels, the baseline's first."""
    found = study.factor(factor)
    rest = [level.name for level in found.levels if level.name != found.baseline]
    return [found.baseline, *rest]


def _scaled(value: float | None, scale: Scale) -> float | None:
    return None if value is None else value * scale.factor


def _score_label(study: Study, scale: Scale) -> str:
    return f"{study.objective.metric}, %" if scale.percent else study.objective.metric


# --------------------------------------------------------------------------- text


def _cut(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "\N{HORIZONTAL ELLIPSIS}"
