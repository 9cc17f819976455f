"""`ablate analyze`: a CSV of results made elsewhere, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from simulated_studies import Factors, one_at_a_time, run

from ablate.analysis.foreign import analyze
from ablate.errors import AnalysisError

FACTORS: Factors = {"warmup": ["base", "2k"], "aug": ["base", "strong"], "lr": ["base", "5e-3"]}
HEADER = "factor,level,seed,value,outcome"


def write(path: Path, lines: list[str], header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def planted(path: Path, seeds: int = 5) -> Path:
    """warmup helps by 0.015, aug does nothing, lr diverges in every run."""
    lines = []
    results = run(
        one_at_a_time(FACTORS), seeds=seeds, sigma=0.002, effects={"warmup=2k": 0.015},
        diverged=[("lr=5e-3", s) for s in range(seeds)],
    )  # fmt: skip
    for r in results:
        changed = [(f, level) for f, level in r.levels if level != "base"]
        factor, level = changed[0] if changed else ("baseline", "baseline")
        value = "" if r.value is None else f"{r.value:.6f}"
        lines.append(f"{factor},{level},{r.seed},{value},{r.outcome}")
    return write(path, lines)


def test_contrasts_have_the_documented_keys_and_verdicts(tmp_path: Path) -> None:
    """A helpful, an idle and a diverging setting get their verdicts; the JSON is strict."""
    found = analyze(planted(tmp_path / "results.csv"), 0.005)
    by_factor = {contrast["factor"]: contrast for contrast in found}
    assert list(by_factor["warmup"])[:9] == [
        "factor", "level", "n", "delta", "ci", "p_adjusted", "verdict", "diverged", "needs_seeds",
    ]  # fmt: skip
    assert by_factor["warmup"]["verdict"] == "MATTERS"
    assert by_factor["warmup"]["direction"] == "better"
    low, high = by_factor["warmup"]["ci"]
    assert low < by_factor["warmup"]["delta"] < high
    assert by_factor["aug"]["verdict"] == "EQUIVALENT"
    assert by_factor["lr"]["verdict"] == "MATTERS"
    assert by_factor["lr"]["direction"] == "worse"
    assert by_factor["lr"]["diverged"] == [5, 5]
    assert by_factor["lr"]["delta"] is None
    json.dumps(found, allow_nan=False)


def test_minimise_turns_better_and_worse(tmp_path: Path) -> None:
    """With a loss, the same rise is worse."""
    found = analyze(planted(tmp_path / "results.csv"), 0.005, direction="minimize")
    assert found[0]["direction"] == "worse"


def test_order_of_lines_and_columns_does_not_matter(tmp_path: Path) -> None:
    """The same runs in another order, without the outcome column, give the same numbers."""
    lines = [f"baseline,baseline,{s},{0.2 + 0.001 * s * s}" for s in range(4)]
    lines += [f"lr,high,{s},{0.21 + 0.0005 * s}" for s in range(4)]
    one = analyze(write(tmp_path / "a.csv", lines, "factor,level,seed,value"))
    turned = [",".join(reversed(line.split(","))) for line in reversed(lines)]
    two = analyze(write(tmp_path / "b.csv", turned, "value,seed,level,factor"))
    assert one[0]["delta"] == pytest.approx(two[0]["delta"])
    assert one[0]["ci"] == pytest.approx(two[0]["ci"])


BASE = ["baseline,baseline,0,0.2,", "baseline,baseline,1,0.21,"]


@pytest.mark.parametrize(
    ("lines", "header", "words"),
    [
        ([*BASE, "lr,high,x,0.2,"], HEADER, "r.csv:4: seed 'x' is not a whole number"),
        ([*BASE, "lr,high,0,much,"], HEADER, "r.csv:4: value 'much' is not a number"),
        ([*BASE, "lr,high,0,,"], HEADER, "r.csv:4: a completed run with value ''"),
        ([*BASE, "lr,high,0,nan,"], HEADER, "r.csv:4: a completed run with value 'nan'"),
        ([*BASE, "lr,high,0,0.2,diverge"], HEADER, "did you mean 'diverged'"),
        ([*BASE, "lr,high,0,0.2,", "lr,high,0,0.3,"], HEADER, "r.csv:5: lr=high .* line 4"),
        ([*BASE, "lr,baseline,0,0.2,"], HEADER, "r.csv:4: lr,baseline: a baseline line reads"),
        ([*BASE, "lr,high,0"], HEADER, "r.csv:4: 3 columns where the header has 5"),
        (["lr,high,0,0.2,"], HEADER, "no baseline line"),
        (BASE, HEADER, "no line names a factor"),
        ([], HEADER, "no line names a factor"),
        (BASE, "factor,level,sed,value", "r.csv:1: column 'sed': did you mean 'seed'"),
        (BASE, "factor,level,value", "r.csv:1: no column seed"),
    ],
)
def test_each_mistake_names_its_line_and_the_way_out(
    tmp_path: Path, lines: list[str], header: str, words: str
) -> None:
    """A wrong file is refused with file:line and what to write instead."""
    with pytest.raises(AnalysisError, match=words):
        analyze(write(tmp_path / "r.csv", lines, header))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """The path and the system's reason are in the message."""
    with pytest.raises(AnalysisError, match="absent.csv: cannot be read"):
        analyze(tmp_path / "absent.csv")
