"""What a report says, as plain values: no HTML, no Markdown, no drawing.

The templates only lay these values out, so each format says the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ablate import design
from ablate.analysis.aliases import alias_table
from ablate.analysis.best import choose
from ablate.analysis.instability import Instability, instability
from ablate.analysis.next_steps import Step, next_steps, open_questions
from ablate.analysis.questions import ContrastRow, Question, contrast_rows, questions
from ablate.analysis.scale import Scale, scale_of
from ablate.analysis.sweep import Sweep, sweep_of
from ablate.analysis.table import StudyTable, TrialRow
from ablate.analysis.views import (
    STATES,
    CellView,
    TrialView,
    TuningView,
    cell_views,
    trial_views,
    tuning_views,
)
from ablate.errors import AnalysisError
from ablate.study import (
    FractionalFactorial,
    PlackettBurman,
    SequentialSeeds,
    Study,
)
from ablate.trial import Levels
from ablate.wording import are, counted, file_of, name_seeds

_DESIGN_WORDS = {
    "one_at_a_time": "one at a time: the baseline, and every other level alone",
    "full_factorial": "full factorial: every combination of levels",
    "fractional_factorial": "fractional factorial: a balanced part of all combinations",
    "plackett_burman": "Plackett-Burman: a screen of many factors in few cells",
    "leave_one_out": "leave one out: each change of the target reverted, and each made alone",
    "ablation_path": "ablation path: one change a step, the best of those left",
    "search": "search: a sampler chose the cells",
}


@dataclass(frozen=True, slots=True)
class Page:
    """Everything a report says, but for what it cost."""

    name: str
    question: tuple[str, ...]
    """Paragraphs of the study file's header comment."""
    facts: tuple[tuple[str, str], ...]
    counts: tuple[tuple[str, int], ...]
    """(state, trials), ended ones first."""
    partial: str
    """Why this is not the last word; empty when it is."""
    questions: tuple[Question, ...]
    scale: Scale
    contrasts: Mapping[str, tuple[ContrastRow, ...]]
    """By the question's key."""
    unasked: tuple[str, ...]
    """Factors of the study without any result yet."""
    instability: Instability
    sweep: Sweep | None
    """Of a search."""
    open: tuple[str, ...]
    next: tuple[Step, ...]
    cells: tuple[CellView, ...]
    trials: tuple[TrialView, ...]
    foreign: tuple[TrialView, ...]
    config: tuple[tuple[str, str, bool], ...]
    """(field, value, written in the study file)."""
    factors: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...]
    """(factor, baseline level, ((level, fields), ...))."""
    design_rows: tuple[tuple[str, ...], ...]
    """Signs of each cell of a fraction, a factor a column; empty for other designs."""
    aliases: tuple[tuple[str, tuple[str, ...]], ...]
    """(effect, effects it cannot be told from)."""
    tuning: tuple[TuningView, ...]
    same: tuple[str, ...]
    """Which levels are provably one experiment, and what was done about it, in sentences."""
    best: tuple[str, tuple[str, ...]]
    """The best cell in a sentence, and warnings about it."""
    fingerprints: tuple[tuple[str, str], ...]
    noise: str
    silence: str
    """What is said in place of an answer."""
    metric: str
    text: str
    """The study file."""
    file: str

    @property
    def num_trials(self) -> int:
        return sum(number for _, number in self.counts)


def read_page(table: StudyTable) -> Page:
    """Judge and describe a study."""
    study = table.study
    asked = questions(table)
    scale = scale_of(study, (question.analysis for question in asked))
    counts = tuple((state, table.count(state)) for state in STATES if table.count(state))
    return Page(
        name=study.name,
        question=header_comment(study.text),
        facts=_facts(table, scale),
        counts=counts,
        partial=_partial(table),
        questions=asked,
        scale=scale,
        contrasts={question.key: contrast_rows(table, question, scale) for question in asked},
        unasked=_unasked(study, asked),
        instability=instability(table),
        sweep=sweep_of(table),
        open=open_questions(asked),
        next=next_steps(table, asked, scale),
        cells=cell_views(table, scale),
        trials=trial_views(table, scale, table.rows),
        foreign=trial_views(table, scale, table.foreign),
        config=_config(study),
        factors=tuple(
            (
                factor.name,
                factor.baseline,
                tuple((level.name, _fields(level.fields)) for level in factor.levels)
                or ((f"{factor.range}", ""),),
            )
            for factor in study.factors
        ),
        design_rows=_design_rows(table),
        aliases=alias_table(study),
        tuning=tuning_views(table, scale),
        same=tuple(design.repeats(study)),
        best=_best(table),
        fingerprints=_fingerprints(table.rows),
        metric=study.objective.metric,
        noise=_noise(asked, scale),
        silence=_silence(table),
        text=study.text,
        file=file_of(study),
    )


def header_comment(text: str) -> tuple[str, ...]:
    """Paragraphs of the comment that a study file begins with: its question, in its own words."""
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        if not line.startswith("#"):
            if line.strip() or any(paragraphs):
                break
            continue
        words = line.lstrip("#").strip()
        if words:
            paragraphs[-1].append(words)
        elif paragraphs[-1]:
            paragraphs.append([])
    return tuple(" ".join(lines) for lines in paragraphs if lines)


def _facts(table: StudyTable, scale: Scale) -> tuple[tuple[str, str], ...]:
    study = table.study
    goal = study.objective
    margin = scale.delta(goal.margin).lstrip("+")
    unit = f" {scale.unit}" if scale.unit else ""
    better = "higher" if goal.direction == "maximize" else "lower"
    if study.sequential is None:
        seeds = ", ".join(map(str, study.seeds))
    else:
        seeds = _sequential_words(study.sequential)
    gang = f"{study.gang.workers} " + ("workers" if study.gang.workers > 1 else "worker")
    if study.gang.gpus_per_worker:
        gang += f" \N{MULTIPLICATION SIGN} {study.gang.gpus_per_worker} GPU"
    return (
        ("Judged by", f"{goal.metric} at the last step, {better} is better"),
        ("Margin", f"{margin}{unit}, fixed beforehand: smaller differences would not matter"),
        ("Chance", scale.value(table.chance) if table.chance is not None else "not known here"),
        ("Design", _DESIGN_WORDS[study.design.name]),
        ("Cells", str(len(table.cells))),
        ("Seeds", seeds),
        *_tuning_fact(study),
        ("Trained on", gang),
        ("Recipe", study.recipe),
    )


def _tuning_fact(study: Study) -> tuple[tuple[str, str], ...]:
    if not study.candidates:
        return ()
    tried = "; ".join(
        ", ".join(f"{name}={level}" for name, level in levels.items())
        for levels in study.candidates
    )
    return (("Tuned inside every cell", f"{tried}, on {name_seeds(study.tuning_seeds)}"),)


def _sequential_words(seeds: SequentialSeeds) -> str:
    return f"{seeds.min} to {seeds.max}, added until each comparison is decided"


def _partial(table: StudyTable) -> str:
    waiting, running = table.count("waiting"), table.count("running")
    parts = []
    if running:
        parts.append(f"{running} running or interrupted")
    if waiting:
        parts.append(f"{waiting} waiting")
    text = ""
    if parts:
        left = waiting + running
        text = f"{counted(left, 'trial')} of {len(table.rows)} {are(left)} not there yet: " + (
            " and ".join(parts) + ". What follows speaks of the rest."
        )
    aside = ""
    if table.foreign:
        number = len(table.foreign)
        aside = (
            f"{counted(number, 'trial')} in the folder {are(number)} not of this study any more "
            "(the baseline, a level, a seed or the recipe changed) and "
            f"{'takes' if number == 1 else 'take'} no part."
        )
    return " ".join(part for part in (text, table.open_ended, aside) if part)


def _silence(table: StudyTable) -> str:
    tuned = sum(row.best is not None for row in table.tuning)
    if any(row.ended for row in table.rows) and table.tuning:
        names = " and ".join(factor.name for factor in table.study.nuisance)
        return (
            f"The {names} of {tuned} of {len(table.tuning)} cells is chosen; no trial that is "
            "compared has ended yet."
        )
    return "No trial has ended yet, so there is nothing to say."


def _config(study: Study) -> tuple[tuple[str, str, bool], ...]:
    config = study.config(study.cell({}), seed=study.seeds[0])
    return tuple(
        (name, _compact(value), name in study.baseline)
        for name, value in config.items()
        if name != "seed"
    )


def _best(table: StudyTable) -> tuple[str, tuple[str, ...]]:
    """The best cell in a sentence, and what is to be known against it; empty without one."""
    try:
        choice = choose(table)
    except AnalysisError:
        return "", ()
    return choice.sentence, choice.warnings


def _unasked(study: Study, asked: Sequence[Question]) -> tuple[str, ...]:
    known = {contrast.factor for question in asked for contrast in question.analysis.contrasts}
    return tuple(factor.name for factor in study.compared if asked and factor.name not in known)


def _design_rows(table: StudyTable) -> tuple[tuple[str, ...], ...]:
    if not isinstance(table.study.design, (FractionalFactorial, PlackettBurman)):
        return ()
    usual = table.study.compared_baseline()
    return tuple(
        tuple("\N{MINUS SIGN}" if level == usual[name] else "+" for name, level in cell.levels)
        for cell in table.cells
    )


def _fields(fields: Levels | tuple[tuple[str, Any], ...]) -> str:
    return ", ".join(f"{name}: {_compact(value)}" for name, value in fields)


def _compact(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _fingerprints(rows: Iterable[TrialRow]) -> tuple[tuple[str, str], ...]:
    """Code, versions and data; a value that differs between trials is listed with all it was."""
    seen: dict[str, list[str]] = {}
    for row in rows:
        for name, value in _flatten(row.fingerprint or {}, ""):
            values = seen.setdefault(name, [])
            if value not in values:
                values.append(value)
    return tuple((name, " | ".join(sorted(values))) for name, values in sorted(seen.items()))


def _flatten(content: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, str]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _compact(value)


def _noise(asked: Sequence[Question], scale: Scale) -> str:
    """What the seed alone changes, in a sentence."""
    if not asked:
        return ""
    noise = asked[0].analysis.noise
    if noise.sigma_seed is None:
        return "With one seed nothing is known about noise."
    unit = f" {scale.unit}" if scale.unit else ""
    text = f"The seed alone moves a run by {scale.delta(noise.sigma_seed).lstrip('+')}{unit} (sd)"
    if noise.sigma_residual is not None:
        text += (
            f"; comparing runs of the same seed leaves "
            f"{scale.delta(noise.sigma_residual).lstrip('+')}{unit}"
        )
    return text + "."
