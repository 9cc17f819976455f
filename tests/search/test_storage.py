"""Storages of the cells that others read: a PostgreSQL server, and optuna-dashboard on SQLite."""

from __future__ import annotations

import functools
import importlib.util
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from postgres_server import HAS_POSTGRES, Postgres, needs_postgres, running
from synthetic import study_of, write_study
from test_search import SMALL, make_study, run, score, search

from ablate.analysis.results import Result
from ablate.errors import TrackingError
from ablate.runner.agenda import planned
from ablate.search.book import CellBook
from ablate.study import design
from ablate.tracking.mlflow.store import checked
from ablate.tracking.tracker import Tracker

DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running() as server:
        yield server


def read(url: str, name: str) -> list[optuna.trial.FrozenTrial]:
    """What another process would read; no connection is left behind."""
    storage = optuna.storages.RDBStorage(url)
    try:
        return optuna.load_study(study_name=name, storage=storage).trials
    finally:
        storage.engine.dispose()


@needs_postgres
def test_cells_stand_in_postgresql(postgres: Postgres) -> None:
    """A search is stored there as in SQLite: states, values, attributes; rebuilt, nothing twice."""
    study = make_study(SMALL)
    for fresh in (False, True):
        book = CellBook(study, storage=postgres.url, score=score, fresh=fresh)
        asked = search(book, cells=4, workers=2)
        running = book.ask()
        assert running is not None and book.trouble is None
        book.report(running, 0.5, 0.25)
        book.close()
        stored = read(postgres.url, "sweep")
        assert [t.state.name for t in stored] == ["COMPLETE"] * 4 + ["WAITING"]
        assert {t.user_attrs["outcomes"] for t in stored[:4]} == {"completed 2"}
        assert stored[4].intermediate_values == {50: 0.25}
        expected = max(sum(r.value or 0 for r in run(cell)) / 2 for cell in asked)
        assert max(t.value or 0 for t in stored) == pytest.approx(expected)


@needs_postgres
def test_a_server_that_goes_away_holds_nothing_up_and_is_caught_up_with(
    postgres: Postgres,
) -> None:
    """While PostgreSQL is down the search goes on; back again, it holds everything."""
    study = make_study(SMALL, seeds="[0]")
    object.__setattr__(study, "name", "outage")
    book = CellBook(study, storage=postgres.url, score=score)
    book.ask()
    postgres.stop()
    try:
        asked = search(book, cells=5, workers=1)
        assert len(asked) == 5
        assert book.trouble is not None and "is behind" in book.trouble
    finally:
        postgres.start()
    book.close()
    assert book.trouble is None
    states = [t.state.name for t in read(postgres.url, "outage")]
    assert sorted(states) == ["COMPLETE"] * 5 + ["WAITING"]


COSTED = """\
recipe: openclip
baseline: {model: tiny-rn-a, train_data: d.tar, train_num_samples: 640, imagenet_val: data/val}
factors: {wd: [0.2, 0.1]}
seeds: [0, 1]
objective: {metric: imagenet_top1, cost: num_parameters}
"""


def test_mlflow_shows_score_and_cost(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A cell's run holds its mean cost beside its score; on PostgreSQL where there is one."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    if HAS_POSTGRES:
        uri = request.getfixturevalue("postgres").url_of("mlflow")
    study = study_of(tmp_path, COSTED, name="costed")
    record = write_study(tmp_path, study, effects={}, diverged={("wd", "0.1"): (1,)})
    tracker = Tracker(study, record, score=functools.partial(design.score_of, study), uri=uri)
    tracker.update(planned(study, record), [])
    assert tracker.close(patience_s=DEADLINE_S), tracker.trouble
    query = sqlalchemy.text(
        "SELECT r.name, t.value, m.key, m.value FROM runs r "
        "JOIN tags t ON t.run_uuid = r.run_uuid AND t.key = 'kind' "
        "JOIN latest_metrics m ON m.run_uuid = r.run_uuid"
    )
    engine = sqlalchemy.create_engine(uri)
    found: dict[tuple[str, str], dict[str, float]] = {}
    with engine.connect() as connection:
        for name, kind, key, value in connection.execute(query):
            found.setdefault((name, kind), {})[key] = value
    engine.dispose()
    cells = {name: metrics for (name, kind), metrics in found.items() if kind == "cell"}
    assert set(cells) == {"baseline", "wd=0.1"}
    for metrics in cells.values():
        assert metrics["cost"] == 1_234_567 and metrics["score_pct"] > 0
    trials = [metrics for (_, kind), metrics in found.items() if kind == "trial"]
    assert sum("cost" in metrics for metrics in trials) == 3  # the diverged one has none


def test_a_missing_driver_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PostgreSQL URL without its driver says what to install, and shows no password."""
    monkeypatch.setitem(sys.modules, "psycopg", None)
    url = "postgresql+psycopg://me:secret@127.0.0.1/optuna"
    with pytest.raises(TrackingError, match=r"ablate-runner\[postgres\]") as caught:
        CellBook(make_study(SMALL), storage=url, score=score)
    assert "secret" not in str(caught.value)
    with pytest.raises(TrackingError, match="driver"):
        checked(url)


@pytest.mark.skipif(
    importlib.util.find_spec("optuna_dashboard") is None, reason="no optuna-dashboard is installed"
)
def test_optuna_dashboard_opens_our_storage(tmp_path: Path) -> None:
    """The dashboard serves its page, our study with its metric names, and each cell's trial."""
    study = make_study(SMALL, objective="imagenet_top1, cost: gpu_hours")
    book = CellBook(study, storage=tmp_path / "optuna.db", score=score)
    cell = study.cell({})
    book.tell(cell, [Result(cell.levels, s, "completed", 0.2, cost=3.0) for s in (0, 1)])
    book.begin(study.cell({"precision": "fp32"}))
    book.close()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-c", "from optuna_dashboard._cli import main; main()",
         f"sqlite:///{tmp_path / 'optuna.db'}", "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}"
        assert "<title>Optuna Dashboard</title>" in fetch(f"{address}/dashboard")
        [summary] = json.loads(fetch(f"{address}/api/studies"))["study_summaries"]
        assert summary["study_name"] == "sweep"
        detail = json.loads(fetch(f"{address}/api/studies/{summary['study_id']}"))
        assert [trial["state"] for trial in detail["trials"]] == ["Complete", "Waiting"]
        assert detail["trials"][0]["values"] == [0.2, 3.0]
        assert "gpu_hours" in json.dumps(detail)
    finally:
        server.terminate()
        server.wait(timeout=30)


def fetch(address: str) -> str:
    """The page, as soon as the server answers."""
    end = time.monotonic() + DEADLINE_S
    while True:
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                return str(answer.read().decode())
        except (urllib.error.URLError, ConnectionError):
            assert time.monotonic() < end, f"{address} does not answer"
            time.sleep(0.1)
