"""Records in an object store: a real S3 server on loopback that goes away and comes back."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from scripted_studies import STUDY, TRIALS, Recorder, prepare
from simulated_cluster import Course, SimulatedCluster, complete

from ablate.api import open_archive
from ablate.cluster.contract import Attempt
from ablate.records.attempt import AttemptWriter
from ablate.records.folder import StudyRecord
from ablate.runner import controller
from ablate.runner.status import StudyStatus
from ablate.study import Study

TEXT = STUDY + "checkpoints: s3://models/ablate\n"


class Server:
    """A bucket that can be switched off and on; what is in it stays."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])

    def on(self) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self._server.start()

    def off(self) -> None:
        self._server.stop()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server()
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "AKIAABLATE"),
        ("AWS_SECRET_ACCESS_KEY", "hunter2hunter2hunter2"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_MAX_ATTEMPTS", "1"),
        ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{made.port}"),
    ):
        monkeypatch.setenv(name, value)
    made.on()
    client = boto3.client("s3")
    client.create_bucket(Bucket="models")
    client.close()
    yield made
    made.off()


def launch(
    study: Study,
    record: StudyRecord,
    cluster: SimulatedCluster,
    stop_level: Callable[[], int] = lambda: 0,
    patience_s: float = 60.0,
) -> tuple[StudyStatus, list[str]]:
    told, said = Recorder(), list[str]()
    with open_archive(study, record, say=said.append, patience_s=patience_s) as archive:
        ended = controller.launch(
            study,
            record,
            cluster=cluster,
            book=told,
            mirror=told,
            archive=archive,
            clock=cluster.clock,
            stop_level=stop_level,
        )
    return ended, said


def test_a_study_goes_on_from_the_store_when_its_disk_is_lost(
    tmp_path: Path, server: Server
) -> None:
    """Ended trials come back as they were, in their order, and are not run again; of one that had
    not ended the attempt is there, and the next one follows it."""
    study = prepare(tmp_path, [], TEXT)
    record = StudyRecord(tmp_path / "runs" / study.name)
    placed: list[str] = []

    def until_the_disk_is_lost(attempt: Attempt) -> Course:
        placed.append(attempt.trial_id)
        if len(placed) < 4:
            return complete(attempt)
        writer = AttemptWriter(attempt.folder, attempt.number)
        writer.step([{"step": 1, "attempt": 1, "time": 0.0, "loss": 1.0}])
        writer.close()
        return Course(1e9)

    cluster = SimulatedCluster(1, until_the_disk_is_lost)
    launch(study, record, cluster, lambda: 2 * (len(placed) == 4))
    before = {trial.trial_id: content_of(trial.folder) for trial in record.records()}
    order = [trial.trial_id for trial in record.records() if trial.attempts()]
    shutil.rmtree(record.folder)
    placed.clear()

    def elsewhere(attempt: Attempt) -> Course:
        placed.append(attempt.trial_id)
        return complete(attempt)

    ended, said = launch(study, record, SimulatedCluster(1, elsewhere))
    assert ended.outcomes == {"completed": TRIALS}
    assert any("came from s3://models/ablate" in line for line in said)
    assert set(order[:3]).isdisjoint(placed), "an ended trial was run again"
    for trial_id in order[:3]:
        assert content_of(record.record(trial_id).folder) == before[trial_id]
    assert record.record(order[3]).attempts() == [1, 2]
    assert [t.trial_id for t in record.records()][:4] == order


@pytest.mark.drill
def test_an_outage_of_the_store_holds_nothing_up(tmp_path: Path, server: Server) -> None:
    """With the store away the study ends the same and says what is not there; the next launch,
    which has nothing else to do, copies it."""
    study = prepare(tmp_path, [], TEXT)
    record = StudyRecord(tmp_path / "runs" / study.name)
    server.off()
    ended, said = launch(study, record, SimulatedCluster(2), patience_s=30.0)
    assert ended.outcomes == {"completed": TRIALS}
    assert "lacks records" in said[-1] and "launch again" in said[-1]
    server.on()
    client = boto3.client("s3")
    assert launch(study, record, SimulatedCluster(2))[1] == []
    found = client.list_objects_v2(Bucket="models", Prefix=f"ablate/{study.name}/")["Contents"]
    client.close()
    keys = [item["Key"] for item in found]
    assert sum(key.endswith("/records/outcome.json") for key in keys) == TRIALS


def content_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
