"""The shape of the house: which room may import what, and one door per engine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

PACKAGE = Path(__file__).parent.parent / "ablate"
HEAVY = ("torch", "ray", "optuna", "mlflow", "open_clip")

SPINE = [
    "ablate.cli.app",
    "ablate.study",
    "ablate.trial.metrics",
    "ablate.trial.same",
    "ablate.trial.recipe",
    "ablate.trial.session",
    "ablate.trial.worker",
    "ablate.markers",
    "ablate.trial.identity",
    "ablate.study.design",
    "ablate.runner.plan.plan",
    "ablate.records.folder",
    "ablate.runner.status",
    "ablate.cli.display",
    "ablate.cluster.local",
    "ablate.cluster.contract",
    "ablate.runner.controller",
    "ablate.study.table",
    "ablate.report.report",
    "ablate.report.export",
    "ablate.training.data.shards",
    "ablate.training.data.emoji",
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
        ("ray", {"cluster"}),
        ("optuna", {"search"}),
        ("mlflow", {"tracking/mlflow"}),
        ("open_clip", {"recipes/openclip", "recipes/video_retrieval"}),
        # preflight.probe and doctor look at accelerators; they import torch when they are called.
        (
            "torch",
            {
                "training",
                "recipes",
                "runner/doctor.py",
                "runner/preflight.py",
                "testing/evaluation.py",
            },
        ),
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


def test_no_room_names_what_is_trained() -> None:
    """What one recipe trains and measures stands in its own room, and in its evaluation's file."""
    words = re.compile(r"openclip|imagenet|zero_shot", re.IGNORECASE)
    home = ("recipes/openclip/", "training/evaluations/zero_shot.py")
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in (*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.j2"))
        if words.search(path.read_text(encoding="utf-8"))
    }
    named = {name for name in found if not name.startswith(home)}
    assert named == set(), f"{named} name a recipe"


def test_no_test_reaches_into_our_code_or_replaces_it() -> None:
    """No test imports a name with an underscore or sets a function of ours to another: what it
    would replace is a parameter. A limit in capitals may be lowered; benches put clocks around."""
    tests = Path(__file__).parent
    found = [
        f"{path.relative_to(tests)}:{line}"
        for path in tests.rglob("*.py")
        if "bench" not in path.parts
        for line in _reaches_into_ours(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


def _reaches_into_ours(tree: ast.Module) -> Iterator[int]:
    ours = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ablate":
            ours |= {alias.asname or alias.name for alias in node.names}
            if any(alias.name.startswith("_") for alias in node.names):
                yield node.lineno
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in ours and re.match("_(?!_)", node.attr):
                yield node.lineno
        if not (isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "setattr"):
            continue
        owner, *rest = (ast.literal_eval(a) if isinstance(a, ast.Constant) else ast.unparse(a)
                        for a in node.args)  # fmt: skip
        name = str(rest[0] if len(node.args) > 2 else owner.rpartition(".")[2])
        if (owner in ours or str(owner).startswith("ablate.")) and not name.isupper():
            yield node.lineno


MOST_LINES = {"file": 600, "class": 250, "function": 60}
MOST_FIELDS = 20
MEDIAN_LINES = 200

READS_BETTER_WHOLE = {
    "analysis/analysis.py:analyze_results": "half is its options and what each means",
    "training/weights.py:load_weights": "twelve options, and a line of the report for each",
}
"""Functions that may be longer, at most three of them, and why."""


def test_nothing_is_too_large_to_be_read() -> None:
    """No file has more than 600 lines, no class 250, no function 60, no dataclass 20 fields; half
    of the files have 200 lines at most. What is named as an exception still is one."""
    sources = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    large, lengths = set(), []
    for name, path in sources.items():
        text = path.read_text(encoding="utf-8")
        lengths.append(len(text.splitlines()))
        large |= {f"{name}:{part}" for part in _too_large(ast.parse(text))}
        if lengths[-1] > MOST_LINES["file"]:
            large.add(name)
    assert large == set(READS_BETTER_WHOLE)
    assert len(READS_BETTER_WHOLE) <= 3
    assert median(lengths) <= MEDIAN_LINES


def _too_large(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            kind = "function"
        elif isinstance(node, ast.ClassDef):
            kind = "class"
            if _most_fields(node) > MOST_FIELDS:
                yield f"{node.name} (fields)"
        else:
            continue
        assert node.end_lineno is not None
        if node.end_lineno - node.lineno + 1 > MOST_LINES[kind]:
            yield node.name


def _most_fields(node: ast.ClassDef) -> int:
    """Fields of a dataclass, of those given and those it keeps for itself the more numerous.

    A marker's thresholds are keys of a study's `markers`, so they stand flat beside its memory
    (``init=False``): two lists, each of which is read alone. A class variable is no field, and
    what is inherited counts where it is written. A recipe's Config is no dataclass and may have
    any number: its fields are flags.
    """
    if not any("dataclass" in ast.unparse(each) for each in node.decorator_list):
        return 0
    fields = [ast.unparse(each) for each in node.body if isinstance(each, ast.AnnAssign)]
    fields = [each for each in fields if "ClassVar" not in each]
    kept = sum("init=False" in each for each in fields)
    return max(kept, len(fields) - kept)
