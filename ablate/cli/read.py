"""Verbs that read a study folder, and results made elsewhere."""

from __future__ import annotations

import signal
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ablate.api import RUNS, Run, open_book, open_run, open_tracker
from ablate.cli.progress import showing
from ablate.cli.terminal import (
    JsonOption,
    RunArg,
    RunsOption,
    StorageOption,
    TrackingOption,
    err,
    out,
    print_json,
    print_json_text,
    say_behind,
)
from ablate.words import counted

if TYPE_CHECKING:
    from ablate.records.folder import StudyRecord
    from ablate.report.export import ExportPaths
    from ablate.report.verify_bundle import Check
    from ablate.study import Study

app = typer.Typer()

_MLFLOW = "MLflow, trials"


@app.command()
def report(run: RunArg, tracking_uri: TrackingOption = None, as_json: JsonOption = False) -> None:
    """Write the report and its tables, and print the answer."""
    from ablate.cli.display import render_summary
    from ablate.runner.agenda import planned
    from ablate.runner.hold import read_controller

    opened = open_run(run)
    study, record = opened.study, opened.record
    with showing(err, "writing the report") as work:
        try:
            written = opened.report()
        except OSError:  # full, read-only, another's: the answer needs no room
            _answer_alone(study, record, as_json=as_json)
            raise
        trials = planned(study, record)
        if read_controller(record) is None:  # a launch tells of its trials itself
            with open_tracker(
                study, record, tracking_uri, behind=say_behind(record), tell=work.counter(_MLFLOW)
            ) as mirror:
                mirror.update(trials, ())
    if as_json:
        print_json_text(written.verdicts_json.read_text(encoding="utf-8"))
        return
    out.print(render_summary(written.summary))
    out.print(f"report   {written.html}", markup=False, soft_wrap=True)


def _answer_alone(study: Study, record: StudyRecord, *, as_json: bool) -> None:
    """Print what the report says where it cannot be written."""
    from ablate.cli.display import render_summary
    from ablate.report.report import write_report

    with tempfile.TemporaryDirectory() as folder:
        written = write_report(study, record, folder=Path(folder))
        if as_json:
            print_json_text(written.verdicts_json.read_text(encoding="utf-8"))
        else:
            out.print(render_summary(written.summary))


@app.command()
def export(
    run: RunArg,
    cell: Annotated[
        list[str] | None,
        typer.Option(help="FACTOR=LEVEL of the setting to export; may be repeated."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed whose model is exported.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder to write; RUN/best if left out.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Try every part of the export in fresh processes.")
    ] = False,
    push_to: Annotated[
        str | None,
        typer.Option(help="Also write the model as a repository: a folder, or hf:OWNER/NAME."),
    ] = None,
    registered: Annotated[
        bool,
        typer.Option("--register/--no-register", help="Register the model in MLflow as `best`."),
    ] = True,
    tracking_uri: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the setting to use: configuration, scripts, model.

    run.sh trains it again, the same numbers; train.sh with the upstream trainer, for those who
    leave us. --verify alone tries what is there, and writes it first where nothing is.
    """
    from ablate.report.export import export_best, parse_cell
    from ablate.report.verify_bundle import verify_bundle

    opened = open_run(run)
    folder = folder or opened.record.folder / "best"
    said: dict[str, object] = {"folder": str(folder)}
    asked = parse_cell(cell) if cell else None
    if not (verify and asked is None and seed is None and (folder / "provenance.json").is_file()):
        written = export_best(opened.study, opened.record, folder=folder, cell=asked, seed=seed)
        said = written.to_json()
        if not as_json:
            _print_export(written)
        if registered and written.model is not None:
            said["registered"] = _register(folder, opened, tracking_uri)
    if push_to is not None:
        said["pushed"] = _push(folder, push_to)
    if not as_json:
        for name in ("registered", "pushed"):
            if name in said:
                out.print(f"{name:<10} {said[name]}", markup=False, soft_wrap=True)
    checks = verify_bundle(folder, tell=_say_check if not as_json else None) if verify else []
    if as_json:
        print_json({**said, "checks": [asdict(check) for check in checks]})
    if not all(check.kept for check in checks):
        raise typer.Exit(1)


def _register(folder: Path, opened: Run, uri: str | None) -> str:
    """Name and version; a store that cannot be used costs the export nothing but a note."""
    from ablate.errors import TrackingError
    from ablate.tracking.mlflow.registry import register

    try:
        return register(folder, runs=opened.record.folder.parent, uri=uri)
    except TrackingError as error:
        err.print(f"note     {error}", style="yellow", markup=False, soft_wrap=True)
        return ""


def _push(folder: Path, target: str) -> str:
    from ablate.errors import AnalysisError
    from ablate.report.push import push_model

    if not (folder / "model").is_dir():
        raise AnalysisError(f"{folder} holds no model, so there is nothing to push")
    return push_model(folder / "model", target)


def _print_export(written: ExportPaths) -> None:
    out.print(written.sentence, markup=False, soft_wrap=True)
    for warning in written.warnings:
        out.print(f"note     {warning}", style="yellow", markup=False, soft_wrap=True)
    for name, path in written.files():
        out.print(f"{name:<8} {path}", markup=False, soft_wrap=True)


def _say_check(check: Check) -> None:
    text = f"{check.part:<8} {'kept' if check.kept else 'BROKEN'}: {check.message}"
    out.print(text, style=None if check.kept else "red", markup=False, soft_wrap=True)


@app.command()
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="Trial folder or checkpoint, .pt or .safetensors file, model folder, or NAME/TAG.",
            metavar="MODEL",
        ),
    ],
    like: Annotated[
        Path | None,
        typer.Option(help="Setting whose evaluations, model and precision are meant (YAML)."),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            help="Labelled images: a folder of class folders, or shards. classnames.json and "
            "templates.json beside them name the classes, else the recipe's usual ones are meant."
        ),
    ] = None,
    train_images: Annotated[
        str | None, typer.Option(help="Labelled images that neighbours and probes learn from.")
    ] = None,
    pairs: Annotated[
        str | None, typer.Option(help="Shards of images and captions, for retrieval.")
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="Only this kind of evaluation; may be repeated.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--model", help="Architecture of a file of weights.")
    ] = None,
    root: Annotated[
        Path | None, typer.Option(envvar="DATA_ROOT", help="Where paths of --like begin.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe of the model, without --like, where several have it.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a finished model as training measures it.

    Zero-shot accuracy, nearest neighbours, linear probe, retrieval.
    """
    from ablate.report.evaluate import Asked
    from ablate.report.evaluate import evaluate as measure

    asked = Asked(images=images, train_images=train_images, pairs=pairs, kinds=tuple(kind or ()))
    found = measure(model, asked, like=like, name=name, root=root, recipe=recipe)
    if as_json:
        print_json(found)
        return
    for measurement, value in found.items():
        out.print(f"{measurement} {value:.6g}", markup=False)


@app.command()
def ui(
    runs: Annotated[Path, typer.Argument(help="Folder of all study folders.")] = RUNS,
    tracking_uri: TrackingOption = None,
    port: Annotated[int, typer.Option(help="Port on the loopback interface.")] = 5000,
    live: Annotated[
        bool, typer.Option("--live", help="What `watch` shows, as a page that renews itself.")
    ] = False,
) -> None:
    """Serve the MLflow UI of all studies, on loopback."""
    if live:
        _serve_live(runs, port)
        return
    from ablate.tracking.mlflow.server import serve
    from ablate.tracking.mlflow.store import default_uri

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


def _serve_live(runs: Path, port: int) -> None:
    from ablate.cli.live import LiveServer

    with LiveServer(runs, port) as server, suppress(KeyboardInterrupt):
        out.print(f"Live: {server.url}   (Ctrl-C ends it)")
        server.serve_forever()


@app.command()
def rebuild(
    run: RunArg,
    tracking_uri: TrackingOption = None,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make MLflow's and Optuna's views anew from the records.

    It takes as long as it takes; one that was ended early goes on where it stopped. A trial whose
    records cannot be read is named, and the exit code is 1; all others are told.
    """
    from ablate.runner import agenda, hold

    opened = open_run(run)
    study, record = opened.study, opened.record
    troubles: list[str] = []
    with hold.controlling(record), showing(err, "reading the records") as work:
        trials = agenda.planned(study, record)
        with open_tracker(
            study,
            record,
            tracking_uri,
            fresh=True,
            behind=troubles.append,
            tell=work.counter(_MLFLOW),
        ) as mirror:
            mirror.update(trials, ())
        work.begin("Optuna")
        with open_book(study, record, storage, fresh=True, behind=troubles.append) as book:
            untold = agenda.retell(study, record, book)
    for line in untold:
        err.print(f"note: Optuna lacks a cell: {line}", style="yellow", markup=False)
    for trouble in troubles:
        say_behind(record)(trouble)
    if as_json:
        print_json({"trials": len(trials), "untold": [*untold, *troubles]})
    if untold or troubles:
        raise typer.Exit(1)
    if not as_json:
        out.print(f"Rebuilt MLflow and Optuna from {counted(len(trials), 'trial')}.")


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
    from ablate.report.verify import compare_reports, find_remains
    from ablate.report.verify import verify as check_records
    from ablate.runner.agenda import planned
    from ablate.runner.hold import read_controller

    opened = open_run(run)
    study, record = opened.study, opened.record
    trials = planned(study, record)
    found = check_records(record, trials, metric=study.objective.metric)
    if read_controller(record) is None:
        found += find_remains(record.folder)
    if same_as is not None:
        other = open_run(same_as)
        found += compare_reports((study, record), (other.study, other.record))
    if as_json:
        print_json([asdict(violation) for violation in found])
    names = opened.names()
    for violation in () if as_json else found:
        where = violation.where
        named = f"{names[where]} ({where})" if where in names else where
        out.print(
            f"{violation.rule:<12} {named}: {violation.message}",
            markup=False,
            soft_wrap=True,
        )
    if found:
        raise typer.Exit(1)
    if not as_json:
        told = f"{run}: {len(trials)} trials, all promises kept."
        out.print(told, markup=False, soft_wrap=True)


@app.command()
def compare(
    one: Annotated[Path, typer.Argument(help="Study folder.", metavar="RUN")],
    two: Annotated[Path, typer.Argument(help="The other one.", metavar="RUN")],
    as_json: JsonOption = False,
) -> None:
    """Say what differs between two studies, effects side by side.

    Where both ran the same cells, the runs of both are judged together.
    """
    from ablate.cli.display import render_comparison
    from ablate.report.compare import compare as compare_studies

    first, second = open_run(one), open_run(two)
    found = compare_studies((first.study, first.record), (second.study, second.record))
    if as_json:
        print_json(found.to_json())
        return
    out.print(render_comparison(found))


@app.command("import")
def import_runs(
    source: Annotated[
        str,
        typer.Argument(
            help="Table of runs (CSV, parquet), folder of runs, MLflow or Optuna store.",
            metavar="SOURCE",
        ),
    ],
    metric: Annotated[str, typer.Option(help="Measurement to judge by, by its name there.")],
    minimize: Annotated[bool, typer.Option("--minimize", help="Lower values are better.")] = False,
    margin: Annotated[
        float, typer.Option(help="Smallest difference that would matter, in the metric's unit.")
    ] = 0.005,
    factor: Annotated[
        list[str] | None,
        typer.Option(help="Setting to compare; may be repeated. All that differ if left out."),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="FACTOR=LEVEL of what all others are compared with; may be repeated."),
    ] = None,
    experiment: Annotated[
        str | None, typer.Option(help="Which experiment, or Optuna study, of several there.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the study; the source's if not.")
    ] = None,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Make a study of runs that were made elsewhere.

    Nothing pairs, since nobody planned the runs as one study; report, diagnose and compare read it
    like any other study.
    """
    from ablate.api import import_runs as bring
    from ablate.report.export import parse_cell

    with showing(err, "reading the runs") as work:
        opened = bring(
            source, metric=metric, minimize=minimize, margin=margin, factors=factor or (),
            baseline=parse_cell(baseline) if baseline else None, experiment=experiment, name=name,
            runs=runs, tell=work.counter("writing trials"),
        )  # fmt: skip
        status = opened.status()
    if as_json:
        print_json(
            {
                "folder": str(opened.folder),
                "design": opened.study.design.name,
                "factors": {f.name: len(f.levels) or None for f in opened.study.compared},
                "outcomes": status.outcomes,
            }
        )
        return
    counts = ", ".join(f"{number} {outcome}" for outcome, number in status.outcomes.items())
    names = ", ".join(factor.name for factor in opened.study.compared)
    out.print(f"{opened.folder}: {counts}; compared: {names}.", markup=False, soft_wrap=True)
    out.print(f"What they show: ablate report {opened.folder}", markup=False, soft_wrap=True)


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
    from ablate.cli.display import render_contrasts
    from ablate.report.foreign import analyze as analyze_results

    found = analyze_results(results, margin, direction="minimize" if minimize else "maximize")
    if as_json:
        print_json(found)
        return
    out.print(render_contrasts(found))
