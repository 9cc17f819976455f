"""Locked databases, and a tracking server that is away, broken or slow."""

from __future__ import annotations

import contextlib
import functools
import random
import socket
import socketserver
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from drills import STEPS, Run, Stage, at_step, study_text
from mlflow import MlflowClient

from ablate.records.folder import StudyRecord
from ablate.search.book import CellBook
from ablate.study import Study, design, parse_study
from ablate.tracking.mlflow.server import serve
from ablate.tracking.mlflow.store import default_uri
from ablate.tracking.tracker import Tracker

pytestmark = pytest.mark.slow
TEXT = study_text(workers=1)


# ------------------------------------------------------------------- locked


@pytest.mark.drill
def test_locked_databases_hold_nothing_up(stage: Stage, tmp_path: Path) -> None:
    """Another program holds Optuna's and MLflow's databases for a while: the study ends the same,
    and both views catch up."""
    drill_locked_databases(stage, tmp_path, 2)


def drill_locked_databases(stage: Stage, folder: Path, step: int) -> None:
    whole = stage.undisturbed(TEXT)
    study = parse_study(TEXT, path="drill.yaml", root=stage.data)
    record = StudyRecord(folder / "runs" / study.name)
    score = functools.partial(design.score_of, study)
    (folder / "runs").mkdir()
    files = [folder / "runs" / "optuna.db", folder / "runs" / "mlflow.db"]
    book = CellBook(study, storage=files[0], score=score)
    tracker = Tracker(study, record, score=score)
    locks: list[sqlite3.Connection] = []

    def lock() -> None:
        for file in files:
            locks.append(sqlite3.connect(file, isolation_level=None, check_same_thread=False))
            locks[-1].execute("PRAGMA busy_timeout = 20000")
            locks[-1].execute("BEGIN EXCLUSIVE")

    def unlock() -> None:
        for connection in locks:
            connection.execute("ROLLBACK")
            connection.close()

    try:
        run = stage.run(TEXT, at_step(step, lock), folder=record.folder, book=book, mirror=tracker)
    finally:
        unlock()
        book.close()
        complete = tracker.close(patience_s=120)
    assert complete, tracker.trouble
    assert book.trouble is None and tracker.trouble is None
    stage.check(run, same_as=whole)
    assert_mirrored_once(default_uri(folder / "runs"), run)


def assert_mirrored_once(uri: str, run: Run) -> None:
    """Every trial's losses stand in MLflow, each step once, with the value that was recorded."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(run.study.name)
    assert experiment is not None
    found = {}
    for page in client.search_runs([experiment.experiment_id], max_results=100):
        history = client.get_metric_history(page.info.run_id, "train/loss")
        if history:
            found[tuple((point.step, point.value) for point in history)] = page
    expected = {tuple((row["step"], row["loss"]) for row in trial.trace()) for trial in run.trials}
    assert set(found) == expected and all(len(points) == STEPS for points in found)


# ------------------------------------------------------------------- a tracking server in trouble


class Door(socketserver.ThreadingTCPServer):
    """Stands before a server: lets requests through, or is shut, answers 500, or takes its time."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, target: int) -> None:
        super().__init__(("127.0.0.1", 0), _Passage)
        self.port = int(self.server_address[1])
        self.target = target
        self.mode = "open"
        self.passing: set[socket.socket] = set()
        self.turning = threading.Lock()
        self.refused = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def turn(self, mode: str) -> None:
        """Change what happens to new requests; connections that are open are cut."""
        with self.turning:
            self.mode = mode
            for connection in self.passing:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def enter(self, connection: socket.socket) -> str:
        """The mode that a new connection meets; from now on a turn cuts it."""
        with self.turning:
            self.passing.add(connection)
            return self.mode

    def leave(self, connection: socket.socket) -> None:
        with self.turning:
            self.passing.discard(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that were cut are what this is for."""


class _Passage(socketserver.BaseRequestHandler):
    server: Door

    def handle(self) -> None:
        mode = self.server.enter(self.request)
        try:
            self.meet(mode)
        finally:
            self.server.leave(self.request)

    def meet(self, mode: str) -> None:
        if mode == "slow":
            time.sleep(0.5)
        if mode in ("shut", "500"):
            self.server.refused += 1
        if mode == "shut":
            return
        if mode == "500":
            self.request.recv(1 << 16)
            answer = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n"
            self.request.sendall(answer + b"Connection: close\r\n\r\n")
            return
        with socket.create_connection(("127.0.0.1", self.server.target)) as inner:
            back = threading.Thread(target=_pump, args=(inner, self.request), daemon=True)
            back.start()
            # MLflow answers to its own name alone.
            names = [b"127.0.0.1:%d" % port for port in (self.server.port, self.server.target)]
            _pump(self.request, inner, *names)
            back.join()


def _pump(
    source: socket.socket, sink: socket.socket, name: bytes = b"", other: bytes = b""
) -> None:
    with contextlib.suppress(OSError):
        while chunk := source.recv(1 << 16):
            sink.sendall(chunk.replace(name, other) if name else chunk)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a real MLflow server."""
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as port:
        yield port


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[int]:
    """A real MLflow server that keeps its files in `folder`; gives its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with serve(f"sqlite:///{folder / 'mlflow.db'}", port=port, log=folder / "log") as server:
        server.wait_ready(120)
        yield port


@pytest.mark.parametrize(
    "order",
    [("shut", "500", "slow"), ("slow", "shut", "500")],
)
@pytest.mark.drill
def test_a_tracking_server_in_trouble_holds_nothing_up(
    stage: Stage, mlflow: int, tmp_path: Path, order: tuple[str, ...]
) -> None:
    """Away, answering 500 and slow, one after the other: the study ends the same, and when the
    server is well again every point is there, once."""
    drill_tracking_trouble(stage, mlflow, tmp_path, order)


def drill_tracking_trouble(stage: Stage, mlflow: int, folder: Path, order: tuple[str, ...]) -> None:
    text = TEXT.replace("name: drill", f"name: drill_{order[0]}")
    study: Study = parse_study(text, path="drill.yaml", root=stage.data)
    record = StudyRecord(folder / "runs" / study.name)
    door = Door(mlflow)
    score = functools.partial(design.score_of, study)
    try:
        door.turn(order[0])
        tracker = Tracker(study, record, score=score, uri=door.url)
        run = stage.run(
            text,
            at_step(4, lambda: door.turn(order[1])),
            at_step(12, lambda: door.turn(order[2])),
            folder=record.folder,
            mirror=tracker,
        )
        end = time.monotonic() + 60
        while order[2] != "slow" and tracker.trouble is None:
            assert time.monotonic() < end, "the trouble was not noticed"
            time.sleep(0.01)
        door.turn("open")
        assert tracker.close(patience_s=120), tracker.trouble
        assert tracker.trouble is None and door.refused > 0
    finally:
        door.shutdown()
        door.server_close()
    assert_ended_the_same(stage, run)
    assert_mirrored_once(f"http://127.0.0.1:{mlflow}", run)


def assert_ended_the_same(stage: Stage, run: Run) -> None:
    """Under a name of its own, by which MLflow tells it from others, a study has the values of the
    one that nothing befell."""
    stage.check(run)
    values = [
        {trial.trial_id: (trial.outcome() or {})["value"] for trial in which.trials}
        for which in (run, stage.undisturbed(TEXT))
    ]
    assert values[0] == values[1]


@pytest.mark.drill
def test_a_tracking_server_away_for_a_minute_holds_nothing_up(
    stage: Stage, mlflow: int, tmp_path: Path
) -> None:
    """It goes in the midst of a study, and comes back when the study has ended long ago."""
    drill_tracking_away(stage, mlflow, tmp_path, 1, away_s=60.0)


def drill_tracking_away(
    stage: Stage, mlflow: int, folder: Path, seed: int, *, away_s: float
) -> None:
    """The server goes away at a random step; all points are there, once, when it is back."""
    text = TEXT.replace("name: drill", f"name: drill_away_{seed}")
    study: Study = parse_study(text, path="drill.yaml", root=stage.data)
    record = StudyRecord(folder / "runs" / study.name)
    door = Door(mlflow)
    back = threading.Timer(away_s, door.turn, ["open"])
    score = functools.partial(design.score_of, study)

    def leave() -> None:
        door.turn("shut")
        back.start()

    try:
        tracker = Tracker(study, record, score=score, uri=door.url)
        step = random.Random(seed).randrange(1, STEPS)
        run = stage.run(text, at_step(step, leave), folder=record.folder, mirror=tracker)
        assert tracker.close(patience_s=away_s + 120), tracker.trouble
        assert tracker.trouble is None and door.refused > 0
    finally:
        back.cancel()
        door.shutdown()
        door.server_close()
    assert_ended_the_same(stage, run)
    assert_mirrored_once(f"http://127.0.0.1:{mlflow}", run)
