"""What a reader of MLflow's pages is told in words, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ablate.analysis.results import Result
from ablate.study import Study
from ablate.tracking.mlflow.answer import Answer, Effect
from ablate.tracking.mlflow.measures import Measures
from ablate.tracking.mlflow.views import OPENING, factor_key, run_link, view_link

_MOST_EVENTS = 20
_MOST_LINKS = 6
"""Views of single factors that are linked to."""

Events = Sequence[Mapping[str, Any]]


def trial_note(
    result: Result,
    outcome: Mapping[str, Any],
    events: Events,
    *,
    measures: Measures,
    run_id: str,
    is_drawn: bool,
) -> str:
    """What came of a trial: the page shows four lines, and the rest where it is asked for."""
    value = _value(result.value, measures)
    verdict = f", verdict **{result.verdict}**" if result.verdict else ""
    lines = [f"**{result.outcome}**{value and f' at {value}'}{verdict}"]
    if outcome.get("reason"):
        lines += ["```", str(outcome["reason"])[-2000:], "```"]
    if is_drawn:
        lines += ["", f"![its course](get-artifact?path=timeline.png&run_uuid={run_id})", ""]
    for event in events[:_MOST_EVENTS]:
        first, last = event.get("first_step"), event.get("last_step")
        steps = f"step {first}" if first == last else f"steps {first} to {last}"
        lines.append(f"- `{event.get('marker')}` at {steps}: {event.get('message', '')}")
    if len(events) > _MOST_EVENTS:
        lines.append(f"- and {len(events) - _MOST_EVENTS} more in events.jsonl")
    return "\n".join(lines)


def cell_note(
    effect: Effect | None,
    seeds: Sequence[tuple[int, str, Result | None]],
    *,
    measures: Measures,
    experiment: str,
) -> str:
    """What came of a setting: against the baseline, and seed by seed (seed, run, result)."""
    lines = []
    if effect is not None and effect.difference:
        lines.append(f"**{effect.verdict}**: {effect.difference} against the baseline")
    elif effect is not None:
        lines.append(f"**{effect.verdict}**")
    lines += ["", "| seed | outcome | score | verdict |", "|---|---|---|---|"]
    for seed, run_id, result in seeds:
        name = f"[{seed}]({run_link(experiment, run_id)})" if run_id else str(seed)
        if result is None:
            lines.append(f"| {name} | not ended | | |")
            continue
        value = _value(result.value, measures)
        lines.append(f"| {name} | {result.outcome} | {value} | {result.verdict} |")
    return "\n".join(lines)


def study_note(study: Study, answer: Answer | None, *, experiment: str, run_id: str) -> str:
    """What stands above the table of runs: its first line is always seen, the rest on demand."""
    said = answer.sentence if answer is not None else "No trial has ended yet."
    links = {
        "Settings": view_link(experiment, OPENING),
        "Trials": view_link(experiment, "trials"),
        "Unstable": view_link(experiment, "unstable"),
        "Report": run_link(experiment, run_id, "artifacts/report.html"),
        "Command": run_link(experiment, run_id, "artifacts/command.txt"),
    }
    factors = {
        factor.name: view_link(experiment, factor_key(factor.name))
        for factor in study.compared[:_MOST_LINKS]
    }
    keys = Measures(study)
    example = study.factors[0]
    return f"""{said} {_row(links)}

Level against level: {_row(factors)}

{answer.use.why if answer is not None else ""}

Study **{study.name}** asks which setting matters for `{study.objective.metric}`. Design \
`{study.design.name}`, {len(study.seeds)} seeds, margin {study.objective.margin:g}.

{_factors(study)}

Runs are of three kinds: `kind=cell` a setting with the mean of its seeds (`_low`, `_high`: the \
worst and the best of them), `kind=trial` one seed, `kind=study` report and files. `{keys.score}` \
is what a trial counts with: `{study.objective.metric}`, \
{study.objective.name_choice(study.objective.at)}, chance level if it diverged. \
`verdict` of a cell is against the baseline; `difference` has its 95 % interval.
{_cost(study.objective.cost)}
Try in the search box:

- `tags.kind = 'trial' and metrics.{keys.score} > 18`
- `tags.kind = 'trial' and attributes.status = 'FAILED'`: what diverged or broke
- `tags.kind = 'cell' and tags.verdict LIKE '%better%'`
- `tags.markers LIKE '%loss_spike%'`
- ``params.`{example.name}` = '{example.baseline}'``

The study folder is the truth, this is its mirror.
"""


def _row(links: Mapping[str, str]) -> str:
    return " · ".join(f"[{name}]({link})" for name, link in links.items())


def _value(value: float | None, measures: Measures) -> str:
    if value is None:
        return ""
    told = f"{value * measures.factor:.4g}"
    return f"{told} %" if measures.factor != 1.0 else told


def _factors(study: Study) -> str:
    lines = []
    for factor in study.factors:
        if factor.range is not None:
            levels = f"{factor.range.low} to {factor.range.high}, baseline `{factor.baseline}`"
        else:
            levels = " · ".join(
                f"`{item.name}`" + (" (baseline)" if item.name == factor.baseline else "")
                for item in factor.levels
            )
        lines.append(f"- **{factor.name}**: {levels}")
    return "\n".join(lines)


def _cost(cost: str | None) -> str:
    if cost is None:
        return ""
    return f"`cost` is `{cost}` of completed trials, which the score is weighed against.\n"
