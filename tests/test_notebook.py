"""The notebook that shows the Python API runs from its first cell to its last."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = json.loads((ROOT / "docs" / "python.ipynb").read_text(encoding="utf-8"))


def shown(source: str, names: dict[str, Any]) -> Any:
    """Run a cell, and give what its last expression is."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    if last is None:
        return None
    assert isinstance(last, ast.Expr)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)


@pytest.mark.slow
def test_the_notebook_runs_and_its_objects_display_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every cell runs; studies, plans, statuses, tables and reports show as HTML, plots are
    plotly's; the lucky seed stays undecided, and the answer of the study is the known one."""
    plotly = pytest.importorskip("plotly.graph_objects")
    (tmp_path / "studies").mkdir()
    shutil.copy(ROOT / "studies" / "digits.py", tmp_path / "studies")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    values = {}
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            values[source.splitlines()[-1]] = shown(source, names)
    for line in ("study.plan()", 'study.launch(cluster="local", cpus=2)', "study.best()",
                 "study.report()", "study.results()"):  # fmt: skip
        assert values[line]._repr_html_().startswith("<"), line
    plots = [value for line, value in values.items() if ".plot(" in line]
    assert len(plots) == 3 and all(isinstance(plot, plotly.Figure) for plot in plots)
    assert len(plots[1].data) == 9 and len(plots[1].data[0].x) == 2
    assert "is undecided" in values['answer["sentence"]']
    effects = names["study"].effects().set_index("factor")
    assert effects.verdict["lr"] == "MATTERS" and effects.delta["lr"] < -0.05
    assert names["study"]._repr_html_().count("9 completed") == 1


def test_it_is_committed_without_outputs() -> None:
    """Outputs are what a reader's own run gives."""
    assert all(not cell.get("outputs") for cell in NOTEBOOK["cells"])
