"""The verbs of the command line, for Python and notebooks; what plugs cluster, search and sinks in.

>>> import ablate
>>> study = ablate.load("studies/quickstart.yaml")
>>> study.plan().to_run
>>> study.launch(cluster="local")
>>> study.results()          # a DataFrame: a row for each trial
>>> study.effects()          # a DataFrame: a row for each comparison
>>> print(study.best().why)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ablate.errors import RecordError
from ablate.words import counted

if TYPE_CHECKING:
    import pandas as pd

    from ablate.cluster.contract import Cluster
    from ablate.records.folder import StudyRecord
    from ablate.report.best import Recommendation
    from ablate.report.export import ExportPaths
    from ablate.report.report import ReportPaths
    from ablate.runner.archive import Archive
    from ablate.runner.plan.plan import Plan
    from ablate.runner.status import StudyStatus
    from ablate.search.book import CellBook
    from ablate.study import Study
    from ablate.study.elsewhere import Made
    from ablate.tracking.tracker import Tracker

ClusterName = Literal["ray", "local", "debug"]
"""What places and starts trials: Ray, plain processes of this machine, or this very process."""

RUNS = Path("runs")
"""Folder of all study folders, where nothing else is said."""


@dataclass(frozen=True, slots=True)
class Run:
    """A study and its folder; what each method returns is read from the records anew."""

    study: Study
    record: StudyRecord

    @property
    def folder(self) -> Path:
        return self.record.folder

    def plan(self, *, samples_per_s: float | None = None, concurrency: int = 1) -> Plan:
        """What `launch` would run, what it costs, and what it can show.

        Raises:
            PlanError: a cell cannot run; says which and why.
        """
        from ablate.runner.plan.plan import plan

        return plan(
            self.study,
            self.record,
            samples_per_s=samples_per_s,
            concurrency=concurrency,
            deep=True,
        )

    def launch(
        self,
        *,
        cluster: ClusterName | Cluster = "ray",
        address: str | None = None,
        cpus: float | None = None,
        tracking_uri: str | None = None,
        storage: str | None = None,
        stop_level: Callable[[], int] = lambda: 0,
        watch: Callable[[StudyStatus], None] = lambda status: None,
        look: Callable[[Cluster], None] = lambda cluster: None,
        behind: Callable[[str], None] = lambda trouble: None,
        mirrored: Callable[[int, int], None] = lambda done, total: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> StudyStatus:
        """Run what is missing, and say how the study stands then. It asks nothing.

        `cluster` may be one of your own, which is closed at the end. `stop_level` is called
        between steps of the loop: 1 lets trials write a checkpoint and stop, 2 ends them at once.
        `watch` gets the status now and then, `look` the cluster before
        the first trial starts. At the end MLflow is brought up to date, however long that takes:
        `mirrored` is told how many trials it holds, `behind` why it or Optuna's storage lacks
        some, and `say` what became of the records in the study's object store.

        Raises:
            RecordError: another process runs this study.
            PlacementError: no gang of the study fits the cluster.
        """
        from ablate.runner import controller, hold
        from ablate.tracking.sinks import telling

        with (
            telling(self.study.notify) as sinks,
            hold.controlling(self.record),
            # It imports ahead.
            open_cluster(self.study.recipe, cluster, address=address, cpus=cpus) as machines,
            open_tracker(
                self.study,
                self.record,
                tracking_uri,
                behind=behind,
                tell=mirrored,
                give_up=lambda: stop_level() > 1,
            ) as mirror,
            open_book(self.study, self.record, storage, behind=behind) as book,
            open_archive(self.study, self.record, say=say) as archive,
            closing(machines),  # before the mirrors, which may take their time
        ):
            look(machines)

            def tell(status: StudyStatus) -> None:
                watch(status)
                sinks.update(status)

            last = controller.launch(
                self.study, self.record, cluster=machines, book=book, mirror=mirror,
                archive=archive, stop_level=stop_level, watch=tell,
            )  # fmt: skip
            sinks.update(last)
            return last

    def status(self) -> StudyStatus:
        """How the study stands now, wherever its folder is seen."""
        from ablate.runner.agenda import planned
        from ablate.runner.status import summarise

        return summarise(self.study, self.record, planned(self.study, self.record))

    def names(self) -> dict[str, str]:
        """Trial id -> what it is called: its levels that differ from the baseline, and its seed."""
        from ablate.runner.agenda import planned

        return {
            trial.id: f"{self.study.change_name(dict(trial.cell.levels))} · seed {trial.seed}"
            for trial in planned(self.study, self.record)
        }

    def results(self) -> pd.DataFrame:
        """A row for each trial: its levels (a column for each factor), seed, outcome, value of the
        objective (NaN without one), what the markers call its course, steps, id."""
        import pandas as pd

        from ablate.study.table import read_table

        table = read_table(self.study, self.record, curves=False)
        return pd.DataFrame(
            [
                {
                    **dict(row.levels),
                    "seed": row.seed,
                    "outcome": row.state,
                    "value": row.value,
                    "verdict": row.verdict,
                    "step": row.step,
                    "trial": row.id,
                }
                for row in table.rows
            ]
        ).astype({"value": float})

    def effects(self) -> pd.DataFrame:
        """A row for each comparison: factor, level, reference, delta, interval, p, verdict,
        diverged; the columns of effects.csv."""
        import io

        import pandas as pd

        from ablate.report.page import read_page
        from ablate.report.report import effects_csv
        from ablate.study.table import read_table

        page = read_page(read_table(self.study, self.record))
        return pd.read_csv(io.StringIO(effects_csv(page.questions)))

    def best(self) -> Recommendation:
        """Which setting to use, why, and what is known against it."""
        from ablate.report.best import recommend
        from ablate.study.table import read_table

        return recommend(read_table(self.study, self.record, curves=False))

    def plot(self, what: Literal["effects", "loss", "score"] = "effects") -> Any:
        """A plotly figure: every comparison with its interval, or a line for each trial.

        Raises:
            AblateError: plotly is not installed.
        """
        from ablate.report.pictures import interactive
        from ablate.study.table import read_table

        if what == "effects":
            return interactive.draw_effects(self.effects(), metric=self.study.objective.metric)
        return interactive.draw_curves(read_table(self.study, self.record), what=what)

    def report(self) -> ReportPaths:
        """Write the report and its tables into the study folder."""
        from ablate.report.report import write_report

        return write_report(self.study, self.record, active=self.active())

    def active(self) -> frozenset[str]:
        """Ids of the trials that a living controller attempts now."""
        from ablate.runner.hold import read_controller

        note = read_controller(self.record)
        return frozenset(note["active"] if note else ())

    def export(self) -> ExportPaths:
        """Write the recommended setting into the folder's ``best/``."""
        from ablate.report.export import export_best

        return export_best(self.study, self.record)

    def _repr_html_(self) -> str:
        """The state of the study and, once trials have ended, its answer."""
        from html import escape

        from ablate.errors import AblateError

        status = self.status()
        counts = ", ".join(f"{number} {state}" for state, number in status.outcomes.items())
        text = f"<b>{escape(self.study.name)}</b>: {escape(counts or 'nothing has ended')}"
        try:
            text += f"<br>{escape(self.best().why)}" if status.outcomes else ""
        except AblateError as error:
            text += f"<br>{escape(str(error))}"
        return f"<p>{text}</p>"


def load(source: str | Path, *, runs: str | Path = RUNS) -> Run:
    """The study of a study file (its folder lies in `runs`), or of a study folder.

    Raises:
        StudyError: the file is wrong; every problem with its line.
        RecordError: the folder holds no study.
    """
    from ablate.records.folder import StudyRecord
    from ablate.study import load_study

    path = Path(source)
    if path.is_dir():
        return open_run(path)
    study = load_study(path)
    return Run(study, StudyRecord(Path(runs) / study.name))


def open_run(folder: Path) -> Run:
    """The study and its record, from a study folder alone.

    Raises:
        RecordError: there is no study, or another program wrote it.
    """
    from ablate.records.folder import find_study
    from ablate.study import parse_study

    record = find_study(folder)
    content = record.study() or {}
    if lost := [name for name in ("text", "path", "root") if name not in content]:
        raise RecordError(
            f"{record.folder}/study.json lacks {', '.join(lost)}: another program wrote it. Launch "
            "the study under another name, or with other --runs"
        )
    study = parse_study(
        content["text"], path=content["path"], root=content["root"], name=content.get("name")
    )
    return Run(study, record)


def analyze(
    results: str | Path | pd.DataFrame,
    margin: float | None = 0.005,
    *,
    direction: Literal["maximize", "minimize"] = "maximize",
) -> list[dict[str, Any]]:
    """Judge results made elsewhere: one dict for each comparison.

    `results` is a CSV file or a DataFrame with the columns factor, level, seed, value and, where
    a run did not complete, outcome; the rows of the baseline have `baseline` as factor and level.

    Raises:
        AnalysisError: a row cannot be read as asked; says which.
    """
    from ablate.report.foreign import analyze

    return analyze(results, margin, direction=direction)


def import_runs(
    source: str | Path,
    *,
    metric: str,
    minimize: bool = False,
    margin: float = 0.005,
    factors: Sequence[str] = (),
    baseline: Mapping[str, str] | None = None,
    experiment: str | None = None,
    name: str | None = None,
    runs: str | Path = RUNS,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Run:
    """Make a study folder of runs that were made elsewhere, judged by their last `metric`.

    `source`: a table with a row for each run (CSV, parquet), a folder of runs, an MLflow store or
    folder, an Optuna storage; `experiment` names the experiment, or the Optuna study, where it
    holds several. `factors`: the settings to compare, all that differ if left out.

    Raises:
        AnalysisError: nothing can be read or compared there; says what is there.
        RecordError: a study of that name is there.
    """
    from ablate.records.folder import StudyRecord
    from ablate.records.names import near_name
    from ablate.runner.adopt import adopt
    from ablate.study import parse_study
    from ablate.study.elsewhere import draft

    made = _read_runs(str(source), metric=metric, experiment=experiment, factors=factors)
    drafted = draft(
        made, source=str(source), metric=metric, minimize=minimize, margin=margin,
        factors=factors, baseline=baseline,
    )  # fmt: skip
    name = name or near_name(experiment or Path(str(source)).stem)
    study = parse_study(drafted.text, path=f"{name}.yaml", name=name)
    record = StudyRecord(Path(runs) / name)
    trials = [study.trial(study.cell(levels), seed=seed) for levels, seed in drafted.places]
    adopt(study, record, made, trials, source=str(source), tell=tell)
    return Run(study, record)


def _read_runs(
    source: str, *, metric: str, experiment: str | None, factors: Sequence[str]
) -> list[Made]:
    """Runs by whichever reader the source is for."""
    from ablate.errors import AnalysisError
    from ablate.records.source import sqlite_tables
    from ablate.report import made_folders, made_tables

    path = Path(source)
    is_address = "://" in source
    if not is_address and not path.exists():
        raise AnalysisError(f"{source} does not exist")
    if path.suffix in (".csv", ".tsv", ".parquet"):
        return made_tables.read_runs(path, metric=metric, factors=factors)
    tables = sqlite_tables(source.removeprefix("sqlite:///"))
    if "trials" in tables and "study_directions" in tables:
        from ablate.search import elsewhere

        return elsewhere.read_runs(source, study=experiment)
    if is_address or "experiments" in tables or any(path.glob("*/meta.yaml")):
        from ablate.tracking.mlflow import elsewhere as mlflow_runs

        return mlflow_runs.read_runs(source, experiment=experiment)
    if not path.is_dir():
        raise AnalysisError(
            f"{source} is no table (.csv, .parquet), no folder of runs, and no store of MLflow's "
            "or Optuna's"
        )
    return made_folders.read_runs(path)


@contextmanager
def open_cluster(
    recipe: str,
    cluster: ClusterName | Cluster,
    *,
    address: str | None = None,
    cpus: float | None = None,
) -> Iterator[Cluster]:
    """The machines of a launch, which import ahead what the recipe needs; or those given.

    `address` of a Ray that is there, `cpus` to use of this machine.
    """
    from ablate.trial.recipe import preload

    if not isinstance(cluster, str):
        yield cluster
        return
    if cluster == "local":
        from ablate.cluster.local import LocalCluster

        with LocalCluster(num_cpus=cpus, num_gpus=None, preload=preload(recipe)) as machines:
            yield machines
        return
    if cluster == "debug":
        from ablate.cluster.debug import DebugCluster

        with DebugCluster() as machines:
            yield machines
        return
    from ablate.cluster.ray_cluster import RayCluster

    with RayCluster(address, num_cpus=cpus, preload=preload(recipe)) as machines:
        yield machines


@contextmanager
def open_tracker(
    study: Study,
    record: StudyRecord,
    uri: str | None,
    *,
    fresh: bool = False,
    behind: Callable[[str], None] = lambda trouble: None,
    tell: Callable[[int, int], None] = lambda done, total: None,
    give_up: Callable[[], bool] = lambda: False,
) -> Iterator[Tracker]:
    """The mirror that people watch. At the end `tell` hears how many trials are brought up to
    date, and of how many, until `give_up`; and `behind` why it is not complete."""
    from ablate.study.design import score_of
    from ablate.tracking.tracker import Tracker

    tracker = Tracker(study, record, score=partial(score_of, study), uri=uri, fresh=fresh)
    try:
        yield tracker
    finally:
        if not tracker.close(tell=tell, give_up=give_up):
            behind(str(tracker.trouble))


@contextmanager
def open_archive(
    study: Study,
    record: StudyRecord,
    *,
    say: Callable[[str], None] = lambda line: None,
    patience_s: float = 60.0,
) -> Iterator[Archive | None]:
    """What keeps records beside the checkpoints in an object store, where the study names one.

    What is there of trials that have no record on this disk is brought first; at the end what is
    left is waited for `patience_s`.
    """
    if study.checkpoints is None:
        yield None
        return
    from ablate.records.masking import reason_of
    from ablate.runner.archive import Archive

    archive = Archive(study, record)
    try:
        brought = archive.bring()
    except Exception as error:  # every store has exceptions of its own
        say(f"{study.checkpoints} cannot be asked for records of trials: {reason_of(error)}")
    else:
        if brought:
            say(f"records of {counted(brought, 'trial')} came from {study.checkpoints}")
    archive.start()
    try:
        yield archive
    finally:
        if not archive.close(timeout_s=patience_s):
            say(f"{archive.trouble}; nothing is lost here: launch again to copy them")


@contextmanager
def open_book(
    study: Study,
    record: StudyRecord,
    storage: str | None,
    *,
    fresh: bool = False,
    behind: Callable[[str], None] = lambda trouble: None,
) -> Iterator[CellBook]:
    """Where cells are asked for and told, with what earlier studies taught; at the end `behind`
    hears why its storage is not complete."""
    from ablate.search.book import CellBook
    from ablate.search.warm_start import earlier_studies
    from ablate.study.design import score_of

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
        if book.trouble is not None:
            behind(book.trouble)
