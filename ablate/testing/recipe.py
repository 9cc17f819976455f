"""The contract of a recipe.

::

    class TestMine(ablate.testing.RecipeContract):
        name = "mine"
        objective = "accuracy"
        fields = {"lr": 0.1, "epochs": 2}      # a run of seconds

Paths in `fields` are relative to what :meth:`RecipeContract.root` makes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ablate.records.folder import TrialRecord
from ablate.trial.identity import EXIT_STOPPED, identify
from ablate.trial.recipe import Role, absolute, describe, fields_of, load, names

TIMEOUT_S = 240
ENGINES = ("torch", "ray", "optuna", "mlflow")


class RecipeContract:
    """What holds of every recipe; one that needs data makes them in :meth:`root`."""

    name: ClassVar[str]
    """Name of the recipe."""
    objective: ClassVar[str]
    """A measurement of its runs."""
    fields: ClassVar[Mapping[str, Any]]
    """Fields of a run of seconds; `objective` is among what it measures."""
    env: ClassVar[Mapping[str, str]] = {}
    """Added to the environment of its processes."""

    def root(self, tmp_path: Path) -> Path:
        """Folder that relative paths begin at, with the data that `fields` name."""
        return tmp_path

    def test_it_is_found_and_imports_no_engine(self) -> None:
        """Its name is listed; importing it imports no engine, so that plans are made anywhere."""
        assert self.name in names()
        code = (
            f"import sys; from ablate.trial.recipe import load; load({self.name!r}); "
            f"print([name for name in {ENGINES!r} if name in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], env=self._env(), capture_output=True, text=True,
            timeout=TIMEOUT_S, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == "[]"

    def test_a_configuration_is_its_own_dump(self) -> None:
        """Resolved once, a configuration goes through JSON unchanged: ids rest on it."""
        config = load(self.name).Config(**self.fields)
        dumped = json.loads(json.dumps(config.model_dump(mode="json")))
        again = load(self.name).Config(**dumped)
        assert again == config and again.model_dump(mode="json") == dumped
        assert "seed" in dumped, "a recipe has a field seed: the replicate"

    def test_roles_name_fields_that_can_have_them(self) -> None:
        """A field that cannot change a result has no speed, and the seed is part of identity."""
        config = load(self.name).Config
        free = fields_of(config, Role.FREE)
        assert not free & fields_of(config, Role.SPEED) and "seed" not in free

    def test_the_outline_says_what_is_measured(self, tmp_path: Path) -> None:
        """The same at every call; its measurements are declared, with a direction."""
        recipe, root = load(self.name), self.root(tmp_path)
        config = recipe.Config(**self.fields)
        found = recipe.outline(config, workers=1, gpus=0, root=root)
        assert found == recipe.outline(config, workers=1, gpus=0, root=root)
        declared = recipe.metrics(config)
        assert self.objective in found.measures
        entries = [describe(declared, name) for name in found.measures]
        assert all(entry is not None and entry.direction for entry in entries)
        assert absolute(config, root=root) == absolute(absolute(config, root=root), root=root)

    def test_a_run_leaves_its_records(self, tmp_path: Path) -> None:
        """A rank of its own ends with 0, rising steps, an evaluation and a result."""
        trial = self._trial(tmp_path)
        with self._start(trial) as process:
            _, said = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, said
        result = trial.result(1)
        assert result is not None and result["status"] == "completed", result
        assert self.objective in result["final"] and trial.evaluations()
        steps = [row["step"] for row in trial.trace()]
        assert steps == sorted(set(steps)) and (not steps or steps[-1] <= result["step"])

    def test_a_stopped_run_goes_on(self, tmp_path: Path) -> None:
        """SIGTERM: it leaves with 75 and no result, or was through; the next attempt ends it."""
        trial = self._trial(tmp_path)
        with self._start(trial) as process:
            deadline = time.monotonic() + TIMEOUT_S
            while process.poll() is None and not trial.trace() and time.monotonic() < deadline:
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode in (0, EXIT_STOPPED), said
        if process.returncode == 0:
            return
        assert trial.result(1) is None
        with self._start(trial) as process:
            _, said = process.communicate(timeout=TIMEOUT_S)
        result = trial.result(2)
        assert process.returncode == 0 and result is not None, said
        assert result["status"] == "completed" and self.objective in result["final"]

    def _trial(self, tmp_path: Path) -> TrialRecord:
        config = load(self.name).Config(**self.fields).model_dump(mode="json")
        folder = tmp_path / "trial"
        folder.mkdir()
        content = {
            "format": 1,
            "id": identify(self.name, config, workers=1),
            "seed": 0,
            "recipe": self.name,
            "config": config,
            "gang": {"workers": 1},
            "objective": {"metric": self.objective, "direction": "maximize"},
            "root": str(self.root(tmp_path)),
        }
        (folder / "trial.json").write_text(json.dumps(content))
        return TrialRecord(folder)

    def _start(self, trial: TrialRecord) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "ablate.trial", str(trial.folder)],
            env=self._env(), stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def _env(self) -> dict[str, str]:
        return {**os.environ, **self.env}
