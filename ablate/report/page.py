"""What a report says, as plain values: no HTML, no Markdown, no drawing.

The templates only lay these values out, so each format says the same.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ablate.analysis.analysis import Analysis
from ablate.analysis.hypothesis import Finding, hold_against
from ablate.analysis.verdict import EQUIVALENT, NEGLIGIBLE
from ablate.report.aliases import alias_table
from ablate.report.best import Recommendation, recommend
from ablate.report.course import Course, course_of
from ablate.report.images import ImageView, image_views
from ablate.report.instability import Instability, instability
from ablate.report.next_steps import Step, next_steps, open_questions
from ablate.report.questions import ContrastRow, Question, contrast_rows, questions
from ablate.report.scale import Scale, scale_of
from ablate.report.sweep import Sweep, sweep_of
from ablate.report.views import (
    STATES,
    CellView,
    TrialView,
    TuningView,
    cell_views,
    trial_views,
    tuning_views,
)
from ablate.study import (
    FractionalFactorial,
    PlackettBurman,
    Search,
    SequentialSeeds,
    Study,
    design,
)
from ablate.study.table import UNENDED, StudyTable, TrialRow
from ablate.trial.identity import Levels
from ablate.words import are, counted, name_seeds

_DESIGN_WORDS = {
    "one_at_a_time": "one at a time: the baseline, and every other level alone",
    "full_factorial": "full factorial: every combination of levels",
    "fractional_factorial": "fractional factorial: a balanced part of all combinations",
    "plackett_burman": "Plackett-Burman: a screen of many factors in few cells",
    "leave_one_out": "leave one out: each change of the target reverted, and each made alone",
    "ablation_path": "ablation path: one change a step, the best of those left",
    "search": "search: a sampler chose the cells",
    "observed": "observed: runs made elsewhere, which nobody planned as one study",
}


@dataclass(frozen=True, slots=True)
class Setup:
    """What was asked, and how."""

    config: tuple[tuple[str, str, bool], ...]
    """(field, value, written in the study file)."""
    factors: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...]
    """(factor, baseline level, ((level, fields), ...))."""
    design_rows: tuple[tuple[str, ...], ...]
    """Signs of each cell of a fraction, a factor a column; empty for other designs."""
    aliases: tuple[tuple[str, tuple[str, ...]], ...]
    """(effect, effects it cannot be told from)."""
    same: tuple[str, ...]
    """Which levels are provably one experiment, and what was done about it, in sentences."""
    text: str
    """The study file."""
    file: str


@dataclass(frozen=True, slots=True)
class Runs:
    """What ran, run by run and cell by cell."""

    counts: tuple[tuple[str, int], ...]
    """(state, trials), ended ones first."""
    cells: tuple[CellView, ...]
    trials: tuple[TrialView, ...]
    foreign: tuple[TrialView, ...]
    tuning: tuple[TuningView, ...]
    fingerprints: tuple[tuple[str, str], ...]
    course: Course | None
    """How much each number that a run could count with tells."""

    @property
    def number(self) -> int:
        return sum(number for _, number in self.counts)


@dataclass(frozen=True, slots=True)
class Page:
    """Everything a report says, but for what it cost."""

    name: str
    question: tuple[str, ...]
    """Paragraphs of the study file's header comment."""
    facts: tuple[tuple[str, str], ...]
    partial: str
    """Why this is not the last word; empty when it is."""
    expected: tuple[Finding, ...]
    """What was expected before the runs, and what came of it."""
    images: tuple[ImageView, ...]
    """Contrasts on these images and on others."""
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
    use: Recommendation
    """Which setting to use, why, and what it takes to know more."""
    noise: str
    silence: str
    """What is said in place of an answer."""
    metric: str
    setup: Setup
    runs: Runs


def read_page(table: StudyTable) -> Page:
    """Judge and describe a study."""
    study = table.study
    asked = questions(table)
    scale = scale_of(study, (question.analysis for question in asked))
    use = recommend(table)
    swept = sweep_of(table, scale)
    return Page(
        name=study.name,
        question=header_comment(study.source.text),
        facts=_facts(table, scale),
        partial=_partial(table),
        expected=tuple(
            finding
            for question in asked[-1:]
            for finding in hold_against(
                study.hypothesis,
                question.analysis.contrasts,
                question.analysis.objective,
                is_sequential=question.analysis.is_sequential,
            )
        ),
        images=image_views(table, asked),
        questions=asked,
        scale=scale,
        contrasts={question.key: contrast_rows(table, question, scale) for question in asked},
        unasked=_unasked(study, asked),
        instability=instability(table),
        sweep=swept,
        open=open_questions(asked),
        next=(
            *next_steps(table, () if swept else asked, scale, use),
            *(swept.next if swept else ()),
        ),
        use=use,
        noise=_noise(asked, scale),
        silence=_silence(table),
        metric=study.objective.metric,
        setup=_setup(table),
        runs=_runs(table, scale),
    )


def _setup(table: StudyTable) -> Setup:
    study = table.study
    return Setup(
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
        same=tuple(design.repeats(study)),
        text=study.source.text,
        file=study.file,
    )


def _runs(table: StudyTable, scale: Scale) -> Runs:
    return Runs(
        counts=tuple((state, table.count(state)) for state in STATES if table.count(state)),
        cells=cell_views(table, scale),
        trials=trial_views(table, scale, table.rows),
        foreign=trial_views(table, scale, table.foreign),
        tuning=tuning_views(table, scale),
        fingerprints=_fingerprints(table.rows),
        course=course_of(table, scale),
    )


_LABEL = re.compile(r"(\w+)\s{3,}(\S.*)")


def header_comment(text: str) -> tuple[str, ...]:
    """Paragraphs of the comment that a study file begins with: its question, in its own words.

    A label before a gap (``Cost       12 trials``) begins one; a line for editors is left out.
    """
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        if not line.startswith("#"):
            if line.strip() or any(paragraphs):
                break
            continue
        words = line.lstrip("#").strip()
        if words.startswith("yaml-language-server:"):
            continue
        if label := _LABEL.match(words):
            paragraphs.append([f"{label[1]}: {label[2]}"])
        elif words:
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
        ("Judged by", f"{goal.metric}, {goal.name_choice(goal.at)}, {better} is better"),
        ("Margin", f"{margin}{unit}, fixed beforehand: smaller differences would not matter"),
        ("Chance", scale.value(table.chance) if table.chance is not None else "not known here"),
        ("Design", _DESIGN_WORDS[study.design.name]),
        ("Cells", str(len(table.cells))),
        ("Seeds", seeds + _further_seeds(table)),
        *_tuning_fact(study),
        ("Trained on", gang),
        *_arithmetic_fact(table),
        ("Recipe", study.recipe),
    )


def _arithmetic_fact(table: StudyTable) -> tuple[tuple[str, str], ...]:
    """What ``fp32`` was on the machines, where it is a level that others are compared with."""
    said = {
        (factor.name, level.name)
        for factor in table.study.factors
        for level in factor.levels
        if "fp32" in dict(level.fields).values()
    }
    told: set[str] = set()
    for row in table.rows:
        if row.ended and not said.isdisjoint(row.levels):
            trial = table.record.record(row.id)
            result = trial.result(max(trial.attempts(), default=0)) or {}
            told.add((result.get("facts") or {}).get("fp32") or "")
    words = " or ".join(sorted(told - {""}))
    return (("fp32 was", words),) if words else ()


def _tuning_fact(study: Study) -> tuple[tuple[str, str], ...]:
    if not study.candidates.levels:
        return ()
    tried = "; ".join(
        ", ".join(f"{name}={level}" for name, level in levels.items())
        for levels in study.candidates.levels
    )
    return (("Tuned inside every cell", f"{tried}, on {name_seeds(study.candidates.seeds)}"),)


def _further_seeds(table: StudyTable) -> str:
    """On which a search ran cells again, and confirmed the best."""
    ran = {row.seed for row in table.rows}
    parts = (("again", table.study.spare_seeds), ("to confirm", table.study.fresh_seeds))
    named = [(why, [seed for seed in seeds if seed in ran]) for why, seeds in parts]
    return "".join(f"; {why} {', '.join(map(str, seeds))}" for why, seeds in named if seeds)


def _sequential_words(seeds: SequentialSeeds) -> str:
    return f"{seeds.min} to {seeds.max}, added until each comparison is decided"


def _partial(table: StudyTable) -> str:
    unended = {state: table.count(state) for state in UNENDED}
    parts = [f"{number} {state}" for state, number in unended.items() if number]
    text = ""
    if parts:
        left = sum(unended.values())
        text = f"{counted(left, 'trial')} of {len(table.rows)} {are(left)} not there yet: " + (
            ", ".join(parts) + ". What follows speaks of the rest."
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


def _unasked(study: Study, asked: Sequence[Question]) -> tuple[str, ...]:
    if isinstance(study.design, Search):
        return ()
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


def _of_these_images(analysis: Analysis, scale: Scale) -> str:
    """How far other images of the same kind could move a difference, at most; empty if unknown.

    The binomial bound of two scores on independent images; on the same ones it is less.
    """
    goal = analysis.objective
    means = [cell.mean for cell in analysis.cells if cell.mean is not None]
    if not goal.images or not means:
        return ""
    share = min(max(fmean(means), 0.0), 1.0)
    reach = 1.96 * math.sqrt(2 * share * (1 - share) / goal.images)
    text = (
        f". Intervals speak of new seeds on these {goal.images:,} images; on other images of this "
        f"kind a difference may be another by up to {scale.delta(reach).lstrip('+')}"
        f"{' ' + scale.unit if scale.unit else ''}"
    )
    if goal.margin and reach > goal.margin:
        text += ", more than the margin"
    return text


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
    text += _of_these_images(asked[0].analysis, scale)
    inside = sum(
        contrast.verdict in (EQUIVALENT, NEGLIGIBLE)
        for question in asked
        for contrast in question.analysis.contrasts
    )
    if inside > 1:
        text += (
            f". Differences have a 5 % error for all of them together, but each of the {inside} "
            "answers that something lies within the margin has 5 % of its own"
        )
    return text + "."
