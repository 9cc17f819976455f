"""What a reader of MLflow's pages is told: notes as Markdown, and saved views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ablate.analysis.results import Result
from ablate.records import dumps
from ablate.study import Study

_MOST_EVENTS_TOLD = 20


def trial_note(
    result: Result, outcome: Mapping[str, Any], events: Sequence[Mapping[str, Any]]
) -> str:
    """What came of a trial, as Markdown for its page."""
    verdict = f", verdict **{result.verdict}**" if result.verdict else ""
    lines = [f"**{result.outcome}**{verdict}"]
    if outcome.get("reason"):
        lines += ["```", str(outcome["reason"])[-2000:], "```"]
    for event in events[:_MOST_EVENTS_TOLD]:
        first, last = event.get("first_step"), event.get("last_step")
        steps = f"step {first}" if first == last else f"steps {first} to {last}"
        lines.append(f"- `{event.get('marker')}` at {steps}: {event.get('message', '')}")
    if len(events) > _MOST_EVENTS_TOLD:
        lines.append(f"- and {len(events) - _MOST_EVENTS_TOLD} more in events.jsonl")
    return "\n".join(lines)


def views_of(study: Study) -> dict[str, str]:
    """Saved views of the runs table, in the form in which MLflow's page saves its own.

    They stand in its menu "Views"; a page that does not know the form leaves them out.
    """
    objective = study.objective.metric
    factors = [f"tags.`factor.{factor.name}`" for factor in study.factors]
    upward = study.objective.direction == "minimize"

    def view(name: str, search: str, order: str, columns: Sequence[str]) -> str:
        state = {
            "searchFilter": search,
            "orderByKey": order,
            "orderByAsc": upward,
            "startTime": "ALL",
            "lifecycleFilter": "Active",
            "modelVersionFilter": "All Runs",
            "datasetsFilter": [],
            "selectedColumns": columns,
            "columnWidths": {"attributes.`Run Name`": 340},
        }
        return dumps({"name": name, "createdAt": 0, "updatedAt": 0, "state": dumps(state)})

    weighed = ["metrics.`cost`"] if study.objective.cost else []
    ended = ["metrics.`score`", *weighed, "tags.`outcome`"]
    spread = ["metrics.`score_std`", "tags.`seeds_ended`"]
    return {
        "ablate-tree": view(
            "Tree of settings and seeds",
            "",
            "attributes.start_time",
            ["attributes.`Duration`", *ended, *spread, "tags.`verdict`", "tags.`markers`"],
        ),
        "ablate-cells": view(
            "Settings, best first",
            "tags.kind = 'cell'",
            "metrics.`score`",
            [*ended, *spread, "tags.`flags`", *factors],
        ),
        "ablate-trials": view(
            "Trials, best first",
            "tags.kind = 'trial'",
            "metrics.`score`",
            [
                *ended,
                "tags.`verdict`",
                "tags.`markers`",
                "tags.`flags`",
                f"metrics.`{objective}_best`",
                "metrics.`loss`",
                "metrics.`wall_s`",
                "tags.`seed`",
                *factors,
            ],
        ),
        "ablate-unstable": view(
            "Trials with instabilities",
            "tags.kind = 'trial' and tags.markers != ''",
            "metrics.`num_events`",
            [
                *ended,
                "tags.`verdict`",
                "tags.`markers`",
                "tags.`flags`",
                "metrics.`num_events`",
                "tags.`reason`",
            ],
        ),
    }


def _cost_note(cost: str | None) -> str:
    if cost is None:
        return ""
    return f"`cost` is `{cost}` of completed trials, which the score is weighed against.\n"


def study_note(study: Study) -> str:
    """What a reader of the MLflow page should know, as Markdown."""
    objective = study.objective
    factors = "\n".join(
        f"- **{factor.name}**: "
        + (
            " · ".join(
                f"`{item.name}`" + (" (baseline)" if item.name == factor.baseline else "")
                for item in factor.levels
            )
            if factor.range is None
            else f"{factor.range.low} to {factor.range.high}, baseline `{factor.baseline}`"
        )
        for factor in study.factors
    )
    example = study.factors[0]
    level = next((i.name for i in example.levels if i.name != example.baseline), example.baseline)
    return f"""Ablation study **{study.name}**: which setting matters for `{objective.metric}`?

{factors}

Design `{study.design.name}`, {len(study.seeds)} seeds, margin {objective.margin:g}.

One run for the study, below it one per cell (named by what differs from the baseline), below that
one per seed. `score` is what a trial counts with: `{objective.metric}` at its last step, chance
level if it diverged; a cell's `score` is the mean over its seeds, `score_std` their deviation.
{_cost_note(objective.cost)}
Try in the search box:
- `tags.kind = 'cell'` — one row per setting; sort by `score`
- `tags.kind = 'trial' and tags.outcome = 'diverged'`
- ``tags.`factor.{example.name}` = '{level}'``
- `tags.verdict != 'STABLE'` — runs with instabilities; `tags.markers` says which

The study folder is the truth, this is its mirror: report.html among the artifacts has the answer.
"""
