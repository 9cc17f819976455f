"""Does the MLflow mirror keep up with 100 trials that write 10 rows a second each?

    pytest tests/bench/test_mirror_pace.py -m bench -s

A process of its own appends rows of 20 measurements to 100 trials' logs, as their workers would,
for 20 s; the mirror follows into an SQLite file, or into a real server on loopback. Printed is how
long the last point of all took to arrive after the trials had ended, what the mirror cost, and by
how much the writers were late, with the mirror and without it.
"""

from __future__ import annotations

import multiprocessing
import socket
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from ablate.records.attempt import AttemptWriter
from ablate.records.folder import StudyRecord
from ablate.study import Study, design, parse_study
from ablate.tracking.mlflow.server import serve
from ablate.tracking.mlflow.store import default_uri
from ablate.tracking.tracker import Tracker
from ablate.trial.identity import Trial

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1200)]

ROWS_PER_S = 10


def study_of(num_trials: int) -> Study:
    text = f"""
recipe: openclip
baseline: {{model: RN50, train_data: x.tar, beta2: 0.999}}
factors: {{beta2: [0.999, 0.98]}}
seeds: {list(range(num_trials // 2))}
"""
    return parse_study(text, path="pace.yaml", root="/")


def write_rows(
    root: str,
    ids: list[str],
    seconds: int,
    lateness: multiprocessing.Queue,  # type: ignore[type-arg]
) -> None:
    """Append a row to every trial ten times a second; tell the worst delay of a row."""
    record = StudyRecord(Path(root))
    writers = [AttemptWriter(record.record(trial_id).folder, 1) for trial_id in ids]
    began = time.monotonic()
    worst = 0.0
    for step in range(1, ROWS_PER_S * seconds + 1):
        time.sleep(max(0.0, began + step / ROWS_PER_S - time.monotonic()))
        for writer in writers:
            row = {f"measure_{k}": step / (k + 1) for k in range(20)}
            writer.step([{"step": step, "attempt": 1, "time": time.time(), **row}])
        worst = max(worst, time.monotonic() - began - step / ROWS_PER_S)
    lateness.put(worst)


def run_writers(
    record: StudyRecord, trials: list[Trial], tracker: Tracker | None, *, seconds: int
) -> float:
    """Run the writing process to its end; the worst delay of a row (s)."""
    context = multiprocessing.get_context("spawn")
    lateness = context.Queue()
    ids = [trial.id for trial in trials]
    process = context.Process(target=write_rows, args=(str(record.folder), ids, seconds, lateness))
    process.start()
    while process.is_alive():
        if tracker is not None:
            tracker.update(trials, ids)
        process.join(0.5)
    return float(lateness.get())


def pace(folder: Path, where: str, *, num_trials: int, seconds: int) -> float:
    """Let the trials write while the mirror follows; seconds until it was complete after them."""
    study = study_of(num_trials)
    trials = list(design.propose(study))
    records = [StudyRecord(folder / name / study.name) for name in ("alone", "mirrored")]
    for record in records:
        for trial in trials:
            record.write_trial({**trial.to_json(), "fingerprint": {}})
    alone = run_writers(records[0], trials, None, seconds=seconds)

    record = records[1]
    server = None
    uri = default_uri(record.folder.parent)
    if where == "server":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        store = f"sqlite:///{folder / 'server.db'}"
        server = serve(store, port=port, log=folder / "server.log")
        server.wait_ready(120)
        uri = server.url
    try:
        tracker = Tracker(study, record, score=lambda result: result.value, uri=uri)
        tracker.update(trials, [])
        cpu = time.process_time()
        began = time.monotonic()
        mirrored = run_writers(record, trials, tracker, seconds=seconds)
        for trial in trials:
            outcome = {"outcome": "completed", "value": 0.2, "attempt": 1, "wall_s": 1.0}
            outcome["time"] = time.time()
            record.write_outcome(record.record(trial.id), outcome)
        tracker.update(trials, [])
        ended = time.monotonic()
        assert tracker.close(patience_s=900), tracker.trouble
        arrived = time.monotonic()
        cpu = time.process_time() - cpu
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name(study.name)
        runs = client.search_runs(
            [experiment.experiment_id], "tags.kind = 'trial'", max_results=500
        )
        assert len(runs) == num_trials
        points = client.get_metric_history(runs[0].info.run_id, "train/measure_3")
        assert points[-1].step == ROWS_PER_S * seconds
        served = 0.0
        if server is not None:
            times = [psutil.Process(server.process.pid)]
            times += times[0].children(recursive=True)
            served = sum(sum(item.cpu_times()[:2]) for item in times)
    finally:
        if server is not None:
            server.close()
    rows = num_trials * len(points)
    print(
        f"\n{where}: {num_trials} trials x {ROWS_PER_S} rows/s for {seconds} s; {rows} of "
        f"{num_trials * ROWS_PER_S * seconds} rows kept; whole {arrived - ended:.1f} s after the "
        f"last row; controller {cpu:.1f} s and server {served:.1f} s of a core in "
        f"{arrived - began:.0f} s; worst delay of a row {mirrored:.2f} s, "
        f"without mirror {alone:.2f} s"
    )
    return arrived - ended


@pytest.mark.parametrize("where", ["file", "server"])
def test_the_mirror_keeps_up(tmp_path: Path, where: str) -> None:
    """Everything that the thinning rule keeps is there soon after the last row."""
    assert pace(tmp_path, where, num_trials=100, seconds=20) < 200
