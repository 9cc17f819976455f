"""A program of the user's as a trial: what it says, how it ends, and what of it is recorded."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from ablate.cluster.contract import Attempt, Shape
from ablate.cluster.local import LocalCluster
from ablate.errors import StudyError
from ablate.recipes import command
from ablate.recipes.command.lines import parse_line
from ablate.records.files import read_json, read_rows
from ablate.records.folder import StudyRecord, TrialRecord
from ablate.report.export import export_best
from ablate.report.verify_bundle import verify_bundle
from ablate.runner import controller, hold
from ablate.study import load_study, parse_study
from ablate.study.table import read_table
from ablate.tracking.mlflow.store import default_uri
from ablate.training.data.emoji import prepare_emoji
from tests.scripted_studies import Recorder

STUDIES = Path(__file__).parents[2] / "studies"


def write_trial(folder: Path, script: str, *, workers: int = 1, **fields: Any) -> TrialRecord:
    """A trial whose command is `script`, judged by top1."""
    (folder / "script.py").parent.mkdir(parents=True, exist_ok=True)
    (folder / "script.py").write_text(script)
    config = {
        "command": "python script.py",
        "metrics": {"top1": {"chance": 0.1}},
        "cwd": str(folder),
        **fields,
    }
    content = {
        "format": 1,
        "id": "t",
        "seed": 0,
        "recipe": "command",
        "config": command.Config(**config).model_dump(mode="json"),
        "gang": {"workers": workers},
        "objective": {"metric": "top1", "direction": "maximize"},
        "root": str(folder),
    }
    (folder / "trial.json").write_text(json.dumps(content))
    return TrialRecord(folder)


def start(trial: TrialRecord, **env: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "ablate.trial", str(trial.folder)],
        env={**os.environ, **env}, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(trial: TrialRecord, **env: str) -> tuple[int, str]:
    with start(trial, **env) as process:
        _, said = process.communicate(timeout=120)
    return process.returncode, said.decode()


def test_lines_files_patterns_and_tables_are_read(tmp_path: Path) -> None:
    """JSON on standard output and in ABLATE_METRICS, a pattern's groups, a table's rows: steps of
    undeclared names, evaluations of declared ones; whatever else it prints is left alone."""
    script = """
import json, os, sys
print("hello", {"not": "json"})
print(json.dumps({"step": 1, "loss": 2.5, "note": "text"}))
sys.stderr.write("step 2 loss 1.25\\n")
print("[1, 2]", flush=True)
with open(os.environ["ABLATE_METRICS"], "a") as file:
    file.write(json.dumps({"step": 3, "loss": 1.0}) + "\\n")
    file.write(json.dumps({"eval": 1, "step": 3, "top1": 0.25, "other": 7}) + "\\n")
import time; time.sleep(0.6)
with open("metrics.csv", "w") as file:
    file.write("step,loss,top1\\n4,0.5,\\n5,0.25,0.75\\n")
"""
    trial = write_trial(
        tmp_path, script, patterns=[r"step (?P<step>\d+) loss (?P<loss>\S+)"], table="metrics.csv"
    )
    code, said = run(trial)
    assert code == 0, said
    losses = [(row["step"], row["loss"]) for row in trial.trace()]
    assert losses == [(1, 2.5), (2, 1.25), (3, 1.0), (4, 0.5), (5, 0.25)]
    evaluations = [(row["step"], row["top1"]) for row in trial.evaluations()]
    assert evaluations == [(3, 0.25), (5, 0.75)] and trial.evaluations()[0]["other"] == 7
    result = trial.result(1)
    assert result is not None
    assert (result["status"], result["step"], result["final"]) == ("completed", 5, {"top1": 0.75})
    assert "hello" in said


@pytest.mark.parametrize(
    ("script", "fields", "status", "reason"),
    [
        ('print(\'{"step": 1, "loss": NaN, "top1": NaN}\')', {}, "diverged", "top1 is nan"),
        ('print(\'{"step": 1, "top1": 1e217}\')', {}, "diverged", "top1 is 1e+217 at step 1"),
        ('print(\'{"step": 9, "a": 1}\\n{"step": 3, "a": 1}\')', {}, "failed", "step 3 after step"),
        ("import time; time.sleep(60)", {"patience_s": 0.5}, "failed", "said nothing for 0.5 s"),
        ("print('nothing')", {}, "failed", "ended without top1"),
        ('print(\'{"step": 2, "top1": 0.5}\')', {"steps": 5}, "completed", "2 of 5 steps"),
    ],
)  # fmt: skip
def test_bad_output_is_a_clear_outcome(
    tmp_path: Path, script: str, fields: dict[str, Any], status: str, reason: str
) -> None:
    """No number, steps that fall, silence, no measurement, too few steps: each is said."""
    trial = write_trial(tmp_path, script, **fields)
    code, said = run(trial)
    result = trial.result(1)
    assert code == 0 and result is not None, said
    assert result["status"] == status and reason in result["reason"], result["reason"]


@pytest.mark.parametrize(
    ("line", "reads"),
    [
        ("top1: 0.5940", 0.594),
        ("Epoch 3 done (Top1 = 59.4%, loss 2.0)", 59.4),
        ('INFO [val] "top1": nan, 3 s', math.nan),
        ("best top1  -> 1.5e-2", 0.015),
        ("top10: 0.5", None),
        ("the top1 is good", None),
    ],
)
def test_a_result_that_nobody_reads_is_told_with_what_would(
    tmp_path: Path, line: str, reads: float | None
) -> None:
    """A script that ends well without its metric failed; the reason says how to tell it, and, where
    a line looks like it, the pattern that reads this line."""
    trial = write_trial(tmp_path, f"print({line!r})")
    run(trial)
    reason = read_json(tmp_path / "attempts" / "1" / "result.json")["reason"]
    assert '{"top1": 0.5}' in reason
    found = re.search(r"patterns: \['(.+)'\] would read", reason)
    assert (found is None) == (reads is None), reason
    if found is not None:
        row = parse_line(line, [re.compile(found[1])])
        assert row is not None and row == pytest.approx({"top1": reads}, nan_ok=True)


def test_a_crash_says_its_last_lines_and_a_flood_loses_nothing(tmp_path: Path) -> None:
    """A command that fails is a crash with its own words; of one that floods its output every
    measurement is kept, and of the rest the first MiBs."""
    crash = write_trial(tmp_path / "crash", "print('on my way'); raise SystemExit(3)")
    code, said = run(crash)
    assert code == 1 and crash.result(1) is None
    assert "the command exited 3" in said and "on my way" in said
    script = """
import json
for step in range(1, 201):
    print("x" * 200_000)
    print(json.dumps({"step": step, "loss": 1.0, "top1": 0.5}))
"""
    flood = write_trial(tmp_path / "flood", script)
    code, said = run(flood)
    assert code == 0 and len(flood.trace()) == 200
    assert 16 << 20 <= len(said) < 18 << 20 and "the rest is not kept" in said


def test_an_epoch_beside_an_evaluation_is_no_step(tmp_path: Path) -> None:
    """Lines without steps are counted; an evaluation that says its epoch stands at the last."""
    script = """
for epoch in (1, 2):
    print('{"loss": 1.5, "epoch": %d}' % epoch)
    print('{"top1": 0.25, "epoch": %d}' % epoch)
"""
    trial = write_trial(tmp_path / "t", script)
    code, said = run(trial)
    assert code == 0, said
    assert [row["step"] for row in trial.trace()] == [1, 2]
    found = [(row["step"], row["epoch"], row["top1"]) for row in trial.evaluations()]
    assert found == [(1, 1, 0.25), (2, 2, 0.25)]


def test_a_marker_ends_the_command(tmp_path: Path) -> None:
    """Losses that are no numbers end the run as diverged, and the command with it."""
    script = """
import json, time
for step in range(1, 1000):
    print(json.dumps({"step": step, "loss": float("nan")}))
    time.sleep(0.05)
"""
    trial = write_trial(tmp_path, script)
    code, said = run(trial)
    result = trial.result(1)
    assert code == 0 and result is not None, said
    assert result["status"] == "diverged" and result["stop"]["marker"] == "non_finite"
    assert result["step"] < 500


RESUMING = """
import json, pathlib, signal, sys, time
state = pathlib.Path(sys.argv[1]) / "step"
step = int(state.read_text()) if state.exists() else 0
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
while step < 40:
    step += 1
    print(json.dumps({"step": step, "loss": 1 / step}))
    time.sleep(0.05)
    if stop:
        state.write_text(str(step))
        sys.exit(143)
print(json.dumps({"top1": 0.5}))
"""


@pytest.mark.parametrize("resumes", [True, False])
def test_sigterm_is_handed_on(tmp_path: Path, resumes: bool) -> None:
    """A command with {checkpoints} goes on where it was stopped; any other starts again, and the
    record says so."""
    line = f"python script.py {'{checkpoints}' if resumes else tmp_path / 'none'}"
    trial = write_trial(tmp_path, RESUMING, command=line)
    with start(trial) as process:
        deadline = time.monotonic() + 60
        while len(trial.trace()) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 75 and trial.result(1) is None
    stopped_at = trial.trace()[-1]["step"]
    code, said = run(trial)
    assert code == 0, said
    first = next(iter(read_rows(trial.attempt_folder(2) / "trace.jsonl")))
    assert first["step"] == (stopped_at + 1 if resumes else 1)
    assert [row["step"] for row in trial.trace()] == list(range(1, 41))
    told = trial.attempt_folder(2) / "resumed.json"
    assert told.exists() is not resumes
    assert resumes or "no {checkpoints}" in read_json(told)["starts_over"]


LATE = """
import os, time
from ablate.trial import worker

def main():
    if os.environ["RANK"] == "0":
        time.sleep(1.0)
    return worker.main([])
"""


def test_each_rank_runs_the_command(tmp_path: Path) -> None:
    """Two ranks get torchrun's variables and the port of their meeting, where nobody is heard
    before rank 0's own command listens, however late that is; rank 0's lines count."""
    script = """
import json, os, socket
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
if rank == 0:
    with socket.create_server(place) as server:
        server.settimeout(60)
        peer, _ = server.accept()
        peer.settimeout(60)
        said = peer.recv(10).decode()
    print(json.dumps({"step": 1, "top1": 0.5, "world": world, "heard": int(said)}))
else:
    import time
    until = time.monotonic() + 60
    while True:
        try:
            with socket.create_connection(place, 60) as door:
                door.sendall(str(rank).encode())
            break
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
    print(json.dumps({"step": 7, "loss": 1}))
"""
    trial = write_trial(tmp_path, script, workers=2)
    trial.attempt_folder(1).mkdir(parents=True)
    (tmp_path / "late_rank.py").write_text(LATE)
    with LocalCluster(num_cpus=2) as cluster:
        env = {"PYTHONPATH": str(tmp_path)}
        cluster.start(Attempt("t", 1, trial.folder, Shape(2), "late_rank:main", env))
        ended = None
        while ended is None:
            ended = next((e for e in cluster.wait(1.0) if e.kind != "placed"), None)
    assert ended.exit_codes == (0, 0), trial.log_tail(1)
    assert [(row["step"], row["world"], row["heard"]) for row in trial.trace()] == [(1, 2, 1)]
    result = trial.result(1)
    assert result is not None and result["final"] == {"top1": 0.5}


STUDY = """\
name: scripts
recipe: command
baseline:
  command: python train.py --lr {lr} --seed {seed}
  metrics: {top1: maximize}
  lr: 0.1
factors: {lr: [0.1, 0.01]}
seeds: [0, 1]
"""


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("  lr: 0.1\n", "", "no field fills {lr}"),
        ("  lr: 0.1\n", "  lr: 0.1\n  wd: 0\n", "wd has no placeholder in the command"),
        ("--seed {seed}", "--seed '{seed}", "cannot be split"),
        ("  lr: 0.1\n", "  lr: 0.1\n  steps: '{lr}'\n", "must be a number above 0"),
        ("  lr: 0.1\n", "  lr: 0.1\n  patterns: ['loss (.*)']\n", "names no group"),
        ("seeds:", "objective: {metric: top5}\nseeds:", "metric 'top5' is not known"),
        ("{lr: [0.1, 0.01]}", "{lrr: [0.1, 0.01]}", "did you mean 'lr'?"),
    ],
)
def test_a_wrong_command_is_refused_with_its_line(old: str, new: str, why: str) -> None:
    """Placeholders without a field, fields without a placeholder, lines and patterns that cannot be
    read, measurements that are not declared."""
    with pytest.raises(StudyError, match=r"s\.yaml:\d+: ") as refused:
        parse_study(STUDY.replace(old, new), path="s.yaml")
    assert why in str(refused.value)


def test_a_loss_of_another_name_is_judged_and_no_loss_is_not(tmp_path: Path) -> None:
    """A train_loss that is no number is what loss is, and ends the run; a validation loss is none,
    and who tells no loss gets no verdict."""
    rows = [{"step": k, "train_loss": 2 - k / 50, "learning_rate": 0.1} for k in range(1, 41)]
    rows += [{"step": k, "train_loss": math.nan} for k in range(41, 60)]
    named = write_trial(tmp_path / "named", f"import json\nfor r in {rows!r}: print(json.dumps(r))"
                        .replace("nan", "float('nan')"))  # fmt: skip
    said = [{"step": 1, "val_loss": 2.0, "speed": 3.0}, {"top1": 0.5}]
    bare = write_trial(tmp_path / "bare", f"import json\nfor r in {said!r}: print(json.dumps(r))")
    run(named)
    run(bare)
    assert [row.keys() & {"loss", "lr", "train_loss"} for row in named.trace()[:1]] == [
        {"loss", "lr"}
    ]
    first, second = named.result(1), bare.result(1)
    assert first is not None and (first["status"], first["verdict"]) == ("diverged", "NUMERIC_FAIL")
    assert second is not None and (second["status"], second["verdict"]) == ("completed", "")
    assert set(bare.trace()[0]) >= {"val_loss", "speed"}
    done = subprocess.run(
        [sys.executable, "-m", "ablate", "diagnose", str(bare.folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "1 trial told no loss, and could not be judged" in done.stdout, done


def test_the_page_on_any_program_is_true(tmp_path: Path) -> None:
    """Its study as it stands, of a script that tells of some steps from 0 on and of one that tells
    of none: all of it is launched, judged, told to MLflow and found in order."""
    page = (STUDIES.parent / "docs" / "asking.md").read_text()
    text = page.split("## Any program", 1)[1].split("```yaml\n", 1)[1].split("```", 1)[0]
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "train.py").write_text("""
import argparse
words = argparse.ArgumentParser()
words.add_argument("--lr", type=float)
words.add_argument("--seed", type=int)
given = words.parse_args()
for step in (*range(11), 30) if given.lr == 0.1 else ():
    print(f"step {step} loss {1 / (1 + step)}")
print(f"accuracy: {0.5 + given.lr + given.seed / 1000}")
""")
    ablate = [sys.executable, "-m", "ablate"]
    command = [*ablate, "launch", "mine.yaml", "--yes", "--cluster", "local"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "behind" not in said and "troubles" not in said, said
    client = MlflowClient(default_uri(tmp_path / "runs"))
    [experiment] = client.search_experiments(filter_string="name = 'mine'")
    runs = client.search_runs([experiment.experiment_id], "tags.kind = 'trial'")
    assert sorted(run.data.metrics["score"] for run in runs) == pytest.approx(
        [0.51, 0.511, 0.512, 0.6, 0.601, 0.602]
    )
    [counted] = [run for run in runs if run.data.metrics["score"] == 0.6]
    history = client.get_metric_history(counted.info.run_id, "train/loss")
    assert [point.step for point in history] == [*range(11), 30]
    command = [*ablate, "verify", "runs/mine"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_scikit_learn_script_is_a_study(tmp_path: Path) -> None:
    """studies/digits.yaml with a seed less, through the real launch: every trial completes, the
    factors' cells differ, and the best setting's train.sh is its own line."""
    text = (STUDIES / "digits.yaml").read_text().replace("seeds: [0, 1, 2]", "seeds: [0, 1]")
    text = text.replace("  penalty: [1.0e-4, 1.0e-2]\n", "").replace("  lr: [0.01, 0.001]\n", "")
    study = parse_study(text, path="digits.yaml", root=STUDIES.parent)
    record = StudyRecord(tmp_path / study.name)
    told = Recorder()
    with hold.controlling(record), LocalCluster(num_cpus=2) as cluster:
        controller.launch(study, record, cluster=cluster, book=told, mirror=told)
    table = read_table(study, record)
    assert [cell.mean is not None for cell in table.cells] == [True, True]
    ten, two = (cell.mean or 0.0 for cell in table.cells)
    assert ten > two > 0.5
    paths = export_best(study, record)
    assert paths.script is not None
    words = shlex.split(paths.script.read_text().splitlines()[-1])
    assert words[:4] == ["exec", "python", "studies/digits.py", "--lr"]
    kept = {check.part: check for check in verify_bundle(paths.folder)}
    assert all(check.kept for check in kept.values()), kept
    assert {"setting", "train.sh", "run.sh"} < set(kept)


def test_a_command_that_tells_of_every_tenth_step_keeps_its_promises(tmp_path: Path) -> None:
    """Steps 10, 20, 30 are all that it says, and all that `verify` asks for."""
    (tmp_path / "s.py").write_text(
        "import json\n"
        "for i in range(3):\n    print(json.dumps({'loss': 2.0 - 0.1 * i}))\n"
        "print(json.dumps({'eval': True, 'top1': 0.5}))\n"
    )
    text = (
        "recipe: command\n"
        "baseline: {command: 'python s.py {lr}', every: 10, lr: 1, cwd: .,\n"
        "           metrics: {top1: {chance: 0.1}}}\n"
        "factors: {lr: [1, 2]}\nseeds: [0]\nobjective: {metric: top1, margin: 0.1}\n"
    )
    (tmp_path / "s.yaml").write_text(text)
    ablate = [sys.executable, "-m", "ablate"]
    for words in (["launch", "s.yaml", "--yes", "--cluster", "local"], ["verify", "runs/s"]):
        done = subprocess.run([*ablate, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    record = next(StudyRecord(tmp_path / "runs" / "s").records())
    assert [row["step"] for row in record.trace()] == [10, 20, 30]


AS_COMMAND = STUDIES / "open_clip_as_command.yaml"


def test_open_clip_train_itself_is_a_command() -> None:
    """studies/open_clip_as_command.yaml plans: the peer's own line, its log read by patterns."""
    study = load_study(AS_COMMAND)
    config = command.Config(**study.config(study.cell({}), seed=1))
    line = config.line(checkpoints="c", folder="f")
    assert line[:3] == ["python", "-m", "open_clip_train.main"] and "--seed=1" in line
    assert command.outline(config, workers=1, gpus=0, root=STUDIES.parent).measures == (
        "image_to_text_r1",
    )


@pytest.mark.exhaustive
def test_open_clip_train_runs_unchanged(tmp_path: Path) -> None:
    """The same study with fewer samples and one factor: both trials complete with the loss and the
    temperature of each line of the peer's log, the factor's own learning rates and the recall of
    its last evaluation."""
    prepare_emoji(tmp_path / "data" / "emoji")
    text = AS_COMMAND.read_text().replace("--train-num-samples 1024", "--train-num-samples 128")
    text = text.replace("  wd: [0.2, 0.0]\n", "").replace("seeds: [0, 1]", "seeds: [0]")
    study = parse_study(text, path="as_command.yaml", root=tmp_path)
    record, told = StudyRecord(tmp_path / study.name), Recorder()
    with hold.controlling(record), LocalCluster(num_cpus=2) as cluster:
        status = controller.launch(study, record, cluster=cluster, book=told, mirror=told)
    assert status.outcomes == {"completed": 2}
    highest = set()
    for trial in record.records():
        rows = trial.trace()
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        assert all(2.0 < row["loss"] < 8.0 and 14.0 < row["logit_scale"] < 15.0 for row in rows)
        highest.add(round(trial.trial()["config"]["lr"] / max(row["lr"] for row in rows), 6))
        first, last = trial.evaluations()
        assert (first["step"], last["step"]) == (2, 4)
        recall = (trial.outcome() or {})["final"]["image_to_text_r1"]
        assert last["image_to_text_r1"] == recall and 0.0 <= recall <= 0.2
    assert len(highest) == 1, "the same schedule at both heights"
