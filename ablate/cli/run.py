"""Verbs that run a study, or one setting of it."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ablate.api import RUNS, ClusterName, Run, load, open_cluster, open_run
from ablate.cli.progress import lines, showing
from ablate.cli.terminal import (
    AddressOption,
    ClusterKind,
    ClusterOption,
    CpusOption,
    JsonOption,
    RunArg,
    RunsOption,
    StorageOption,
    StudyArg,
    TrackingOption,
    err,
    out,
    print_json,
    say_behind,
    stop_signals,
)
from ablate.errors import DataError
from ablate.words import counted

if TYPE_CHECKING:
    from ablate.cluster.contract import Cluster
    from ablate.runner.plan.plan import Plan
    from ablate.study import Study

app = typer.Typer()


DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Plan, and stop there.")]


YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before starting.")]


class Again(StrEnum):
    """Which trials that have ended are tried again."""

    FAILED = "failed"


AgainOption = Annotated[
    Again | None,
    typer.Option("--again", help="Try trials again that failed or were lost: the cause is mended."),
]


@app.command()
def launch(
    study: StudyArg,
    runs: RunsOption = RUNS,
    address: AddressOption = None,
    cluster: ClusterOption = ClusterKind.RAY,
    cpus: CpusOption = None,
    tracking_uri: TrackingOption = None,
    storage: StorageOption = None,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    again: AgainOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run what is missing of a study; launch again to go on.

    Ctrl-C once lets running trials write a checkpoint and stop, twice ends them at once.
    """
    from ablate.runner.agenda import reopen_unanswered

    places = Places(cluster, address, cpus, tracking_uri, storage)
    loaded = load(study, runs=runs)
    if again is not None and not dry_run:
        reopened = reopen_unanswered(loaded.record)
        err.print(f"{counted(reopened, 'trial')} that failed or were lost are tried again.")
    _run(loaded, places, dry_run=dry_run, yes=yes, again=f"ablate launch {study}", as_json=as_json)


@app.command()
def confirm(
    run: RunArg,
    address: AddressOption = None,
    cluster: ClusterOption = ClusterKind.RAY,
    cpus: CpusOption = None,
    tracking_uri: TrackingOption = None,
    storage: StorageOption = None,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run together what looks better alone, on the study's seeds.

    Of a search, its best settings beside the baseline, on fresh seeds. What a study recommends is
    then what was measured. The same as `confirm: true` in its file.
    """
    from ablate.report.best import recommend
    from ablate.study import design
    from ablate.study.table import UNENDED, read_table

    opened = open_run(run)
    study, record = opened.study, opened.record
    table = read_table(study, record, curves=False)
    if not table.combinations and not design.confirm_search(study, table.results):
        waiting = sum(table.count(state) for state in UNENDED)
        if as_json:
            print_json(opened.status().to_json())
        elif waiting:
            out.print(
                f"{counted(waiting, 'trial')} of the study come first. Launch it again.",
                markup=False,
            )
        else:
            out.print(f"Nothing to confirm. {recommend(table).why}", markup=False, soft_wrap=True)
        return
    places = Places(cluster, address, cpus, tracking_uri, storage)
    asked = Run(replace(study, confirm=True), record)
    again = f"ablate confirm {run}"
    _run(asked, places, dry_run=dry_run, yes=yes, again=again, as_json=as_json)


@app.command()
def ladder(
    study: StudyArg,
    runs: RunsOption = RUNS,
    address: AddressOption = None,
    cluster: ClusterOption = ClusterKind.RAY,
    cpus: CpusOption = None,
    tracking_uri: TrackingOption = None,
    storage: StorageOption = None,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say which cheaper rung predicts a study's verdicts.

    Of a study file it runs what is missing of its `ladder` first, then the study; of a study
    folder, and with --json, it reads what is there. Early looks at the runs are rungs that cost
    nothing.
    """
    from ablate.cli.display import render_ladder
    from ablate.records.folder import StudyRecord
    from ablate.report.ladder import read_ladder
    from ablate.study.ladder import rungs as rungs_of

    loaded = load(study, runs=runs)
    places = Places(cluster, address, cpus, tracking_uri, storage)
    home = loaded.record.folder.parent
    rungs = [(what, rung, StudyRecord(home / rung.name)) for what, rung in rungs_of(loaded.study)]
    if not (study.is_dir() or as_json):
        for opened in (*(Run(rung, record) for _, rung, record in rungs), loaded):
            again = f"ablate ladder {study}"
            _run(opened, places, dry_run=dry_run, yes=yes, again=again, as_json=False)
        if dry_run:
            return
    found = read_ladder(loaded.study, loaded.record, rungs)
    if as_json:
        print_json(found.to_json())
        return
    out.print(render_ladder(found))
    out.print(found.sentence, markup=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Places:
    """Where trials run and where they are shown, as options say it."""

    cluster: ClusterKind
    address: str | None
    cpus: float | None
    tracking_uri: str | None
    storage: str | None

    @property
    def elsewhere(self) -> bool:
        """Whether other machines may train: a Ray that is there already."""
        return self.cluster is ClusterKind.RAY and self.address is not None


def _run(
    loaded: Run, places: Places, *, dry_run: bool, yes: bool, again: str, as_json: bool
) -> None:
    """Plan, ask, run what is missing, and say how it ended; `again` is how to go on.

    With `as_json` people are told on standard error.
    """
    from ablate.cli.display import render_plan, render_status, watching
    from ablate.runner.plan.plan import plan as make_plan
    from ablate.study.data import find_missing

    study, record = loaded.study, loaded.record
    people = err if as_json else out
    with ExitStack() as stack:
        machines: ClusterName | Cluster = places.cluster.value
        if places.cluster is ClusterKind.LOCAL and not dry_run:
            # It imports ahead, for as long as planning takes.
            machines = stack.enter_context(open_cluster(study.recipe, "local", cpus=places.cpus))
        with showing(err, "planning"):
            made = make_plan(study, record)
        people.print(render_plan(made))
        if dry_run:
            if as_json:
                print_json(loaded.status().to_json())
            return
        if made.to_run and (missing := find_missing(study)) and not places.elsewhere:
            raise DataError(
                f"{study.source.path}: {'; '.join(missing)}, and the trials would run here. Mend "
                "the paths, prepare the data, or launch on a Ray that sees them: --address auto"
            )
        if not yes and made.to_run and not may_start(made, study.budget.ask_above):
            raise typer.Exit(130)
        with stop_signals() as stop_level, watching(people) as watch:
            ended = loaded.launch(
                cluster=machines,
                address=places.address,
                cpus=places.cpus,
                tracking_uri=places.tracking_uri,
                storage=places.storage,
                stop_level=stop_level,
                watch=watch,
                look=partial(_look_before, study, record.folder, len(made.to_run)),
                behind=say_behind(record),
                mirrored=lines(err, "bringing MLflow up to date, trials"),
                say=lambda line: err.print(f"note: {line}", markup=False, soft_wrap=True),
            )
    if as_json:
        print_json(ended.to_json())
    people.print(render_status(ended, width=people.width))
    if ended.waiting and not ended.notes:
        people.print(f"Stopped. Go on with: {again}", markup=False)
        raise typer.Exit(130)
    people.print(f"Read it with: ablate report {record.folder}", markup=False)
    if ended.waiting or set(ended.outcomes) - {"completed", "diverged", "pruned"}:
        raise typer.Exit(1)


@app.command()
def status(run: RunArg, as_json: JsonOption = False) -> None:
    """Show how a study stands now, wherever its folder is seen."""
    from ablate.cli.display import render_status

    found = open_run(run).status()
    if as_json:
        print_json(found.to_json())
        return
    out.print(f"{found.name}: controller {found.controller}", style="bold")
    out.print(render_status(found, width=out.width))


@app.command()
def stop(
    run: RunArg,
    now: Annotated[bool, typer.Option("--now", help="Kill trials instead of asking.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Ask a study to stop; its trials write checkpoints first."""
    from ablate.runner.hold import read_controller, request_stop

    record = open_run(run).record
    request_stop(record, now=now)  # whoever works there, also one that is only starting, sees it
    note = read_controller(record)
    if as_json:
        seen = note or {"pid": None, "host": None}
        print_json({"folder": str(run), "process": seen["pid"], "host": seen["host"]})
        return
    if note is None:
        out.print(f"{run}: nothing is running, as far as can be seen; a launch there will stop.")
        return
    out.print(f"Asked process {note['pid']} on {note['host']} to stop. Launch again to go on.")


@app.command()
def train(
    setting: Annotated[
        Path, typer.Argument(help="Setting (best/config.yaml), or a study file.", metavar="YAML")
    ],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the run.")] = 0,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Folder of the run; runs/trained/ID if left out.")
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(
            envvar="DATA_ROOT",
            help="Where relative data paths begin; what an export noted, else this folder.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train one setting with one seed: no study, no Ray.

    The same numbers as in a study: bit for bit on the same kind of machine. Of a study file it is
    the baseline. Ctrl-C lets it write a checkpoint; the same command goes on from there.
    """
    from ablate.runner.train import train as train_alone
    from ablate.study import load_setting

    study = load_setting(setting, root=root)
    with stop_signals() as stop_level:
        ended = train_alone(
            study,
            seed=seed,
            folder=out_folder,
            stop=lambda trial: stop_level() > 0,
            tell=lambda line: err.print(line, markup=False),
        )
    if as_json:
        print_json(ended.to_json())
    else:
        for name, value in ended.final.items():
            out.print(f"{name} {value}", markup=False)
        out.print(
            f"{ended.status} at step {ended.step}: {ended.folder}", markup=False, soft_wrap=True
        )
    if ended.status != "completed":
        raise typer.Exit(130 if ended.status == "stopped" else 1)


def may_start(made: Plan, ask_above: float) -> bool:
    """Whether to start: asks where the cost may be above `ask_above` worker-hours, or is not known.

    Raises:
        PlanError: there is nobody to ask.
    """
    from ablate.cli.display import hours
    from ablate.errors import PlanError

    cost = made.cost
    if cost is not None and cost.worker_hours_p90 <= ask_above:
        return True
    if cost is None:
        price = "a cost that is not known yet (`ablate plan --probe` measures it)"
    else:
        price = f"{hours(cost.worker_hours_p50)} of workers (p90 {hours(cost.worker_hours_p90)})"
    trials = counted(len(made.to_run), "trial")
    if made.unseen:
        trials = f"{len(made.to_run)} to {counted(len(made.to_run) + made.unseen, 'trial')}"
    if not sys.stdin.isatty():
        raise PlanError(
            f"{trials} for {price}: above budget.ask_above ({ask_above:g} h), and "
            "nobody is there to ask. Give --yes to start them"
        )
    return typer.confirm(f"Start {trials} for {price}?", default=False)


def _look_before(study: Study, folder: Path, trials: int, machines: Cluster) -> None:
    """Say what is not as it should be; end when no trial could run. `trials` are to run."""
    from ablate.records.files import free_gib
    from ablate.runner.preflight import disk_needed, glance
    from ablate.study.data import data_of

    findings = glance(
        machines,
        shape=study.gang.shape(),
        folder=folder,
        data=[path for paths in data_of(study).values() for path in paths],
        checkpoints=study.checkpoints,
        need_gib=disk_needed(study, trials=trials, free_gib=free_gib(folder)),
    )
    for finding in findings:
        if finding.level != "ok":
            err.print(
                f"{finding.level}: {finding.subject}: {finding.message}",
                style="red" if finding.level == "error" else "yellow",
                markup=False,
                soft_wrap=True,
            )
    if any(f.level == "error" and f.subject in ("seats", "checkpoints") for f in findings):
        raise typer.Exit(3)
