"""The command line: verbs only, each one call into the rooms.

Exit codes: 0 done; 1 the study ended, but some trials failed or are missing; 2 wrong usage, a
wrong study file or a wrong folder; 3 the cluster cannot run it, or the disk is full; 130 stopped by
Ctrl-C or `ablate stop` (launch again to go on).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from ablate.errors import AblateError, ClusterError
from ablate.wording import counted

if TYPE_CHECKING:
    from collections.abc import Callable

    from ablate.cluster import Cluster
    from ablate.doctor import Finding
    from ablate.forecast import Plan
    from ablate.records import StudyRecord
    from ablate.search import CellBook
    from ablate.study import Study
    from ablate.tracking import Tracker


class ClusterKind(StrEnum):
    """What places and starts the trials."""

    RAY = "ray"
    LOCAL = "local"


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Ablation studies of training settings: which one matters, by how much, how sure.",
    epilog=(
        "Exit codes: 0 done; 1 ended with failed or missing trials; 2 wrong usage or study file; "
        "3 the cluster cannot run it, or the disk is full; 130 stopped, launch again to go on."
    ),
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

StudyArg = Annotated[Path, typer.Argument(help="Study file (YAML).", metavar="STUDY.yaml")]
RunArg = Annotated[Path, typer.Argument(help="Study folder, e.g. runs/quickstart.", metavar="RUN")]
RunsOption = Annotated[
    Path, typer.Option("--runs", file_okay=False, help="Folder of all study folders.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
TrackingOption = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri",
        envvar="MLFLOW_TRACKING_URI",
        help="MLflow store; a file beside the study folders if left out.",
    ),
]
StorageOption = Annotated[
    str | None,
    typer.Option(
        "--storage",
        envvar="ABLATE_STORAGE",
        help="Optuna storage URL, e.g. postgresql://user@host/name; a file of the study if left "
        "out.",
    ),
]
RUNS = Path("runs")


def main() -> None:
    """Entry point: run a verb, turn our own errors into a message and an exit code."""
    os.umask(0o077)  # records, checkpoints and stores are their owner's alone
    try:
        app()
    except ClusterError as error:
        err.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(3)
    except AblateError as error:
        err.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(2)
    except (PermissionError, NotADirectoryError, IsADirectoryError) as error:
        err.print(
            f"error: {error.filename}: {error.strerror}. Check the path and who may use it.",
            style="red",
            markup=False,
            soft_wrap=True,
        )
        sys.exit(2)
    except OSError as error:
        from ablate.records import is_full

        if not is_full(error):
            raise
        where = f" for {error.filename}" if error.filename else ""
        err.print(
            f"error: no space is left{where}. What was recorded is kept: free some space and "
            "launch again.",
            style="red",
            markup=False,
            soft_wrap=True,
        )
        sys.exit(3)


@app.command()
def check(study: StudyArg) -> None:
    """Validate a study file; says every problem with its line."""
    from ablate.study import Search, load_study

    found = load_study(study)
    notes: list[str] = []
    if isinstance(found.design, Search) and found.design.prune is not None:
        from ablate.referee import advise  # brings scipy

        notes = advise(found)
    levels = sum(len(factor.levels) - 1 for factor in found.factors)
    out.print(
        f"{study}: fine. {counted(len(found.factors), 'factor')} with {counted(levels, 'level')} "
        f"beside the baseline, {found.design.name}, {counted(len(found.seeds), 'seed')}, "
        f"{counted(found.gang.workers, 'worker')} a trial.",
        markup=False,
    )
    for note in notes:
        out.print(f"note: {note}", style="yellow", markup=False)
    out.print(f"Whether all of it can run, and what it costs: ablate plan {study}", markup=False)


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
    as_json: JsonOption = False,
) -> None:
    """Print what launch would run, its cost, and what it can show."""
    from ablate import runner
    from ablate.display import render_plan
    from ablate.forecast import plan as make_plan
    from ablate.records import StudyRecord
    from ablate.study import load_study

    loaded = load_study(study)
    record = StudyRecord(runs / loaded.name)
    if probe:
        from ablate.probe import measure

        with runner.controlling(record), _cluster(cluster, address, None) as machines:
            measure(
                loaded, record, runner.planned(loaded, record), machines, entry=runner.WORKER,
                tell=lambda line: err.print(line, markup=False),
            )  # fmt: skip
    made = make_plan(
        loaded,
        record,
        samples_per_s=samples_per_s,
        concurrency=concurrency,
        sketch=True,
    )
    if as_json:
        _print_json(made.to_json())
        return
    out.print(render_plan(made))


@app.command()
def launch(
    study: StudyArg,
    runs: RunsOption = RUNS,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to use, e.g. auto; a private one if left out.")
    ] = None,
    cluster: Annotated[
        ClusterKind, typer.Option(help="ray, or local: plain processes of this machine.")
    ] = ClusterKind.RAY,
    cpus: Annotated[
        float | None, typer.Option(help="Cores to use of this machine; all if left out.")
    ] = None,
    tracking_uri: TrackingOption = None,
    storage: StorageOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan, and stop there.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before starting.")] = False,
) -> None:
    """Run what is missing of a study; launch again to go on.

    Ctrl-C once lets running trials write a checkpoint and stop, twice ends them at once.
    """
    from ablate import runner
    from ablate.display import render_plan, render_status, watching
    from ablate.forecast import plan as make_plan
    from ablate.records import StudyRecord
    from ablate.study import load_study

    loaded = load_study(study)
    record = StudyRecord(runs / loaded.name)
    made = make_plan(loaded, record)
    out.print(render_plan(made))
    if dry_run:
        return
    if not yes and made.to_run and not _may_start(made, loaded.budget.ask_above):
        raise typer.Exit(130)
    with (
        runner.controlling(record),
        _stop_signals() as stop_level,
        _cluster(cluster, address, cpus) as machines,  # imports ahead while the next two come up
        _tracker(loaded, record, tracking_uri) as mirror,
        _book(loaded, record, storage) as book,
        closing(machines),  # before the mirror, which may take its time
        watching(out) as watch,
    ):
        _look_before(loaded, record.folder, machines)
        ended = runner.launch(
            loaded,
            record,
            cluster=machines,
            book=book,
            mirror=mirror,
            stop_level=stop_level,
            watch=watch,
        )
    out.print(render_status(ended, width=out.width))
    if ended.waiting and not ended.notes:
        out.print(f"Stopped. Go on with: ablate launch {study}", markup=False)
        raise typer.Exit(130)
    out.print(f"Read it with: ablate report {record.folder}", markup=False)
    if ended.waiting or set(ended.outcomes) - {"completed", "diverged", "pruned"}:
        raise typer.Exit(1)


@app.command()
def status(run: RunArg, as_json: JsonOption = False) -> None:
    """Show how a study stands now, wherever its folder is seen."""
    from ablate.display import render_status
    from ablate.runner import planned
    from ablate.status import summarise

    study, record = _open(run)
    found = summarise(study, record, planned(study, record))
    if as_json:
        _print_json(found.to_json())
        return
    out.print(f"{found.name}: controller {found.controller}", style="bold")
    out.print(render_status(found, width=out.width))


@app.command()
def stop(
    run: RunArg,
    now: Annotated[bool, typer.Option("--now", help="Kill trials instead of asking.")] = False,
) -> None:
    """Ask a study to stop; its trials write checkpoints first."""
    from ablate.runner import request_stop
    from ablate.status import read_controller

    _, record = _open(run)
    note = read_controller(record)
    if note is None:
        out.print(f"{run}: nothing is running.")
        return
    request_stop(record, now=now)
    out.print(f"Asked process {note['pid']} on {note['host']} to stop. Launch again to go on.")


@app.command()
def report(run: RunArg, tracking_uri: TrackingOption = None, as_json: JsonOption = False) -> None:
    """Write the report and its tables, and print the answer."""
    from ablate.analysis.report import write_report
    from ablate.display import render_summary
    from ablate.markers.replay import draw_run
    from ablate.runner import planned

    study, record = _open(run)
    written = write_report(study, record)
    trials = planned(study, record)
    names = {t.id: f"{study.change_name(dict(t.cell.levels))} · seed {t.seed}" for t in trials}
    draw_run(record.folder, names=names, title=study.name)
    with _tracker(study, record, tracking_uri) as mirror:
        mirror.update(trials, ())
    if as_json:
        sys.stdout.write(written.verdicts_json.read_text(encoding="utf-8"))
        return
    out.print(render_summary(written.summary))
    out.print(f"report   {written.html}", markup=False, soft_wrap=True)


@app.command()
def export(run: RunArg) -> None:
    """Write the best setting: configuration, command, model.

    The command trains the same with open_clip_train.
    """
    from ablate.analysis.export import export_best

    study, record = _open(run)
    written = export_best(study, record)
    out.print(written.sentence, markup=False, soft_wrap=True)
    for warning in written.warnings:
        out.print(f"note     {warning}", style="yellow", markup=False, soft_wrap=True)
    for name, path in (
        ("config", written.config),
        ("command", written.script),
        ("model", written.model),
        ("source", written.provenance),
    ):
        if path is not None:
            out.print(f"{name:<8} {path}", markup=False, soft_wrap=True)


@app.command()
def ui(
    runs: Annotated[Path, typer.Argument(help="Folder of all study folders.")] = RUNS,
    tracking_uri: TrackingOption = None,
    port: Annotated[int, typer.Option(help="Port on the loopback interface.")] = 5000,
) -> None:
    """Serve the MLflow UI of all studies, on loopback."""
    from ablate.tracking import default_uri, serve

    # SIGTERM ends this process through the context below, which takes the server's tree down.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    uri = tracking_uri or default_uri(runs)
    with serve(uri, port=port, log=runs / "mlflow-server.log") as server:
        server.wait_ready(timeout_s=120)
        for name, page in server.pages().items():
            out.print(f"{name:<20} {page}", markup=False, soft_wrap=True)
        out.print(f"MLflow UI: {server.url}   (Ctrl-C ends it)")
        with suppress(KeyboardInterrupt):
            server.process.wait()


@app.command()
def rebuild(
    run: RunArg, tracking_uri: TrackingOption = None, storage: StorageOption = None
) -> None:
    """Make MLflow's and Optuna's views anew from the records."""
    from ablate import runner

    study, record = _open(run)
    with runner.controlling(record):
        trials = runner.planned(study, record)
        with _tracker(study, record, tracking_uri, fresh=True) as mirror:
            mirror.update(trials, ())
        with _book(study, record, storage, fresh=True) as book:
            runner.retell(study, record, book)
    out.print(f"Rebuilt MLflow and Optuna from {len(trials)} trials.")


@app.command()
def verify(
    run: RunArg,
    same_as: Annotated[
        Path | None, typer.Option(help="Another study folder, whose report must be the same.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check that a study's records are whole.

    Outcomes, attempts, steps, and that no process was left behind.
    """
    from ablate.runner import planned
    from ablate.status import read_controller
    from ablate.verify import compare_reports, find_remains
    from ablate.verify import verify as check_records

    study, record = _open(run)
    trials = planned(study, record)
    found = check_records(record, trials, metric=study.objective.metric)
    if read_controller(record) is None:
        found += find_remains(record.folder)
    if same_as is not None:
        found += compare_reports((study, record), _open(same_as))
    if as_json:
        _print_json([asdict(violation) for violation in found])
    for violation in () if as_json else found:
        out.print(
            f"{violation.rule:<12} {violation.where}: {violation.message}",
            markup=False,
            soft_wrap=True,
        )
    if found:
        raise typer.Exit(1)
    if not as_json:
        out.print(f"{run}: {len(trials)} trials, all promises kept.")


@app.command()
def schema() -> None:
    """Print the JSON schema of study files, for editors."""
    from ablate.study import json_schema

    _print_json(json_schema())


@app.command()
def doctor(
    runs: RunsOption = RUNS,
    study: Annotated[
        Path | None, typer.Option("--cluster", help="Probe the cluster for this study's gangs.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to probe; a private one if left out.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether this machine, or each node, is ready."""
    from ablate.doctor import examine

    findings = examine(runs)
    if study is not None:
        findings += _probe(study, runs, address)
    if as_json:
        _print_json([asdict(finding) for finding in findings])
    else:
        marks = {"ok": ("ok", "green"), "warning": ("!!", "yellow"), "error": ("no", "red")}
        for finding in findings:
            mark, style = marks[finding.level]
            out.print(f"[{style}]{mark}[/]  {finding.subject:<16} {finding.message}")
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)


data_app = typer.Typer(no_args_is_help=True, help="Prepare data sets.")
app.add_typer(data_app, name="data")


@data_app.command("emoji")
def data_emoji(
    folder: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("data/emoji"),
) -> None:
    """The small real data set: emoji of four vendors to train on, two unseen styles to judge."""
    from ablate.datasets.emoji import prepare_emoji

    found = prepare_emoji(folder)
    out.print(
        f"{folder}: {found.train_num_samples} training pairs, {found.num_classes} held-out "
        f"classes (chance {found.chance:.2%}). Licences: {folder / 'LICENSES.md'}",
        soft_wrap=True,
    )


class _ReplayByDefault(TyperGroup):
    """`ablate markers RUN` means `ablate markers replay RUN`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["replay", *args]
        return super().parse_args(ctx, args)


markers_app = typer.Typer(
    no_args_is_help=True,
    cls=_ReplayByDefault,
    short_help="Judge runs by their instability markers.",
    help="Judge runs by their instability markers: ablate markers RUN, or markers import FILE.",
)
app.add_typer(markers_app, name="markers")


@markers_app.command("replay")
def markers_replay(
    run: Annotated[Path, typer.Argument(help="Study folder, or the folder of one trial.")],
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="MARKER.THRESHOLD=VALUE, e.g. loss_spike.sigma=4; repeatable."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Judge recorded trials again, with other thresholds.

    Nothing is trained.
    """
    from ablate.display import render_judgements
    from ablate.markers.replay import replay_run

    found = replay_run(run, change or ())
    if as_json:
        _print_json(found)
        return
    out.print(render_judgements(found))


@markers_app.command("import")
def markers_import(
    file: Annotated[
        Path, typer.Argument(help="CSV, TensorBoard event files, or an open_clip_train out.log.")
    ],
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Global batch size: samples of one softmax.")
    ] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="Steps of warmup.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Judge a run that was made elsewhere."""
    from ablate.display import render_judgements
    from ablate.markers.foreign import judge_foreign

    found = judge_foreign(file, global_batch=batch_size, warmup=warmup)
    if as_json:
        _print_json(found)
        return
    out.print(render_judgements({str(file): found}))
    for note in found["notes"]:
        out.print(f"note  {note}", markup=False, soft_wrap=True)


@app.command()
def diagnose(
    run: Annotated[Path, typer.Argument(help="Study folder, or the folder of one trial.")],
    as_json: JsonOption = False,
) -> None:
    """Name likely causes of instability, and what to try."""
    from ablate.display import render_suspects
    from ablate.markers.replay import diagnose_run

    found = diagnose_run(run)
    if as_json:
        _print_json(found)
        return
    out.print(render_suspects(found) if found else "The markers saw nothing that needs a cause.")


@app.command("inspect")
def inspect_checkpoints(
    a: Annotated[
        Path,
        typer.Argument(help="Trial folder (its initial weights), checkpoint, .safetensors or .pt."),
    ],
    b: Annotated[
        Path | None,
        typer.Argument(help="The later one; a trial folder stands for its newest checkpoint."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Labelled images (class folders, or .tar); the trial's if left out."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="open_clip model, for files that belong to no trial.")
    ] = None,
    images: Annotated[int, typer.Option(min=2, help="Look at this many images at most.")] = 2048,
    picture: Annotated[
        Path | None, typer.Option(help="Draw both feature spaces by class (PNG, SVG or PDF).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether a model learned between two checkpoints.

    Given a trial folder alone, its initial weights are compared with its newest checkpoint.
    """
    import logging

    from ablate.display import render_inspection
    from ablate.training.inspect import inspect_paths
    from ablate.training.picture import draw_inspection

    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns of weights it did not load
    found = inspect_paths(a, b, data=data, model=model, images=images)
    drawn = picture is not None and draw_inspection(found, picture)
    if as_json:
        _print_json(found.to_dict())
        return
    out.print(render_inspection(found.to_dict()))
    if drawn:
        out.print(f"picture  {picture}", markup=False, soft_wrap=True)
    elif picture is not None:
        out.print("No picture: there are no features to draw.")


@app.command()
def analyze(
    results: Annotated[Path, typer.Argument(help="CSV: factor, level, seed, value, outcome.")],
    margin: Annotated[
        float, typer.Option(help="Smallest difference that would matter, in the value's unit.")
    ] = 0.005,
    minimize: Annotated[bool, typer.Option("--minimize", help="Lower values are better.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Judge results made elsewhere: which factor matters.

    The rows of the baseline are `baseline,baseline`.
    """
    from ablate.analysis.foreign import analyze as analyze_results
    from ablate.display import render_contrasts

    found = analyze_results(results, margin, direction="minimize" if minimize else "maximize")
    if as_json:
        _print_json(found)
        return
    out.print(render_contrasts(found))


# --------------------------------------------------------------------------- parts of the verbs


def _may_start(made: Plan, ask_above: float) -> bool:
    """Whether to start: asks where the cost may be above `ask_above` worker-hours, or is not known.

    Raises:
        PlanError: there is nobody to ask.
    """
    from ablate.display import hours
    from ablate.errors import PlanError

    cost = made.cost
    if cost is not None and cost.worker_hours_p90 <= ask_above:
        return True
    if cost is None:
        price = "a cost that is not known yet (`ablate plan --probe` measures it)"
    else:
        price = f"{hours(cost.worker_hours_p50)} of workers (p90 {hours(cost.worker_hours_p90)})"
    if not sys.stdin.isatty():
        raise PlanError(
            f"{len(made.to_run)} trials for {price}: above budget.ask_above ({ask_above:g} h), and "
            "nobody is there to ask. Give --yes to start them"
        )
    return typer.confirm(f"Start {len(made.to_run)} trials for {price}?", default=False)


def _probe(study: Path, runs: Path, address: str | None) -> list[Finding]:
    from ablate import preflight
    from ablate.forecast import plan as make_plan
    from ablate.records import StudyRecord
    from ablate.study import load_study

    loaded = load_study(study)
    record = StudyRecord(runs / loaded.name)
    made = make_plan(loaded, record, sketch=True)
    with _cluster(ClusterKind.RAY, address, None) as machines:
        return preflight.examine(
            machines,
            gang=loaded.gang.shape(),
            folder=record.folder,
            data=_data_of(loaded),
            checkpoints=loaded.checkpoints,
            need_gib=made.disk_gib,
        )


def _look_before(study: Study, folder: Path, machines: Cluster) -> None:
    """Say what is not as it should be; end when no trial could run."""
    from ablate.preflight import glance

    findings = glance(
        machines,
        gang=study.gang.shape(),
        folder=folder,
        data=_data_of(study),
        checkpoints=study.checkpoints,
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


def _data_of(study: Study) -> list[Path]:
    """The files and folders that trials of the baseline read."""
    from ablate import recipes
    from ablate.datasets.shard_names import expand_shards

    recipe = recipes.load(study.recipe)
    config = recipes.absolute(
        recipe.Config(**study.baseline), recipe.PATH_FIELDS, root=Path(study.root)
    )
    patterns = [value for name in recipe.PATH_FIELDS if (value := getattr(config, name))]
    return [Path(path) for pattern in patterns for path in expand_shards(pattern)]


@contextmanager
def _tracker(
    study: Study, record: StudyRecord, uri: str | None, *, fresh: bool = False
) -> Iterator[Tracker]:
    from ablate.design import score_of
    from ablate.tracking import Tracker

    tracker = Tracker(study, record, score=partial(score_of, study), uri=uri, fresh=fresh)
    try:
        yield tracker
    finally:
        if not tracker.close():
            err.print(
                f"note: MLflow is behind ({tracker.trouble}); nothing is lost. "
                f"Bring it up to date with `ablate rebuild {record.folder}`.",
                style="yellow",
                markup=False,
                soft_wrap=True,
            )


@contextmanager
def _book(
    study: Study, record: StudyRecord, storage: str | None, *, fresh: bool = False
) -> Iterator[CellBook]:
    from ablate.design import score_of
    from ablate.search import CellBook
    from ablate.warm_start import earlier_studies

    earlier = earlier_studies(study)
    book = CellBook(
        study,
        storage=storage or record.folder / "optuna.db",
        score=partial(score_of, study),
        fresh=fresh,
    )
    for found in earlier:
        book.add_earlier(found.source, found.cells)
    try:
        yield book
    finally:
        book.close()


@contextmanager
def _cluster(kind: ClusterKind, address: str | None, cpus: float | None) -> Iterator[Cluster]:
    if kind is ClusterKind.LOCAL:
        from ablate.cluster import LocalCluster
        from ablate.runner import WORKER

        module = WORKER.partition(":")[0]

        with LocalCluster(num_cpus=cpus, preload=(f"{module}:PRELOAD",)) as machines:
            yield machines
        return
    from ablate.ray_cluster import RayCluster

    with RayCluster(address, num_cpus=cpus) as machines:
        yield machines


def _open(run: Path) -> tuple[Study, StudyRecord]:
    """The study and its record, from a study folder alone."""
    from ablate.errors import RecordError
    from ablate.records import find_study
    from ablate.study import parse_study

    record = find_study(run)
    content = record.study() or {}
    if lost := [name for name in ("text", "path", "root") if name not in content]:
        raise RecordError(
            f"{record.folder}/study.json lacks {', '.join(lost)}: another program wrote it. Launch "
            "the study under another name, or with other --runs"
        )
    return parse_study(content["text"], path=content["path"], root=content["root"]), record


@contextmanager
def _stop_signals() -> Iterator[Callable[[], int]]:
    """Count Ctrl-C and SIGTERM instead of dying; gives the function that tells the count."""
    count = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count == 1:
            text = "stopping: trials write a checkpoint first; again to end them at once"
        else:
            text = "ending at once"
        os.write(2, f"\n{text}\n".encode())

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: min(count, 2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_json(value: Any) -> None:
    from ablate.records import dumps

    sys.stdout.write(dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
