"""`ablate analyze`: a CSV of results made elsewhere, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from simulated_studies import Factors, one_at_a_time, run

from ablate.errors import AnalysisError
from ablate.report.foreign import analyze

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
        ([*BASE, "lr,high,0,1e217,"], HEADER, "r.csv:4: a completed run with value '1e217'"),
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


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["lr,a,0,0.3,", "lr,\u0430,0,0.3,"], r"results.csv:4: lr=.* looks like lr=a"),
        (["lr,a," + "9" * 5000 + ",0.3,"], "is not a whole number"),
    ],
)
def test_levels_that_look_alike_and_endless_seeds_are_refused(
    rows: list[str], words: str, tmp_path: Path
) -> None:
    with pytest.raises(AnalysisError, match=words):
        analyze(write(tmp_path / "results.csv", ["baseline,baseline,0,0.2,", *rows]), 0.005)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """The path and the system's reason are in the message."""
    with pytest.raises(AnalysisError, match="absent.csv: cannot be read"):
        analyze(tmp_path / "absent.csv")


PLAIN = [
    *(f"baseline,baseline,{seed},{value}," for seed, value in enumerate((0.2, 0.21, 0.19))),
    *(f"lr,0.0003,{seed},{value}," for seed, value in enumerate((0.25, 0.263, 0.24))),
]


def _plain(lines: list[str] = PLAIN) -> list[list[str]]:
    return [line.split(",") for line in lines]


def _as_pandas(lines: list[list[str]]) -> str:
    """Seeds became floats, as soon as one was missing; so did a level."""
    return "\n".join(
        [HEADER, *(",".join([f, level, f"{s}.0", v, o]) for f, level, s, v, o in lines)]
    )


def _as_tracker(lines: list[list[str]], *, column: str, done: str) -> str:
    head = f"Factor,Level,Seed,Value,{column}"
    return "\n".join([head, *(",".join([*line[:4], done]) for line in lines)])


def _as_spreadsheet(lines: list[list[str]]) -> str:
    """European: columns between semicolons, decimal commas."""
    rows = [";".join(cell.replace(".", ",") if i == 3 else cell for i, cell in enumerate(line))
            for line in lines]  # fmt: skip
    return "\ufeff" + "\r\n".join([HEADER.replace(",", ";"), *rows])


@pytest.mark.parametrize(
    "text",
    [
        _as_pandas(_plain()),
        _as_tracker(_plain(), column="Status", done="FINISHED"),
        _as_tracker(_plain(), column="State", done="finished"),
        _as_tracker(_plain(), column="state", done="COMPLETE"),
        _as_spreadsheet(_plain()),
        "\n".join([HEADER.replace(",", "\t"), *("\t".join(line) for line in _plain())]),
        "sep=;\n" + _as_spreadsheet(_plain()).removeprefix("\ufeff"),
        "# of the cluster\n# 3 seeds\n" + "\n".join([HEADER, *map(",".join, _plain())]),
        "\n".join(["note,FACTOR,LEVEL,SEED,VALUE", *("x," + ",".join(r[:4]) for r in _plain())]),
    ],
    ids=["pandas", "mlflow", "wandb", "optuna", "spreadsheet", "tabs", "sep", "comments", "more"],
)
def test_what_others_write_is_read(tmp_path: Path, text: str) -> None:
    """Floats for seeds, states of trackers, capitals, semicolons with decimal commas: the same
    numbers as from a file of ours (wandb 4501, 6474, 8252; olmix 29)."""
    expected = analyze(write(tmp_path / "ours.csv", PLAIN))
    (tmp_path / "theirs.csv").write_text(text)
    assert analyze(tmp_path / "theirs.csv") == expected


def test_a_line_keeps_its_number_below_comments(tmp_path: Path) -> None:
    lines = ["# of the cluster", HEADER, *(",".join(line) for line in _plain()), "lr,1,0,25%,"]
    (tmp_path / "r.csv").write_text("\n".join(lines))
    with pytest.raises(AnalysisError, match=rf"r\.csv:{len(lines)}: value '25%'"):
        analyze(tmp_path / "r.csv")


@pytest.mark.parametrize("word", ["crashed", "FAILED", "killed", "Preempted", "fail"])
def test_a_run_that_a_tracker_lost_is_missing(tmp_path: Path, word: str) -> None:
    """It says nothing about its setting, whatever number it left."""
    lines = [*PLAIN[:-1], f"lr,0.0003,2,0.9,{word}"]
    (found,) = analyze(write(tmp_path / "r.csv", lines))
    assert found["outcomes"] == {"completed": 2, "failed": 1}


def test_a_run_that_goes_on_is_no_result(tmp_path: Path) -> None:
    """It is refused with its line and what to do."""
    lines = [*PLAIN[:-1], "lr,0.0003,2,0.9,RUNNING"]
    with pytest.raises(AnalysisError, match=r"r\.csv:7: the run is running; leave the line out"):
        analyze(write(tmp_path / "r.csv", lines))


def test_levels_that_are_one_number_are_one_level(tmp_path: Path) -> None:
    """0.0003 and 3e-4 are spelt twice and are one."""
    lines = [*PLAIN, "lr,3e-4,3,0.25,", "baseline,baseline,3,0.2,"]
    (found,) = analyze(write(tmp_path / "r.csv", lines))
    assert found["level"] == "0.0003" and found["n"] == 4


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("lr,1,0,25%,", r"r\.csv:8: value '25%' is not a number; write shares"),
        ("lr,1,0,0,25,", r"r\.csv:8: 6 columns where the header has 5; .* with a point"),
        ("lr,1,0,NA,", r"r\.csv:8: a completed run with value 'NA'"),
        ("lr,1,0.5,0.2,", r"r\.csv:8: seed '0\.5' is not a whole number"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, line: str, words: str) -> None:
    """A per cent, a decimal comma between commas, a missing number, half a seed."""
    with pytest.raises(AnalysisError, match=words):
        analyze(write(tmp_path / "r.csv", [*PLAIN, line]))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("lr,a\u200b,0,0.2,", "a character that is not seen: zero width space"),
        ("lr,a\x1b[31m,0,0.2,", "a character that is not seen: control character"),
        ('lr,a,0,"0,25",', "write it with a point: 0.25"),
    ],
)
def test_names_and_numbers_are_what_they_look_like(tmp_path: Path, line: str, words: str) -> None:
    """What cannot be seen is refused here as in a study file."""
    path = write(tmp_path / "results.csv", ["baseline,baseline,0,0.2,", line])
    with pytest.raises(AnalysisError, match=r"results\.csv:3: ") as caught:
        analyze(path)
    assert words in str(caught.value)


def test_names_that_look_the_same_are_one(tmp_path: Path) -> None:
    """An accent of its own makes no second level."""
    lines = [f"baseline,baseline,{s},0.2{s}," for s in range(3)]
    spelt = ["\u00e9", "e\u0301", "e\u0301"]
    lines += [f"lr,{name},{s},0.3{s}," for s, name in enumerate(spelt)]
    (found,) = analyze(write(tmp_path / "results.csv", lines))
    assert (found["level"], found["n"]) == ("\u00e9", 3)


def test_the_margin_is_told_as_it_was_given(tmp_path: Path) -> None:
    """It is not rounded to the digits of the noise: beside 20 +- 0.4, 0.005 is not 0.01."""
    values = {"baseline,baseline": (19.7, 20.1, 20.3), "lr,high": (24.0, 24.6, 25.2)}
    lines = [f"{c},{seed},{v}," for c, column in values.items() for seed, v in enumerate(column)]
    (found,) = analyze(write(tmp_path / "results.csv", lines))
    assert "the margin of 0.005 is" in found["sentence"]
