"""The shape of the house: which room may import what, and one door per engine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ablate"
HEAVY = ("torch", "ray", "optuna", "mlflow", "open_clip")

SPINE = [
    "ablate.cli",
    "ablate.study",
    "ablate.metrics",
    "ablate.factors",
    "ablate.markers",
    "ablate.trial",
    "ablate.design",
    "ablate.forecast",
    "ablate.records",
    "ablate.status",
    "ablate.display",
    "ablate.cluster",
    "ablate.runner",
    "ablate.analysis.table",
    "ablate.analysis.report",
    "ablate.analysis.export",
    "ablate.datasets.shards",
    "ablate.datasets.emoji",
    *(f"ablate.recipes.{path.parent.name}" for path in (PACKAGE / "recipes").glob("*/__init__.py")),
]


@pytest.mark.parametrize("module", SPINE)
def test_planning_needs_no_engine(module: str) -> None:
    """Importing a module of the spine, a recipe or the analysis imports no engine and no torch."""
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("engine", "door"),
    [
        ("ray", {"ray_cluster.py"}),
        ("optuna", {"search"}),
        ("mlflow", {"tracking"}),
        ("open_clip", {"recipes/openclip"}),
        # preflight.probe and doctor look at accelerators; they import torch when they are called.
        ("torch", {"training", "recipes", "doctor.py", "preflight.py"}),
    ],
)
def test_each_engine_has_one_door(engine: str, door: set[str]) -> None:
    """An engine is imported in its own file (torch: where models are trained) and nowhere else."""
    pattern = re.compile(rf"^\s*(?:import|from)\s+{engine}\b", re.MULTILINE)
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if pattern.search(path.read_text())
    }
    outside = {name for name in found if not any(f"{name}/".startswith(f"{d}/") for d in door)}
    assert outside == set(), f"{engine} is imported in {outside}"


def test_nothing_runs_a_shell_or_unpickles() -> None:
    """No code of ours starts a shell, evaluates text or loads a pickle."""
    pattern = re.compile(
        r"shell=True|os\.system\(|\beval\(|\bexec\(|import pickle|pickle\.loads?\("
        r"|weights_only=False|yaml\.load\(|yaml\.unsafe"
    )
    found = [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line) and ".eval(" not in line
    ]
    assert found == []
