"""Verbs about a question: is it valid, what would run, what does the file look like?"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ablate.api import RUNS, Run, load, open_cluster
from ablate.cli.progress import showing
from ablate.cli.terminal import (
    ClusterKind,
    JsonOption,
    RunsOption,
    StudyArg,
    err,
    out,
    print_json,
)
from ablate.errors import StudyError
from ablate.words import counted

app = typer.Typer()


@app.command()
def check(study: StudyArg, as_json: JsonOption = False) -> None:
    """Validate a study file; says every problem with its line."""
    from ablate.runner.plan.outlines import look_at
    from ablate.study import Search, load_study
    from ablate.study.data import find_missing

    found = load_study(study)
    notes = [*look_at(found), *find_missing(found)]
    if isinstance(found.design, Search) and found.design.prune is not None:
        from ablate.search.referee import advise  # brings scipy

        notes += advise(found)
    if isinstance(found.design, Search) and found.design.warm_start:
        from ablate.search.warm_start import look_ahead  # reads the earlier studies

        notes += look_ahead(found)
    if as_json:
        print_json(
            {
                "study": found.name,
                "factors": {f.name: [level.name for level in f.levels] for f in found.factors},
                "design": found.design.name,
                "seeds": found.seeds,
                "workers": found.gang.workers,
                "notes": notes,
            }
        )
        return
    levels = sum(max(len(factor.levels) - 1, 0) for factor in found.factors)
    ranges = sum(factor.range is not None for factor in found.factors)
    drawn = f" and {counted(ranges, 'range')}" if ranges else ""
    out.print(
        f"{study}: fine. {counted(len(found.factors), 'factor')} with {counted(levels, 'level')}"
        f"{drawn} beside the baseline, {found.design.name}, {counted(len(found.seeds), 'seed')}, "
        f"{counted(found.gang.workers, 'worker')} a trial.",
        markup=False,
        soft_wrap=True,
    )
    for note in notes:
        out.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
    plan = f"Whether all of it can run, and what it costs: ablate plan {study}"
    out.print(plan, markup=False, soft_wrap=True)


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="Study file to write.", metavar="STUDY.yaml")] = Path(
        "study.yaml"
    ),
    recipe: Annotated[
        str | None, typer.Option(help="What is trained; `command` is any program.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs of one trial; 0: CPUs.")] = None,
    about: Annotated[
        list[str] | None, typer.Option(help="What to ask, e.g. precision; may be repeated.")
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="FIELD=VALUE of the baseline; may be repeated."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Replicates of every cell.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Write a commented study file from options or answers.

    Asks for what no option says, where somebody can answer. What it writes passes `ablate check`.
    """
    from ablate.cli.questions import ask_for
    from ablate.study import parse_study
    from ablate.study.begin import draft
    from ablate.study.data import find_missing
    from ablate.trial.recipe import load as load_recipe

    if file.exists():
        raise StudyError(f"{file} exists; give another name, or check it: ablate check {file}")
    asked = ask_for(recipe, gpus, about, change)
    text = draft(
        asked.recipe,
        load_recipe(asked.recipe),
        asked.beginning,
        file=str(file),
        fields=asked.fields,
        about=asked.about,
        seeds=seeds,
        workers=max(asked.gpus, 1),
        gpus=asked.gpus,
    )
    found = parse_study(text, path=str(file))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    lacks = find_missing(found)
    if as_json:
        names = [factor.name for factor in found.factors]
        print_json({"file": str(file), "recipe": found.recipe, "factors": names, "missing": lacks})
        return
    told = f"{file}: {counted(len(found.factors), 'factor')}, recipe {found.recipe}."
    out.print(told, markup=False, soft_wrap=True)
    for missing in lacks:
        note = f"note: {missing}; edit the baseline"
        out.print(note, style="yellow", markup=False, soft_wrap=True)
    out.print(f"Next: ablate plan {file}", markup=False, soft_wrap=True)


@app.command()
def plan(
    study: StudyArg,
    runs: RunsOption = RUNS,
    samples_per_s: Annotated[
        float | None, typer.Option(help="Throughput of one gang, for the cost.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Gangs that run at a time.")] = 1,
    probe: Annotated[
        bool, typer.Option("--probe", help="Run a few steps of every distinct shape first.")
    ] = False,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to probe on; a private one if left out.")
    ] = None,
    cluster: Annotated[
        ClusterKind, typer.Option(help="Where to probe: ray, or local processes.")
    ] = ClusterKind.RAY,
    commands: Annotated[
        bool, typer.Option("--commands", help="Print the line of every trial, and nothing else.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Print what launch would run, its cost, and what it can show."""
    from ablate.cli.display import render_plan

    loaded = load(study, runs=runs)
    if commands:
        _print_commands(loaded, as_json=as_json)
        return
    if probe:
        from ablate.runner import agenda, controller, hold
        from ablate.runner.plan.probe import measure

        with (
            hold.controlling(loaded.record),
            open_cluster(loaded.study.recipe, cluster.value, address=address) as machines,
        ):
            measure(
                loaded.study,
                loaded.record,
                agenda.planned(loaded.study, loaded.record),
                machines,
                entry=controller.WORKER,
                tell=lambda line: err.print(line, markup=False),
            )
    with showing(err, "planning"):
        made = loaded.plan(samples_per_s=samples_per_s, concurrency=concurrency)
    if as_json:
        print_json(made.to_json())
        return
    out.print(render_plan(made))


def _print_commands(loaded: Run, *, as_json: bool) -> None:
    from ablate.runner.plan.commands import commands_of

    lines = commands_of(loaded.study, loaded.record)
    if as_json:
        print_json([asdict(line) for line in lines])
        return
    for line in lines:
        sys.stdout.write(f"# {line.trial_id} {line.name} seed {line.seed}\n")
        sys.stdout.write(f"{line.command}\n" if line.command else f"# none: {line.why_not}\n")


@app.command()
def schema(
    verb: Annotated[
        str | None, typer.Argument(help="Verb whose --json is meant, e.g. status.")
    ] = None,
) -> None:
    """Print the JSON schema of study files, or of a verb's --json."""
    from ablate.cli.schemas import schema_of
    from ablate.study import json_schema

    print_json(json_schema() if verb is None else schema_of(verb))
