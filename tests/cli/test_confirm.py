"""`ablate confirm`, as a user types it: what looks better alone is run together.

Its trials are processes of a script that prints a planted score; everything else is real.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Said

SCRIPT = """
import json, sys
a, b, c, seed = map(int, sys.argv[1:])
score = 0.5 + 0.05 * a + 0.03 * b - 0.04 * c + 0.001 * (seed * (1 + a - b) % 3)
print(json.dumps({"step": 1, "score": score}))
"""
STUDY = """
recipe: command
baseline:
  command: python train.py {a} {b} {c} {seed}
  metrics: {score: {unit: fraction, chance: 0.1}}
  a: 0
  b: 0
  c: 0
factors: {a: [0, 1], b: [0, 1], c: [0, 1]}
seeds: [0, 1, 2]
objective: {margin: 0.01}
"""
HERE = ("--cluster", "local", "--cpus", "2", "--yes")


@pytest.fixture
def told(tmp_path: Path, ablate: Callable[..., Said], empty_store: Path) -> Callable[..., str]:
    """Runs a command in a folder with a study that has ended nowhere yet; what it printed."""
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "s.yaml").write_text(STUDY)
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_store, tmp_path / "runs" / "mlflow.db")

    def call(*arguments: str) -> str:
        said = ablate(*arguments)
        assert said.code == 0, said.err
        return " ".join(said.out.split())

    return call


def test_what_looks_better_alone_is_confirmed_on_the_command_line(
    tmp_path: Path, told: Callable[..., str]
) -> None:
    """Before: the report hands out the better single change and says what would confirm more. Then
    confirm runs the combination once, and status, report, tables and export say the same of it."""
    folder = tmp_path / "runs" / "s"

    def verdicts() -> dict[str, Any]:
        found: dict[str, Any] = json.loads((folder / "verdicts.json").read_text())
        return found

    launched = json.loads(told("launch", "s.yaml", *HERE, "--json"))
    assert launched["outcomes"] == {"completed": 12}
    told("report", "runs/s")
    alone = verdicts()
    assert alone["use"]["chosen_as"] == "cell" and alone["use"]["more_trials"] == 3
    assert "ablate confirm" in alone["use"]["to_know_more"]

    dry = told("confirm", "runs/s", *HERE, "--dry-run")
    assert "3" in dry and len(list((folder / "trials").iterdir())) == 12, "nothing was started"
    ended = json.loads(told("confirm", "runs/s", *HERE, "--json"))
    assert ended["outcomes"] == {"completed": 15} and ended["controller"] == "absent"
    assert json.loads(told("status", "runs/s", "--json"))["outcomes"] == {"completed": 15}
    printed = told("report", "runs/s")
    found = verdicts()
    assert found["use"]["chosen_as"] == "combination"
    assert found["use"]["cell"] == {"a": "1", "b": "1", "c": "0"}
    contrasts = {c["factor"]: c["delta"] for c in found["questions"]["baseline"]["contrasts"]}
    before = {c["factor"]: c["delta"] for c in alone["questions"]["baseline"]["contrasts"]}
    assert contrasts == before, "no comparison takes the combination in"
    with open(folder / "trials.csv", newline="") as file:
        ran = [row for row in csv.DictReader(file) if (row["a"], row["b"]) == ("1", "1")]
    assert len(ran) == 3 and found["use"]["trial"] in {row["trial"] for row in ran}

    exported = told("export", "runs/s")
    source = json.loads((folder / "best" / "provenance.json").read_text())
    assert source["levels"] == found["use"]["cell"] and source["trial"] == found["use"]["trial"]
    assert source["why"] == found["use"]["why"]
    sentence = exported.split("use ", 1)[-1][:40]
    assert sentence and sentence in printed

    again = json.loads(told("confirm", "runs/s", *HERE, "--json"))
    assert again["outcomes"] == {"completed": 15}
