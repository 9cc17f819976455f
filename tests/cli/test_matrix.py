"""Every kind of study goes through every verb: launched, shown, judged, handed out, told again.

The kinds are those of `tests/matrix.py`; their trials are scripted, everything else is real.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import matrix
import optuna
import pytest
from matrix import Kind
from mlflow import MlflowClient
from stepping_cluster import Stepping

from ablate.api import load, open_book, open_tracker
from ablate.errors import StudyError
from ablate.records.folder import StudyRecord
from ablate.runner import controller, hold
from ablate.runner.status import StudyStatus
from ablate.study import parse_study
from ablate.tracking.mlflow.store import default_uri
from tests.cli.conftest import Said
from tests.scripted_studies import prepare

Ablate = Callable[..., Said]

BESIDE = Kind("one_at_a_time", frozenset({"diverging"}))
OPEN = Kind("leave_one_out", frozenset())
"""Its best cell is one of which the study asks among three cells, and which is chosen of four."""


def launch(
    kind: Kind,
    root: Path,
    *,
    name: str = "kind",
    watch: Callable[[StudyStatus], None] = lambda status: None,
) -> StudyStatus:
    """Run a study to its end with the real loop, book and mirror."""
    study = prepare(root, [], kind.text(name))
    record = StudyRecord(root / "runs" / name)
    cluster = Stepping(4, kind.rules)
    behind: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(hold.controlling(record))
        mirror = stack.enter_context(open_tracker(study, record, None, behind=behind.append))
        book = stack.enter_context(open_book(study, record, None))
        status = controller.launch(
            study, record, cluster=cluster, book=book, mirror=mirror, clock=cluster.clock,
            watch=watch, looking_share=1.0,
        )  # fmt: skip
        assert book.trouble is None
    assert behind == []
    return status


def launch_two(kind: Kind, root: Path) -> StudyStatus:
    """The study, and another one in the same folder of runs at the same time."""
    ended: list[StudyStatus] = []
    thread = threading.Thread(
        target=lambda: ended.append(launch(BESIDE, root, name="beside")), daemon=True
    )
    prepare(root, [], BESIDE.text("beside"))
    thread.start()
    status = launch(kind, root)
    thread.join(60)
    assert ended and ended[0].outcomes == {"completed": 4, "diverged": 2}
    return status


def told(root: Path, name: str) -> dict[str, Counter[str]]:
    """What MLflow shows of a study: for trials and cells, how many of each outcome."""
    client = MlflowClient(default_uri(root / "runs"))
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    return {
        kind: Counter(run.data.tags["outcome"] for run in runs if run.data.tags["kind"] == kind)
        for kind in ("trial", "cell")
    }


def asked(root: Path, name: str) -> Counter[str]:
    """What Optuna holds of a study: how many cells of each state, those of other studies apart."""
    storage = f"sqlite:///{root / 'runs' / name / 'optuna.db'}"
    (found,) = optuna.get_all_study_names(storage)
    trials = optuna.load_study(study_name=found, storage=storage).trials
    return Counter(
        "earlier" if any("earlier" in str(v) for v in t.user_attrs.values()) else t.state.name
        for t in trials
    )


def check_counts(root: Path, status: StudyStatus, ablate: Ablate) -> None:
    """Status, report, MLflow and Optuna count the same trials and cells as the folder holds."""
    folder = root / "runs" / status.name
    records = list(StudyRecord(folder).records())
    held = Counter(str((record.outcome() or {}).get("outcome")) for record in records)
    assert held == Counter(status.outcomes) and sum(held.values()) == status.num_trials
    said = json.loads(ablate("status", str(folder), "--json").out)
    assert said["outcomes"] == status.outcomes and said["waiting"] == 0
    with open(folder / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert Counter(row["outcome"] for row in rows) == held
    shown = told(root, status.name)
    assert shown["trial"] == held
    cells = {tuple(sorted(record.trial()["levels"].items())) for record in records}
    assert shown["cell"].total() == len(cells)
    there = asked(root, status.name)
    assert there.total() - there["earlier"] == len(cells)


def check_words(root: Path, status: StudyStatus) -> dict[str, Any]:
    """The report's texts hold no number that is none, and no name of Python's; its verdicts."""
    folder = root / "runs" / status.name
    text = (folder / "report.md").read_text()
    assert not re.search(r"\bnan\b|\bNone\b|\binf\b|\bTrue\b|Outcome\.|Traceback", text)
    found: dict[str, Any] = json.loads((folder / "verdicts.json").read_text())
    for question in found["questions"].values():
        for contrast in question["contrasts"]:
            check_sentence(contrast)
    check_use(found)
    return found


def check_use(found: Mapping[str, Any]) -> None:
    """What is handed out is called better only where the question about it is answered so."""
    changes = [(f, level) for f, level in (found["use"]["cell"] or {}).items()]
    for question in found["questions"].values():
        for c in question["contrasts"]:
            if c["estimand"] == "simple" and (c["factor"], c["level"]) in changes:
                if c["verdict"] == "INCONCLUSIVE":
                    assert "is shown to be better" not in found["use"]["why"], found["use"]["why"]


def check_sentence(contrast: Mapping[str, Any]) -> None:
    """Verdict and sentence agree; divergence is a reason only where the two sides differ in it."""
    assert ("undecided" in contrast["sentence"]) <= (contrast["verdict"] == "INCONCLUSIVE")
    assert "0 more seeds" not in contrast["sentence"]
    gone = contrast.get("divergence")
    if contrast["verdict"] == "INCONCLUSIVE" and gone:
        (k1, n1), (k0, n0) = gone["level"], gone["reference"]
        if k1 * n0 == k0 * n1:
            assert "with probability" not in contrast["sentence"], contrast["sentence"]


def check_export(root: Path, name: str, found: Mapping[str, Any], ablate: Ablate) -> None:
    """What is recommended is handed out; where nothing is, a sentence says why."""
    said = ablate("export", f"runs/{name}", "--json")
    if found["use"]["cell"] is None:
        assert said.code != 0 and said.err.strip()
        return
    assert said.code == 0, said.err
    kept = json.loads((root / "runs" / name / "best" / "provenance.json").read_text())
    assert kept["levels"].items() >= found["use"]["cell"].items()


def go_through(kind: Kind, root: Path, store: Path, ablate: Ablate) -> None:
    (root / "runs").mkdir()
    shutil.copy(store, root / "runs" / "mlflow.db")
    if "warm_start" in kind.options:
        launch(Kind("one_at_a_time", kind.options & {"cost"}), root, name="earlier")
    status = (launch_two if "two" in kind.options else launch)(kind, root)
    assert status.waiting == 0 and not status.stuck
    assert ("failed" in status.outcomes) <= ("failed" in kind.options)
    assert ("diverged" in status.outcomes) == ("diverging" in kind.options)
    name = f"runs/{status.name}"
    assert ablate("verify", name).code == 0
    assert ablate("report", name).code == 0
    check_counts(root, status, ablate)
    found = check_words(root, status)
    check_export(root, status.name, found, ablate)
    before = told(root, status.name), asked(root, status.name)
    said = ablate("rebuild", name)
    assert said.code == 0 and f"from {status.num_trials} trials" in said.out, said.err
    assert (told(root, status.name), asked(root, status.name)) == before
    assert load(root / name).status().outcomes == status.outcomes


IN_THE_SUITE = ("one_at_a_time", "search")
"""Designs whose combinations are launched each time; the others on demand."""


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind.design in IN_THE_SUITE else pytest.mark.exhaustive)
        for kind in (*matrix.covering(matrix.allowed()), OPEN)
    ],
    ids=str,
)
def test_things_that_go_together_go_through_every_verb(
    kind: Kind, tmp_path: Path, empty_store: Path, ablate: Ablate
) -> None:
    """Whatever two things a study may combine: it ends, is verified, reported, exported and told
    again, and folder, status, report, MLflow and Optuna count the same."""
    go_through(kind, tmp_path, empty_store, ablate)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", matrix.allowed(), ids=str)
def test_every_kind_of_study_goes_through_every_verb(
    kind: Kind, tmp_path: Path, empty_store: Path, ablate: Ablate
) -> None:
    """The same of every combination there is."""
    go_through(kind, tmp_path, empty_store, ablate)


def test_what_makes_no_sense_together_is_refused_by_check(tmp_path: Path, ablate: Ablate) -> None:
    """Each is refused before anything runs, with a sentence that names it; all others are read."""
    prepare(tmp_path, [])
    for kind in matrix.everything():
        if len(kind.options) > 1 and not kind.options == {"prune", "cost"}:
            continue
        says = matrix.trouble(kind)
        try:
            parse_study(kind.text(), path="kind.yaml", root=tmp_path)
        except StudyError as error:
            assert says is not None and says in str(error), f"{kind}: {error}"
        else:
            assert says is None, f"{kind} is not refused"
    (tmp_path / "kind.yaml").write_text(Kind("search", frozenset({"nuisance"})).text())
    said = ablate("check", "kind.yaml")
    assert said.code == 2 and "make the nuisance a factor of the search" in said.err + said.out
    launch(Kind("one_at_a_time", frozenset()), tmp_path, name="earlier")
    for options, code in ((("warm_start",), 0), (("warm_start", "cost"), 2)):
        (tmp_path / "kind.yaml").write_text(Kind("search", frozenset(options)).text())
        said = ablate("check", "kind.yaml")
        assert said.code == code
        says = "objective.cost None, this study num_parameters" if code else "3 of 3 cells"
        assert says in said.err + said.out, said


DAMAGE: dict[str, tuple[str, Callable[[str], str]]] = {
    "a step that is a word": (
        "attempts/1/trace.jsonl", lambda text: text.replace('"step": 1,', '"step": "one",'),
    ),
    "an event that says nothing": ("attempts/1/events.jsonl", lambda text: '{"marker": "m"}\n'),
    "an outcome whose value is a word": (
        "outcome.json", lambda text: json.dumps({**json.loads(text), "value": "high"}),
    ),
    "a torn outcome": ("outcome.json", lambda text: text[: len(text) // 2]),
    "a file that is a folder": ("attempts/1/machine.jsonl", lambda text: ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """A folder of runs with one whole study."""
    root = tmp_path_factory.mktemp("whole")
    (root / "runs").mkdir()
    shutil.copy(empty_store, root / "runs" / "mlflow.db")
    launch(Kind("one_at_a_time", frozenset()), root)
    return root


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_trial_that_cannot_be_shown_is_named_and_the_others_go_on(
    damage: str, whole: Path, tmp_path: Path, ablate: Ablate
) -> None:
    """Whatever a trial's records hold, `rebuild` ends with 1 and names the trial, and both views
    hold all the others."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    folder = next(
        record.folder for record in StudyRecord(tmp_path / "runs" / "kind").records()
        if record.trial()["levels"]["beta2"] == "0.98" and record.trial()["seed"] == 1
    )  # fmt: skip
    name, change = DAMAGE[damage]
    file = folder / name
    if damage == "a file that is a folder":
        file.unlink(missing_ok=True)
        file.mkdir()
    else:
        file.write_text(change(file.read_text() if file.exists() else ""))
    said = ablate("rebuild", "runs/kind")
    assert said.code == 1, said
    assert "beta2=0.98 · seed 1" in said.err or folder.name in said.err, said.err
    shown = told(tmp_path, "kind")["trial"]
    assert shown["completed"] == 5 and shown.total() - shown["unreadable"] == 5
    assert asked(tmp_path, "kind")["COMPLETE"] == (2 if file.name == "outcome.json" else 3)


def test_a_report_on_the_way_leaves_mlflow_to_the_launch(
    tmp_path: Path, ablate: Ablate, empty_store: Path
) -> None:
    """The launch tells of its trials as they run; a report by code that tells runs in another form
    would delete them under it, and call them stopped."""
    kind, folder = Kind("one_at_a_time", frozenset()), tmp_path / "runs" / "kind"
    seen: list[str] = []

    def shown() -> dict[str, str]:
        client = MlflowClient(default_uri(tmp_path / "runs"))
        found = client.get_experiment_by_name("kind")
        runs = client.search_runs([found.experiment_id]) if found is not None else []
        for run in runs:
            client.set_tag(run.info.run_id, "mlflow.ablate.form", "of earlier code")
        return {run.info.run_id: run.info.status for run in runs if "seed" in run.data.params}

    def report(status: StudyStatus) -> None:
        if seen or not any(trial.step for trial in status.running):
            return
        deadline = time.monotonic() + 60
        while len(before := shown()) < len(status.running) and time.monotonic() < deadline:
            time.sleep(0.05)
        said = ablate("report", str(folder))
        assert said.code == 0, said.err
        assert shown() == before and set(before.values()) == {"RUNNING"}
        seen.extend(before)

    folder.parent.mkdir()
    shutil.copy(empty_store, folder.parent / "mlflow.db")
    launch(kind, tmp_path, watch=report)
    assert seen
