"""Write what came of a study: a page to read, tables to reuse, verdicts for programs.

The core of a report depends on the records of training alone: a study that was interrupted and
resumed gives the same bytes as one that was not. Wall times, attempts and crash logs stand in one
section (and in cost.csv), which is left out of the core; :attr:`ReportPaths.digest` is the core's
SHA-256 and says whether two reports agree.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import secrets
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ablate.records.files import dumps
from ablate.records.folder import StudyRecord
from ablate.report.best import Recommendation
from ablate.report.page import Page, read_page
from ablate.report.pareto import weigh
from ablate.report.pictures.figures import Figures, figures_of
from ablate.report.pictures.picture import PALETTE
from ablate.report.questions import Question
from ablate.report.scale import probability
from ablate.report.views import CostView, cost_view
from ablate.study import Study
from ablate.study.table import StudyTable, read_table
from ablate.words import html_table, percent

_TEMPLATES = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class SummaryRow:
    """One comparison, for a terminal."""

    factor: str
    level: str
    reference: str
    delta: str
    interval: str
    verdict: str
    role: str
    """better, worse, same or open."""
    diverged: str
    needs_seeds: str


@dataclass(frozen=True, slots=True)
class Summary:
    """What a terminal says about a study's results."""

    name: str
    unit: str
    """Of differences: "points" or empty."""
    headlines: tuple[str, ...]
    rows: tuple[SummaryRow, ...]
    counts: tuple[tuple[str, int], ...]
    """(state, trials)."""
    partial: str
    next: tuple[tuple[str, str], ...]
    """(what to do, what to write or type)."""


@dataclass(frozen=True, slots=True)
class ReportPaths:
    """The files of a report, all in the study folder."""

    html: Path
    markdown: Path
    effects_csv: Path
    trials_csv: Path
    verdicts_json: Path
    latex: Path
    cost_csv: Path
    figures: tuple[Path, ...]
    """PDF, for papers."""
    digest: str
    """SHA-256 of the core: everything but the cost."""
    summary: Summary

    def _repr_html_(self) -> str:
        said = "".join(f"<li>{escape(text)}</li>" for text in self.summary.headlines)
        rows = (
            (f"{row.factor}: {row.reference} to {row.level}", row.delta, row.interval, row.verdict)
            for row in self.summary.rows
        )
        header = ("setting", f"difference {self.summary.unit}".strip(), "95 % interval", "verdict")
        return f"<ul>{said}</ul>{html_table(rows, header=header)}<p>{escape(str(self.html))}</p>"


def write_report(
    study: Study, record: StudyRecord, *, folder: Path | None = None, active: Collection[str] = ()
) -> ReportPaths:
    """Read the records, judge them, and write the report into `folder` (the study folder);
    `active`: ids of trials that are being attempted now."""
    table = read_table(study, record, active=active)
    page = read_page(table)
    folder = folder or record.folder
    cost = cost_view(table, str(record.folder), page.scale, more=page.use.more_trials)
    figures = figures_of(table, page.questions, page.scale, page.sweep)
    drawn = {name: Markup(picture.svg()) for name, picture in figures.core().items()}
    if figures.sweep.progress is not None:
        drawn[figures.sweep.progress.name] = Markup(figures.sweep.progress.svg())
    if figures.trade is not None:
        drawn[figures.trade.name] = Markup(figures.trade.svg())

    core = {
        "effects.csv": effects_csv(page.questions),
        "trials.csv": trials_csv(table),
        "effects.tex": latex_table(page),
    }
    verdicts = verdicts_of(table, page)
    digest = hashlib.sha256()
    for text in (
        *core.values(),
        dumps(verdicts),
        _render("report.html.j2", page, None, "", figures, drawn),
        _render("report.md.j2", page, None, "", figures, {}),
    ):
        digest.update(text.encode())
    name = digest.hexdigest()
    files = {
        **core,
        "verdicts.json": dumps({"digest": name, **verdicts}, indent=1) + "\n",
        "report.html": _render("report.html.j2", page, cost, name, figures, drawn),
        "report.md": _render("report.md.j2", page, cost, name, figures, {}),
        "cost.csv": cost_csv(table),
        **pareto_files(table),
    }
    for file, text in files.items():
        _write(folder / file, text.encode())
    papers = [*figures.effects.values(), *figures.interactions, *figures.sweep.everything()]
    papers += [picture for picture in (figures.path, figures.trade) if picture is not None]
    for picture in papers:
        _write(folder / "figures" / f"{picture.name}.pdf", picture.pdf())
    return ReportPaths(
        html=folder / "report.html",
        markdown=folder / "report.md",
        effects_csv=folder / "effects.csv",
        trials_csv=folder / "trials.csv",
        verdicts_json=folder / "verdicts.json",
        latex=folder / "effects.tex",
        cost_csv=folder / "cost.csv",
        figures=tuple(folder / "figures" / f"{picture.name}.pdf" for picture in papers),
        digest=name,
        summary=_summary(page),
    )


def _summary(page: Page) -> Summary:
    return Summary(
        name=page.name,
        unit=page.scale.unit,
        headlines=(
            *(f"{finding.expected}: {finding.found}" for finding in page.expected),
            *(page.sweep.headlines if page.sweep else ()),
            *(
                f"{question.title}: {question.analysis.headline}"
                if len(page.questions) > 1
                else question.analysis.headline
                for question in page.questions
            ),
            *(() if page.sweep else (page.use.sentence,)),
        ),
        rows=tuple(
            SummaryRow(
                row.factor,
                row.level,
                row.reference,
                row.delta,
                row.interval,
                row.verdict,
                row.role,
                row.diverged,
                row.needs,
            )
            for question in page.questions
            for row in page.contrasts[question.key]
        ),
        counts=page.runs.counts,
        partial=page.partial,
        next=tuple((step.text, step.code) for step in page.next),
    )


# --------------------------------------------------------------------------- templates


def _render(
    template: str,
    page: Page,
    cost: CostView | None,
    digest: str,
    figures: Figures,
    pictures: dict[str, Markup],
) -> str:
    environment = _html() if template.endswith(".html.j2") else _markdown()
    return environment.get_template(template).render(
        page=page, cost=cost, digest=digest, figures=figures, pictures=pictures, palette=PALETTE
    )


@lru_cache(maxsize=1)
def _html() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= _FILTERS
    return environment


@lru_cache(maxsize=1)
def _markdown() -> jinja2.Environment:
    # Every value is escaped as it is written, as autoescape does for HTML.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=False,
        finalize=_finalize,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= _FILTERS
    return environment


def _finalize(value: Any) -> Any:
    if isinstance(value, Markup):
        return value
    return markdown_text(value) if isinstance(value, str) else value


_MARKDOWN = re.compile(r"([\\`*_\[\]|~#])")


def markdown_text(text: str) -> str:
    """`text` as Markdown that shows it, on one line, inside a table cell too."""
    text = _MARKDOWN.sub(r"\\\1", " ".join(text.split(" ")).replace("\r", " ").replace("\n", " "))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _code(text: str) -> Markup:
    """Inside a fence nothing needs escaping but the fence."""
    return Markup(text.replace("```", "'''"))


def _percent(share: float) -> str:
    return percent(share) if share >= 0.005 else "< 1 %"


def _breakable(name: str) -> Markup:
    """A setting's name that a narrow column breaks between its words, not within them."""
    return Markup(re.sub("[=_]", r"\g<0><wbr>", escape(name)))


def _groupby_in_order(items: Iterable[Any], attribute: str) -> list[tuple[Any, list[Any]]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(getattr(item, attribute), []).append(item)
    return list(groups.items())


_FILTERS = {
    "probability": probability,
    "percent": _percent,
    "breakable": _breakable,
    "groupby_in_order": _groupby_in_order,
    "code": _code,
}


# --------------------------------------------------------------------------- tables


def guard(value: Any) -> Any:
    """A CSV cell that a spreadsheet reads as text, not as a formula; numbers stay numbers."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r", "\n"):
        return f"'{value}"
    return value


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([guard(cell) for cell in header])
    for row in rows:
        writer.writerow(["" if cell is None else guard(cell) for cell in row])
    return buffer.getvalue()


def effects_csv(questions: Sequence[Question]) -> str:
    """Every contrast with full precision; differences in the objective's own unit."""
    header = (
        "question",
        "factor",
        "level",
        "reference",
        "n",
        "delta",
        "ci_low",
        "ci_high",
        "ci_adjusted_low",
        "ci_adjusted_high",
        "p",
        "p_adjusted",
        "p_equivalence",
        "verdict",
        "direction",
        "basis",
        "diverged",
        "runs",
        "reference_diverged",
        "reference_runs",
        "fisher_p",
        "needs_seeds",
        "estimand",
        "method",
    )
    rows = []
    for question in questions:
        for c in question.analysis.contrasts:
            low, high = c.ci or (None, None)
            low_all, high_all = c.ci_adjusted or (None, None)
            rows.append(
                (
                    question.key,
                    c.factor,
                    c.level,
                    c.reference,
                    c.n,
                    c.delta,
                    low,
                    high,
                    low_all,
                    high_all,
                    c.p,
                    c.p_adjusted,
                    c.p_equivalence,
                    c.verdict,
                    c.direction,
                    c.basis,
                    *c.diverged,
                    *(c.divergence.reference if c.divergence else (0, 0)),
                    c.divergence.fisher_p if c.divergence and c.divergence.any else None,
                    c.needs_seeds,
                    c.estimand,
                    c.method,
                )
            )
    return _csv(header, rows)


def trials_csv(table: StudyTable) -> str:
    """Every trial of the study, those without an outcome too."""
    factors = [factor.name for factor in table.study.factors]
    header = [
        "trial",
        *factors,
        "seed",
        "outcome",
        "value",
        "best",
        "best_epoch",
        "step",
        "verdict",
        "flags",
        "events",
    ]
    return _csv(
        header,
        (
            (
                row.id,
                *(level for _, level in row.levels),
                row.seed,
                row.state,
                row.value,
                row.best,
                row.best_epoch,
                row.step,
                row.verdict,
                " ".join(row.flags),
                len(row.events),
            )
            for row in table.rows
        ),
    )


def cost_csv(table: StudyTable) -> str:
    """What each trial took."""
    header = (
        "trial",
        "cell",
        "seed",
        "outcome",
        "wall_s",
        "worker_hours",
        "attempts",
        "crashes",
        "samples_per_s",
        "data_wait",
        "mfu",
        "peak_memory_gib",
    )
    return _csv(
        header,
        (
            (
                row.id,
                cell.name,
                row.seed,
                row.state,
                row.cost.wall_s,
                row.cost.worker_hours,
                row.cost.attempts,
                row.cost.crashes,
                row.cost.samples_per_s,
                row.cost.data_wait,
                row.cost.mfu,
                row.cost.peak_memory_gib,
            )
            for cell in table.everything
            for row in cell.trials
        ),
    )


def pareto_files(table: StudyTable) -> dict[str, str]:
    """Score and cost of every cell with its place, as CSV and JSON; none without a trade."""
    trade = weigh(table)
    if trade is None:
        return {}
    goal = table.study.objective
    factors = [factor.name for factor in table.study.factors]
    header = ("cell", *factors, goal.metric, trade.cost, "on_front")
    rows = [
        (p.cell.name, *(level for _, level in p.cell.levels), p.score, p.cost, int(p.on_front))
        for p in trade.points
    ]
    content = {
        "metric": goal.metric,
        "direction": goal.direction,
        "cost": trade.cost,
        "cost_direction": goal.cost_direction,
        "cells": [
            {
                "levels": dict(point.cell.levels),
                "score": point.score,
                "cost": point.cost,
                "on_front": point.on_front,
            }
            for point in trade.points
        ],
    }
    return {
        "pareto.csv": _csv(header, rows),
        "pareto.json": dumps(content, indent=1) + "\n",
    }


def verdicts_of(table: StudyTable, page: Page) -> dict[str, Any]:
    """The judgement as data: everything the page says about effects, with full precision."""
    return {
        "format": 1,
        "study": page.name,
        "partial": page.partial,
        "trials": dict(page.runs.counts),
        "course": page.runs.course.to_dict() if page.runs.course else None,
        "images": [asdict(view) for view in page.images],
        "expected": [asdict(finding) for finding in page.expected],
        "questions": {
            question.key: {
                "title": question.title,
                "reference": question.reference,
                **question.analysis.to_dict(),
            }
            for question in page.questions
        },
        "use": _use(page.use),
        "search": page.sweep.to_dict() if page.sweep else None,
        "tuning": [
            {
                "cell": row.name,
                "candidates": [
                    {
                        "settings": table.study.nuisance_levels(cell.levels),
                        "score": score,
                        "chosen": i == row.best,
                    }
                    for i, (cell, score) in enumerate(zip(row.candidates, row.scores, strict=True))
                ],
            }
            for row in table.tuning
        ],
        "open": list(page.open),
        "next": [{"text": step.text, "code": step.code} for step in page.next],
        "not_of_this_study": [row.id for row in table.foreign],
    }


def _use(found: Recommendation) -> dict[str, Any]:
    return {
        "chosen_as": found.kind,
        "cell": dict(found.cell.levels) if found.cell else None,
        "trial": found.trial.id if found.trial else None,
        "why": found.why,
        "evidence": asdict(found.evidence) if found.evidence else None,
        "not_told_apart": list(found.rivals),
        "to_know_more": found.to_know_more,
        "more_trials": found.more_trials,
        "combination": dict(found.combination) if found.combination else None,
        "warnings": list(found.warnings),
    }


_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\N{MINUS SIGN}": "$-$",
    "\N{EN DASH}": "--",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "\n": " ",
}


def latex_text(text: str) -> str:
    """`text` as LaTeX that shows it."""
    return "".join(_LATEX.get(character, character) for character in text)


def latex_table(page: Page) -> str:
    """A booktabs table of the effects for a paper."""
    unit = " (points)" if page.scale.percent else ""
    lines = [
        r"% \usepackage{booktabs}",
        r"\begin{tabular}{llrrrrrl}",
        r"\toprule",
        rf"Factor & Level & Difference{unit} & 95\,\% interval & $n$ & $p_\mathrm{{adj}}$ "
        r"& Diverged & Verdict \\",
    ]
    for question in page.questions:
        lines.append(r"\midrule")
        if len(page.questions) > 1:
            lines.append(rf"\multicolumn{{8}}{{l}}{{\emph{{{latex_text(question.title)}}}}} \\")
        before = None
        for row in page.contrasts[question.key]:
            name = latex_text(row.factor) if row.factor != before else ""
            before = row.factor
            cells = (
                row.level, row.delta, row.interval, str(row.n), row.p_adjusted, row.diverged,
                row.verdict,
            )  # fmt: skip
            lines.append(" & ".join((name, *map(latex_text, cells))) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


# --------------------------------------------------------------------------- files


def _write(path: Path, content: bytes) -> None:
    """Readers see the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
