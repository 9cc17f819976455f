"""Every recipe keeps the contract; one of somebody else's package is a recipe like ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_trials import fields, make_data

from ablate.testing import RecipeContract
from ablate.trial.recipe import find_ability, names

ROOT = Path(__file__).parents[2]


class TestCommand(RecipeContract):
    name = "command"
    objective = "accuracy"
    fields = {
        "command": "python studies/digits.py --lr {lr} --penalty 1e-4 --epochs 2 --seed {seed}",
        "metrics": {"accuracy": "maximize"},
        "lr": 0.01,
    }

    def root(self, tmp_path: Path) -> Path:
        return ROOT


class TestOpenclip(RecipeContract):
    name = "openclip"
    objective = "imagenet_top1"
    fields = fields(epochs=1)

    def root(self, tmp_path: Path) -> Path:
        data = tmp_path / "data"
        return data if data.exists() else make_data(data)


THEIRS = '''\
"""A recipe of somebody else: a parabola, walked down."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict

from ablate.trial.metrics import Metric
from ablate.trial.recipe import Outline, Role
from ablate.trial.session import Ending


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    lr: Annotated[float, Role.SPEED, Role.SAME_PACE] = 0.1
    steps: int = 20
    seed: int = 0


def metrics(config):
    return (Metric("closeness", "fraction", "how near the bottom", "maximize", chance=0.0),)


def outline(config, *, workers, gpus, root, deep=False):
    return Outline(measures=("closeness",), steps=config.steps)


def run(session):
    config, x = session.config, 1.0 + session.config.seed / 100
    session.about(steps_total=config.steps)
    for step in range(1, config.steps + 1):
        x -= config.lr * 2 * x
        session.step({"step": step, "loss": x * x})
        if session.leave:
            return Ending(status=session.leave, reason="asked to leave", step=step)
    found = {"closeness": 1 / (1 + x * x)}
    session.evaluation({"step": config.steps, **found})
    return Ending(status="completed", reason="down", step=config.steps, final=found)
'''

STUDY = """\
name: theirs
recipe: parabola
baseline: {lr: 0.1}
factors: {lr: [0.1, 0.01]}
seeds: [1]
"""


@pytest.fixture
def theirs(tmp_path: Path) -> dict[str, str]:
    """An environment in which the package is installed, as pip leaves one."""
    site = tmp_path / "site"
    about = site / "their_recipes-1.0.dist-info"
    about.mkdir(parents=True)
    (site / "their_parabola.py").write_text(THEIRS)
    (site / "broken_parabola.py").write_text("Config = None\n")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-recipes\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[ablate.recipes]\nparabola = their_parabola\nbroken = broken_parabola\n"
    )
    return {**os.environ, "PYTHONPATH": str(site)}


def test_a_recipe_of_another_package_is_a_study(tmp_path: Path, theirs: dict[str, str]) -> None:
    """Its study is launched and judged by its own metric; what it lacks is named; a recipe that is
    none says what is missing."""
    (tmp_path / "study.yaml").write_text(STUDY)

    def ablate(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ablate.cli", *words], env=theirs, cwd=tmp_path,
            capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip

    launched = ablate("launch", "study.yaml", "--cluster", "local", "--yes")
    assert launched.returncode == 0, launched.stderr
    outcomes = [
        json.loads(path.read_text()) for path in tmp_path.glob("runs/theirs/trials/*/outcome.json")
    ]
    ends = [(1 + seed / 100) * (1 - 2 * lr) ** 20 for seed in (1,) for lr in (0.1, 0.01)]
    expected = [1 / (1 + x * x) for x in ends]
    assert sorted(o["value"] for o in outcomes) == pytest.approx(sorted(expected))
    probed = ablate("plan", "study.yaml", "--probe", "--cluster", "local")
    assert probed.returncode != 0
    assert "'parabola' cannot do this: it has no shorten" in probed.stderr + probed.stdout
    (tmp_path / "study.yaml").write_text(STUDY.replace("parabola", "broken"))
    refused = ablate("check", "study.yaml")
    assert "has no metrics, outline, run" in " ".join((refused.stderr + refused.stdout).split())


def test_a_recipe_that_exports_a_model_says_how_it_is_checked() -> None:
    """`export --verify` has something to ask for each of ours."""
    exporting = {name for name in names() if find_ability(name, "export_model")}
    assert exporting == {"mae", "openclip", "swav", "timesformer", "video_retrieval"}
    assert all(find_ability(name, "check_model") for name in exporting)
