"""The command line: what it says to someone who makes a mistake, and what it prints for scripts."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console
from synthetic import QUICK, study_of, write_study
from test_referee import STUDY, with_prune

from ablate import cli
from ablate.display import render_plan
from ablate.forecast import plan
from ablate.records import StudyRecord


@dataclass(frozen=True, slots=True)
class Said:
    """How a command ended, and its two streams."""

    code: int
    out: str
    err: str


@pytest.fixture
def ablate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Runs the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["ablate", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
            sys.exit(0)
        said = capsys.readouterr()
        code = caught.value.code
        return Said(code if isinstance(code, int) else 1, said.out, said.err)

    return call


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
        (["check", "x"], b"", "x:1: a study file is a mapping with recipe, baseline"),
        (["check", "x"], b"#" * 1_000_001, "x has 1000001 bytes; a study file has at most"),
        (["check", "x"], STUDY.replace("warmup: 2", "warmpu: 2"), "did you mean 'warmup'?"),
        (["check", "x"], STUDY.replace("\n  beta2:", "\n  beta3:"), "did you mean 'beta2'"),
        (["plan", "x"], STUDY.replace("tiny-rn-a", "RN5O"), "did you mean 'RN50'"),
        (["plan", "near.yaml", "--runs", "near.yaml"], None, "'near.yaml' is a file"),
        (["markers", "import", "no.csv"], None, "no.csv does not exist; give a CSV with"),
        (["markers", "import", "."], None, ". has neither an out.log nor event files; give a CSV"),
        (["markers", "import", "x"], b"", "(it is empty); give a CSV with the columns step"),
        (["markers", "import", "x"], b"\x89\xff\x00" * 99, "(it is no text); give a CSV"),
        (["markers", "import", "x"], "step,los\n1,2\n", "did you mean 'loss'?"),
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
        (["analyze", "x"], b"\xff\xfe", "x: is not UTF-8 text; save it as CSV UTF-8"),
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
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study folder, results and a trace of others, two files of weights."""
    folder = tmp_path_factory.mktemp("folders")
    study = study_of(folder, QUICK.replace("seeds: [0, 1, 2, 3]", "seeds: [0, 1]"))
    write_study(folder, study)
    (folder / "study.yaml").write_text(study.text)
    (folder / "results.csv").write_text(RESULTS)
    (folder / "trace.csv").write_text(TEXT + "3,nan\n")
    for name, value in (("a", 0.0), ("b", 1.0)):
        weights = {"visual.conv1.weight": np.full((4, 4), value, np.float32)}
        safetensors.numpy.save_file(weights, folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "study.yaml"],
        ["status", "runs/quick"],
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
    """Standard output is one strict JSON value, whatever else there is to say."""
    monkeypatch.chdir(folders)
    said = ablate(*arguments, "--json")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(said.out, parse_constant=refuse) is not None
    assert said.code in (0, 1) and "Traceback" not in said.err


def test_help_fits_a_terminal_of_80_columns() -> None:
    """No summary of a command is cut off."""
    shown = subprocess.run(
        [sys.executable, "-m", "ablate.cli", "--help"],
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
