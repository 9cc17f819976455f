"""Designs: which trials a study wants, and in which order."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ablate.analysis.results import Result
from ablate.errors import PlanError
from ablate.study import Study, design, parse_study

HEAD = """\
name: d
recipe: openclip
baseline: {model: tiny-rn-a, train_data: t.tar, imagenet_val: val, precision: fp32}
factors:
  warmup: [10000, 1, 50]
  beta2: [0.999, 0.98]
  precision: [fp32, amp_bf16]
"""


def study(tail: str, head: str = HEAD, root: Path | None = None) -> Study:
    return parse_study(head + tail, path="d.yaml", root=root)


def changes(found: Study, cells: list[design.Cell]) -> list[dict[str, str]]:
    baseline = found.baseline_levels()
    return [{k: v for k, v in cell.levels if v != baseline[k]} for cell in cells]


def test_one_at_a_time_changes_one_factor() -> None:
    """The baseline and each other level alone: 1 + 2 + 1 + 1 cells."""
    found = study("seeds: [0]\n")
    assert changes(found, design.cells(found)) == [
        {},
        {"warmup": "1"},
        {"warmup": "50"},
        {"beta2": "0.98"},
        {"precision": "amp_bf16"},
    ]


def test_full_factorial_lists_every_combination_once() -> None:
    """3 x 2 x 2 levels give 12 distinct cells, the baseline first."""
    found = study("design: full_factorial\nseeds: [0]\n")
    cells = design.cells(found)
    assert changes(found, cells)[0] == {}
    assert len(cells) == len({cell.levels for cell in cells}) == 12


def test_leave_one_out_is_paired_with_add_one_in() -> None:
    """From a target of three changes: the target, three reverted, three added alone."""
    target = "{warmup: '1', beta2: '0.98', precision: amp_bf16}"
    found = study(f"design: {{name: leave_one_out, target: {target}}}\nseeds: [0]\n")
    sizes = Counter(len(change) for change in changes(found, design.cells(found)))
    assert sizes == {0: 1, 3: 1, 2: 3, 1: 3}


@pytest.mark.parametrize("name", ["plackett_burman", "fractional_factorial"])
def test_fractions_need_two_levels_and_balance_them(name: str) -> None:
    """Every factor stands at each level in half of the cells."""
    head = HEAD.replace("[10000, 1, 50]", "[10000, 1]")
    options = "resolution: III" if name == "fractional_factorial" else "fold_over: false"
    found = study(f"design: {{name: {name}, {options}}}\nseeds: [0]\n", head)
    cells = design.cells(found)
    for factor in found.factors:
        counts = Counter(dict(cell.levels)[factor.name] for cell in cells)
        assert len(set(counts.values())) == 1, (factor.name, counts)


@settings(max_examples=25)
@given(st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True))
def test_blocks_are_complete_and_in_order(seeds: list[int]) -> None:
    """Trials come in whole seed blocks, each with every cell once, and always in the same order."""
    found = study(f"seeds: {seeds}\n")
    trials = design.propose(found)
    blocks = [list(group) for _, group in itertools.groupby(trials, key=lambda t: t.seed)]
    assert [block[0].seed for block in blocks] == seeds
    assert all(len({t.id for t in block}) == 5 for block in blocks)
    assert [t.id for t in design.propose(found)] == [t.id for t in trials]


def test_the_order_within_blocks_differs() -> None:
    """A drift of the cluster does not fall on the same cells in every block."""
    found = study("seeds: [0, 1, 2, 3]\n")
    trials = design.propose(found)
    orders = {
        tuple(t.cell.name for t in group)
        for _, group in itertools.groupby(trials, key=lambda t: t.seed)
    }
    assert len(orders) > 1


LOSS = """\
name: d
recipe: openclip
baseline: {model: tiny-rn-a, train_data: t.tar, imagenet_val: val, precision: fp32}
factors:
  precision: [fp32, amp_bf16]
  loss:
    default: {}
    gather: {gather_with_grad: true}
    local_gather: {local_loss: true, gather_with_grad: true}
    local_only: {local_loss: true}
gang: {workers: 2}
"""


def test_levels_that_are_one_experiment_are_run_once_with_the_reason() -> None:
    """Of four loss levels two are merged into the default; local_loss alone, the negative control,
    is left to be run."""
    found = study("seeds: [0]\n", LOSS)
    assert changes(found, design.cells(found)) == [
        {}, {"precision": "amp_bf16"}, {"loss": "local_only"},
    ]  # fmt: skip
    merged = design.merged(found)
    assert [(dict(m.cell.levels)["loss"], dict(m.home.levels)["loss"]) for m in merged] == [
        ("gather", "default"), ("local_gather", "default"),
    ]  # fmt: skip
    assert "AdamW divides by their size" in merged[0].why.reasons[0]


def test_a_level_can_be_kept_as_a_control() -> None:
    """A level under `controls` has a cell of its own, in a crossing too; the others are merged."""
    tail = "controls: {loss: [gather]}\nseeds: [0]\n"
    found = study(tail, LOSS)
    assert {"loss": "gather"} in changes(found, design.cells(found))
    assert [(name, home) for name, home, _ in design.controls(found)] == [
        ("loss=gather", "loss=default")
    ]
    crossed = study("design: full_factorial\n" + tail, LOSS)
    assert len(design.cells(crossed)) == 2 * 3 and len(design.merged(crossed)) == 2


def test_levels_are_merged_only_where_they_are_one_experiment() -> None:
    """fp16's scaler sees the gradient's size: crossed with it, gather is merged at fp32 alone."""
    found = study(
        "design: full_factorial\nseeds: [0]\n", LOSS.replace("amp_bf16]", "amp]")
    )  # fmt: skip
    assert found.factor("loss").distinct() == ("default", "gather", "local_only")
    homes = {
        tuple(sorted(change.items()))
        for change in changes(found, [merged.cell for merged in design.merged(found)])
    }
    assert homes == {
        (("loss", "gather"),),
        (("loss", "local_gather"),),
        (("loss", "local_gather"), ("precision", "amp")),
    }


def test_levels_that_contradict_each_other_are_named() -> None:
    """A crossing with a combination that is no configuration says which one, and what to do."""
    head = LOSS.replace("  loss:\n", "  kind: {clip: {}, siglip: {siglip: true}}\n  loss:\n")
    found = study("design: full_factorial\nseeds: [0]\n", head)
    with pytest.raises(PlanError, match=r"kind=siglip, loss=.* cannot be run: .*Leave one"):
        design.cells(found)


def test_a_fraction_counts_distinct_levels() -> None:
    """Four loss levels, of which two differ, fit a two-level fraction; merged ones stand in it."""
    more = LOSS.replace("  loss:", "  beta2: [0.999, 0.98]\n  loss:")
    found = study(
        "design: {name: fractional_factorial, resolution: III}\nseeds: [0]\n", more
    )  # fmt: skip
    assert len(design.cells(found)) == 4
    fraction = design.fraction(found)
    assert fraction is not None and fraction.factors == ("precision", "beta2", "loss")
    homes = {dict(merged.home.levels)["loss"] for merged in design.merged(found)}
    assert homes == {"default"} and len(design.merged(found)) == 4


def test_a_mixed_fraction_takes_three_levels() -> None:
    """3 x 2 x 2 levels at resolution III: nine runs instead of twelve, mains balanced."""
    found = study("design: {name: fractional_factorial, resolution: III}\nseeds: [0]\n")
    cells = design.cells(found)
    counts = Counter(dict(cell.levels)["warmup"] for cell in cells)
    assert len(cells) <= 9 and set(counts) == {"10000", "1", "50"}
    fraction = design.fraction(found)
    assert fraction is not None
    assert any("beta2 x precision" in others for others in fraction.aliases().values())


def results(found: Study, value: dict[str, float]) -> list[Result]:
    """A result for every trial that is wanted; each change adds its value."""
    known: list[Result] = []
    while True:
        new = [
            trial
            for trial in design.propose(found, known)
            if trial.id not in {result.trial_id for result in known}
        ]
        if not new:
            return known
        for trial in new:
            changed = found.baseline_levels().items() ^ set(trial.cell.levels)
            total = sum(value.get(f"{k}={v}", 0.0) for k, v in changed)
            known.append(
                Result(
                    levels=trial.cell.levels,
                    seed=trial.seed,
                    outcome="completed",
                    value=0.1 + total,
                    trial_id=trial.id,
                )
            )


def test_an_ablation_path_takes_the_best_step_first() -> None:
    """Rounds follow the gains: of three changes, 3 + 2 + 1 cells and the baseline are run."""
    target = "{warmup: '1', beta2: '0.98', precision: amp_bf16}"
    found = study(f"design: {{name: ablation_path, target: {target}}}\nseeds: [0, 1]\n")
    gains = {"warmup=1": 0.01, "beta2=0.98": 0.05, "precision=amp_bf16": 0.03}
    known = results(found, gains)
    path = changes(found, design.cells(found, known))
    assert len(path) == 1 + 3 + 2 + 1
    assert {"beta2": "0.98", "precision": "amp_bf16"} in path
    assert {"beta2": "0.98", "warmup": "1"} in path
    assert {"precision": "amp_bf16", "warmup": "1"} not in path, "not on top of the best"


def test_a_diverged_trial_counts_at_chance(tmp_path: Path) -> None:
    """The mean of a cell with one diverged seed takes 1/classes for it, never NaN or nothing."""
    for name in ("cat", "dog", "eel", "fox"):
        (tmp_path / "val" / name).mkdir(parents=True)
    found = study("seeds: [0, 1]\n", root=tmp_path)
    levels = tuple(found.baseline_levels().items())
    known = [
        Result(levels=levels, seed=0, outcome="completed", value=0.75, trial_id="a"),
        Result(levels=levels, seed=1, outcome="diverged", value=None, trial_id="b"),
    ]
    assert design.mean_score(found, dict(levels), known) == pytest.approx((0.75 + 0.25) / 2)
    assert design.mean_score(found, dict(levels), known[:1]) is None, "a block is missing"


def test_seeds_are_added_only_to_open_contrasts() -> None:
    """With sequential seeds a clear effect stops early and an unclear one gets more seeds."""
    found = study("seeds: {min: 3, max: 5, until: decided}\n")
    first = design.propose(found)
    assert {trial.seed for trial in first} == {0, 1, 2}
    noise = [0.001, -0.001, 0.0005, -0.0004, 0.0002]
    known: list[Result] = []
    for _ in range(3):
        for trial in design.propose(found, known):
            if trial.id in {result.trial_id for result in known}:
                continue
            wobble = noise[(trial.seed * 7 + len(trial.cell.name)) % 5]
            clear = 0.3 if dict(trial.cell.levels)["beta2"] == "0.98" else 0.0
            known.append(
                Result(
                    levels=trial.cell.levels,
                    seed=trial.seed,
                    outcome="completed",
                    value=0.2 + clear + wobble * (1 if clear else 20),
                    trial_id=trial.id,
                )
            )
    seeds = Counter(trial.cell.name for trial in design.propose(found, known))
    assert max(seeds.values()) > 3, "some contrast stayed open and got another block"
    clear_cell = next(name for name in seeds if "beta2=0.98" in name)
    assert seeds[clear_cell] < max(seeds.values())


def test_leave_one_out_adds_seeds_where_its_own_questions_are_open() -> None:
    """A reverted change is judged against the target: while it is open, the target and that cell
    get more seeds; changes made alone that are clear get none."""
    found = study(
        "design: {name: leave_one_out, target: {beta2: '0.98', precision: amp_bf16}}\n"
        "seeds: {min: 2, max: 3, until: decided}\n"
    )
    noise = {0: 0.001, 1: -0.001}
    known = []
    for trial in design.propose(found):
        levels = dict(trial.cell.levels)
        alone = sum(levels[f] != level for f, level in found.baseline_levels().items())
        # Alone each change is plainly worse, without any noise to speak of; against the target
        # nothing is clear.
        wobble = noise[trial.seed] * (1e-3 if alone < 2 else 30)
        known.append(
            Result(
                levels=trial.cell.levels, seed=trial.seed, outcome="completed",
                value=0.5 - 0.1 * alone + wobble * len(trial.cell.name), trial_id=trial.id,
            )
        )  # fmt: skip
    full = {**found.baseline_levels(), "beta2": "0.98", "precision": "amp_bf16"}
    again = [dict(t.cell.levels) for t in design.propose(found, known) if t.seed == 2]
    assert full in again
    assert {**full, "beta2": "0.999"} in again
