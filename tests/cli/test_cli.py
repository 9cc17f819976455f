"""The command line: what it says to someone who makes a mistake, and what it prints for scripts."""

from __future__ import annotations

import inspect
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import safetensors.numpy
from pruned_study import STUDY, with_prune
from rich.console import Console
from synthetic import QUICK, study_of, write_study

from ablate.cli.app import app
from ablate.cli.display import render_plan
from ablate.cli.examples import verbs_of
from ablate.cli.schemas import schema_of, verbs
from ablate.records.folder import StudyRecord
from ablate.runner.plan.plan import plan


@pytest.mark.parametrize("verb", ["check", "plan"])
def test_a_rung_within_a_warmup_is_refused_by_check_and_plan(ablate, tmp_path, verb) -> None:
    """Both say the same, with the line."""
    levels = ("beta2: [0.999, 0.98]", "warmup: [2, 4]\n  batch_size: [64, 80]")
    (tmp_path / "s.yaml").write_text(with_prune("{rungs: [0.8, 0.5]}", levels))
    said = ablate(verb, "s.yaml")
    assert said.code == 2 and said.out == ""
    assert "s.yaml:14: design.prune.rungs[1]: rung 0.5 is too early" in said.err
    (tmp_path / "s.yaml").write_text(with_prune("{rungs: [0.8, 0.6]}", levels))
    said = ablate(verb, "s.yaml")
    assert said.code == 0 and "1 in 10 goes to its end" in " ".join(said.out.split())


TEXT = "step,loss\n1,2.0\n2,1.9\n"
RESULTS = "factor,level,seed,value\n" + "".join(
    f"{factor},{level},{seed},{value + seed / 100}\n"
    for factor, level, value in (("baseline", "baseline", 0.2), ("lr", "high", 0.3))
    for seed in range(3)
)


@pytest.mark.parametrize(
    ("arguments", "content", "says"),
    [
        (["check", "no.yaml"], None, "no.yaml does not exist. Found there: near.yaml."),
        (["check", "."], None, ". is a folder; give a study file. Found there: near.yaml."),
        (["check", "x"], b"\xff\xfe", "x is not UTF-8 text (byte 1); save it as UTF-8"),
        (["check", "x"], b"", "x:1: the file holds nothing; a study file is a mapping"),
        (["check", "x"], b"#" * 1_000_001, "x has 1000001 bytes; a study file has at most"),
        (["check", "x"], STUDY.replace("warmup: 2", "warmpu: 2"), "did you mean 'warmup'?"),
        (["check", "x"], STUDY.replace("\n  beta2:", "\n  beta3:"), "did you mean 'beta2'"),
        (["plan", "x"], STUDY.replace("tiny-rn-a", "RN5O"), "did you mean 'RN50'"),
        (["plan", "near.yaml", "--runs", "near.yaml"], None, "'near.yaml' is a file"),
        (["markers", "import", "no.csv"], None, "no.csv does not exist; give a CSV with"),
        (["markers", "import", "."], None, ". has neither a log that is known nor event"),
        (["markers", "import", "x"], b"", "there is no verdict; it is empty. Call one"),
        (["markers", "import", "x"], b"\x89\xff\x00" * 99, "no verdict; it is no text"),
        (["markers", "import", "x"], "step,los\n1,2\n", "its columns are step, los. Call one"),
        (["markers", "import", "x"], "step,loss\n", "no rows; give a line for each step"),
        (["markers", "import", "x"], TEXT + "3,high\n", "x:4: loss is 'high', not a number; leave"),
        (["markers", "import", "x"], TEXT + "3,\"" + "x" * 200_000, "x:4: no line of a CSV"),
        (["markers", "nowhere"], None, "nowhere is no folder; give a study folder"),
        (["markers", "."], None, ". holds no trial; give a study folder"),
        (["markers", ".", "--set", "loss"], None, "write MARKER.THRESHOLD=VALUE"),
        (["diagnose", "x"], TEXT, "A run made elsewhere: ablate markers import FILE"),
        (["analyze", "no.csv"], None, "no.csv: cannot be read"),
        (["analyze", "."], None, ". is a folder; give the CSV of the results"),
        (["analyze", "x"], b"", "the first line must name the columns factor, level"),
        (["analyze", "x"], b"\xff\xfd", "x: is not UTF-8 text; save it as CSV UTF-8"),
        (["analyze", "x"], RESULTS.replace("value", "valu"), "column 'valu': did you mean 'value'"),
        (["analyze", "x"], RESULTS + "lr,\"" + "x" * 200_000, "x:8: no line of a CSV"),
        (["analyze", "/dev/zero"], None, "/dev/zero is no file that can be read whole"),
        (["markers", "import", "/dev/zero"], None, "/dev/zero is no file that can be read whole"),
        (["status", "nowhere"], None, "nowhere holds no study (no study.json). Make one"),
        (["report", "."], None, ". holds no study (no study.json). Make one: ablate launch"),
        (["verify", "x"], TEXT, "x holds no study (no study.json). Make one"),
        (["doctor", "--cluster", "no.yaml"], None, "no.yaml does not exist. Found there: near"),
        (["inspect", "nowhere"], None, "nowhere does not exist; give a trial folder"),
        (["chek", "near.yaml"], None, "Did you mean 'check'"),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_with_what_to_do(ablate, tmp_path, arguments, content, says) -> None:
    """Wrong path, folder or file, empty, huge or foreign bytes, a misspelt name: one message on
    standard error, exit code 2, no traceback, and nothing for a script to misread."""
    (tmp_path / "near.yaml").write_text(STUDY)
    if content is not None:
        (tmp_path / "x").write_bytes(content if isinstance(content, bytes) else content.encode())
    said = ablate(*arguments)
    assert said.code == 2 and said.out == ""
    assert says in " ".join(said.err.split()) and "Traceback" not in said.err


def test_a_gigantic_csv_is_refused_before_it_is_read(ablate, tmp_path) -> None:
    """Three GiB of nothing: both readers say how much, and what to give instead."""
    with open(tmp_path / "x", "wb") as file:
        file.truncate(3 * 2**30)
    for command in (["analyze"], ["markers", "import"]):
        said = ablate(*command, "x")
        assert said.code == 2 and "x has 3.0 GiB" in said.err and "every tenth line" in said.err


def test_a_study_record_of_another_program_is_refused(ablate, tmp_path) -> None:
    """A study.json that is no record of ours: said so, instead of a traceback."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "study.json").write_text('{"name": "x"}')
    said = ablate("status", "runs")
    assert said.code == 2 and "lacks text, path, root: another program wrote it" in said.err


def test_a_trial_without_steps_is_not_called_stable(ablate, tmp_path) -> None:
    """There is nothing to judge yet, and the table says that."""
    trial = tmp_path / "trial"
    trial.mkdir()
    (trial / "trial.json").write_text("{}")
    said = ablate("markers", "trial")
    assert said.code == 0 and "no step recorded yet" in said.out and "STABLE" not in said.out


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """A study folder, results and a trace of others, two files of weights."""
    folder = tmp_path_factory.mktemp("folders")
    study = study_of(folder, QUICK.replace("seeds: [0, 1, 2, 3]", "seeds: [0, 1]"))
    write_study(folder, study)
    (folder / "study.yaml").write_text(study.source.text)
    (folder / "results.csv").write_text(RESULTS)
    (folder / "trace.csv").write_text(TEXT + "3,nan\n")
    (folder / "runs.csv").write_text("name,config.lr,acc\na,1,0.5\nb,1,0.52\nc,2,0.7\n")
    shutil.copytree(folder / "runs" / "quick", folder / "runs" / "again")
    shutil.copy(empty_store, folder / "store.db")
    for name, value in (("a", 0.0), ("b", 1.0)):
        weights = {"visual.conv1.weight": np.full((4, 4), value, np.float32)}
        safetensors.numpy.save_file(weights, folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "study.yaml"],
        ["init", "new.yaml"],
        ["plan", "study.yaml"],
        ["plan", "study.yaml", "--commands"],
        ["launch", "study.yaml", "--dry-run"],
        ["status", "runs/quick"],
        ["stop", "runs/quick"],
        ["compare", "runs/quick", "runs/again"],
        ["confirm", "runs/quick", "--dry-run"],
        ["ladder", "runs/quick"],
        ["rebuild", "runs/again", "--tracking-uri", "sqlite:///store.db"],
        ["export", "runs/quick", "--no-register"],
        ["import", "runs.csv", "--metric", "acc", "--name", "theirs"],
        ["report", "runs/quick"],
        ["verify", "runs/quick"],
        ["doctor"],
        ["markers", "runs/quick"],
        ["markers", "import", "trace.csv"],
        ["diagnose", "runs/quick"],
        ["inspect", "a.safetensors", "b.safetensors"],
        ["analyze", "results.csv"],
    ],
    ids=" ".join,
)
def test_json_is_all_that_a_script_reads(ablate, folders, monkeypatch, arguments) -> None:
    """Standard output is one strict JSON value that keeps to the verb's schema, whatever else there
    is to say."""
    monkeypatch.chdir(folders)
    said = ablate(*arguments, "--json")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(said.out, parse_constant=refuse) is not None
    assert said.code in (0, 1) and "Traceback" not in said.err


def test_every_verb_with_json_has_a_schema_and_says_it(ablate) -> None:
    """One each, no more, each valid by itself; `ablate schema VERB` prints it."""
    having = {
        name
        for name, command in verbs_of(app)
        if "as_json" in inspect.signature(command.callback).parameters
    }
    assert set(verbs()) == having | {"plan commands"}
    for verb in verbs():
        found = schema_of(verb)
        jsonschema.Draft202012Validator.check_schema(found)
        assert found["title"].startswith("ablate ") and found["description"]
    assert json.loads(ablate("schema", "markers replay").out) == schema_of("markers replay")
    wrong = ablate("schema", "statis")
    assert wrong.code == 2 and "did you mean 'status'" in wrong.err


@pytest.mark.parametrize("group", [(), ("data",), ("markers",)])
def test_help_fits_a_terminal_of_80_columns(group: tuple[str, ...]) -> None:
    """No summary of a command is cut off."""
    shown = subprocess.run(
        [sys.executable, "-m", "ablate.cli", *group, "--help"],
        env={**os.environ, "COLUMNS": "80"}, capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    assert "..." not in shown.replace("[ARGS]...", "") and max(map(len, shown.splitlines())) <= 80


def test_a_plan_on_80_columns_cuts_no_name(tmp_path: Path) -> None:
    """Names of cells go on in the next line rather than end in an ellipsis."""
    study = study_of(tmp_path)
    console = Console(width=80, file=io.StringIO())
    console.print(render_plan(plan(study, StudyRecord(tmp_path / "none"))))
    shown = console.file.getvalue()
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown and max(map(len, shown.splitlines())) <= 80


def test_check_plan_and_launch_agree_on_data_that_are_not_here(ablate, tmp_path) -> None:
    """check and plan name the shard as a warning, launch on this machine ends with it before
    anything starts; where another Ray is named it is left to that one's machines."""
    (tmp_path / "s.yaml").write_text(STUDY)
    missing = f"train_data: {tmp_path}/t.tar is not on this machine"
    for verb in ("check", "plan"):
        said = ablate(verb, "s.yaml")
        unwrapped = "".join(said.out.split())  # a long path goes on in the next line
        assert said.code == 0 and "".join(missing.split()) in unwrapped, said.out
    said = ablate("launch", "s.yaml", "--yes", "--cluster", "local")
    assert said.code == 2 and missing in said.err and "would run here" in said.err
    assert not (tmp_path / "runs").exists()


def test_a_command_whose_script_is_not_here_is_told_before_a_trial(ablate, tmp_path) -> None:
    """check and plan name the script, launch starts nothing; a module or a shell's line is no
    file that could be missing."""
    text = """
    recipe: command
    baseline: {command: "python -u sub/train.py -c {lr} -m {seed}", metrics: [loss], lr: 1.0}
    factors: {lr: [1.0, 2.0]}
    seeds: 2
    objective: {metric: loss, margin: 0.1}
    """
    (tmp_path / "s.yaml").write_text(text)
    missing = f"command: {tmp_path}/sub/train.py is not on this machine"
    for verb in ("check", "plan"):
        said = ablate(verb, "s.yaml")
        assert said.code == 0 and "".join(missing.split()) in "".join(said.out.split())
    said = ablate("launch", "s.yaml", "--yes", "--cluster", "local")
    assert said.code == 2 and missing in said.err and not (tmp_path / "runs").exists()
    for line in (
        "python -m mine.train",
        "bash -c 'train.sh'",
        "bash -ec 'train.sh'",
        "env python train.py",
    ):
        (tmp_path / "s.yaml").write_text(text.replace("python -u sub/train.py", line))
        assert "not on this machine" not in ablate("check", "s.yaml").out


def test_check_finds_a_model_that_there_is_not(ablate, tmp_path) -> None:
    """A misspelt model of one level is told by check, with the cell and the nearest name."""
    (tmp_path / "s.yaml").write_text(STUDY.replace("factors:", "factors:\n  model: [RN50, RN1O1]"))
    said = ablate("check", "s.yaml")
    assert said.code == 2 and "model=RN1O1: model 'RN1O1' is not known; did you mean" in said.err
