"""Cells of a search: asked once, told honestly, and all shown to Optuna."""

from __future__ import annotations

import math
import random
import sqlite3
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from ablate.analysis.results import Result
from ablate.errors import PlanError, StudyError, TrackingError
from ablate.search.book import CellBook
from ablate.study import Study, parse_study
from ablate.trial.identity import Cell

CHANCE = 0.01

FIVE_BY_THREE = """
  precision: [amp, amp_bf16, fp32]
  warmup: [500, 2000, 10000]
  beta2: [0.95, 0.98, 0.999]
  wd: [0.1, 0.2, 0.5]
  eps: [1.0e-8, 1.0e-6, 1.0e-5]
"""

SMALL = """
  precision: [amp, fp32]
  beta2: [0.95, 0.98, 0.999]
"""

EFFECTS: dict[str, Mapping[str, float]] = {
    "precision": {"amp": 0.010, "amp_bf16": 0.0, "fp32": 0.009},
    "warmup": {"500": 0.003, "2000": 0.004, "10000": 0.0},
    "beta2": {"0.95": 0.002, "0.98": 0.003, "0.999": 0.0},
    "eps": {"1e-08": 0.0, "1e-06": 0.002, "1e-05": 0.001},
}


def make_study(
    factors: str = FIVE_BY_THREE,
    *,
    sampler: str = "tpe",
    baseline: str = "",
    seeds: str = "[0, 1]",
    objective: str = "imagenet_top1",
) -> Study:
    text = f"""
recipe: openclip
baseline: {{model: RN50, train_data: x.tar, precision: amp, warmup: 500, beta2: 0.95, wd: 0.1,
           eps: 1.0e-8, lr: 1.0e-3 {baseline}}}
factors: {factors}
design: {{name: search, cells: 60, sampler: {sampler}}}
seeds: {seeds}
objective: {{metric: {objective}}}
"""
    return parse_study(text, path="studies/sweep.yaml", root="/")


def score(result: Result) -> float | None:
    if result.outcome == "diverged":
        return CHANCE
    return result.value if result.outcome == "completed" else None


def make_book(study: Study, folder: Path, **more: object) -> CellBook:
    return CellBook(study, storage=folder / "optuna.db", score=score, **more)  # type: ignore[arg-type]


def run(cell: Cell, seeds: Sequence[int] = (0, 1)) -> list[Result]:
    """Results of a cell with planted effects and noise, the same whenever it is run."""
    mean = 0.18 + sum(EFFECTS.get(f, {}).get(level, 0.0) for f, level in cell.levels)
    noise = random.Random(repr(cell.levels))
    return [
        Result(cell.levels, seed, "completed", mean + noise.gauss(0, 0.003), f"{seed:012x}")
        for seed in seeds
    ]


def in_storage(study: Study, folder: Path) -> list[FrozenTrial]:
    url = f"sqlite:///{folder / 'optuna.db'}"
    return optuna.load_study(study_name=study.name, storage=url).get_trials(deepcopy=False)


def search(book: CellBook, *, cells: int, workers: int) -> list[Cell]:
    """Ask and tell with several cells running at once, which end in a random order."""
    order = random.Random(0)
    asked: list[Cell] = []
    running: list[Cell] = []
    while len(asked) < cells or running:
        while len(running) < workers and len(asked) < cells:
            cell = book.ask()
            if cell is None:
                return asked
            asked.append(cell)
            running.append(cell)
        ended = running.pop(order.randrange(len(running)))
        book.tell(ended, run(ended))
    return asked


# --------------------------------------------------------------------------- asking


@pytest.mark.parametrize(
    "workers", [4, *(pytest.param(number, marks=pytest.mark.exhaustive) for number in (1, 8))]
)
def test_no_proposal_of_a_search_is_wasted(tmp_path: Path, workers: int) -> None:
    """60 of 243 cells are asked with none repeated, and the best planted settings are found."""
    study = make_study()
    book = make_book(study, tmp_path)
    asked = search(book, cells=60, workers=workers)
    book.close()
    assert len(asked) == 60
    assert len({cell.levels for cell in asked}) == 60
    assert max(sum(EFFECTS.get(f, {}).get(v, 0) for f, v in c.levels) for c in asked) >= 0.018
    assert len(in_storage(study, tmp_path)) == 60


def test_plain_tpe_wastes_what_we_do_not() -> None:
    """In the same 243 cells with the same responses, Optuna's own ask repeats cells it knows."""
    study = make_study()
    choices = {f.name: [level.name for level in f.levels] for f in study.factors}
    wasted = []
    for seed in range(3):
        peer = optuna.create_study(
            direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed)
        )
        seen = set()
        for _ in range(60):
            trial = peer.ask()
            levels = {name: trial.suggest_categorical(name, c) for name, c in choices.items()}
            cell = study.cell(levels)
            seen.add(cell.levels)
            peer.tell(trial, sum(r.value or 0.0 for r in run(cell)) / 2)
        wasted.append(60 - len(seen))
    assert min(wasted) >= 3, wasted


@pytest.mark.parametrize("sampler", ["tpe", "gp", "qmc", "random", "grid"])
def test_a_search_ends_when_every_cell_is_known(tmp_path: Path, sampler: str) -> None:
    """Every sampler gives each of the six cells once, the baseline first, and then None."""
    study = make_study(SMALL, sampler=sampler)
    book = make_book(study, tmp_path)
    asked = search(book, cells=100, workers=2)
    assert asked[0] == study.cell({})
    assert len(asked) == 6
    assert len({cell.levels for cell in asked}) == 6
    assert book.ask() is None
    book.close()


def test_running_cells_are_not_asked_again(tmp_path: Path) -> None:
    """Nothing is told, and still no cell comes twice."""
    book = make_book(make_study(SMALL), tmp_path)
    asked = [book.ask() for _ in range(7)]
    assert asked[-1] is None
    assert len({cell.levels for cell in asked if cell}) == 6


def test_combinations_that_are_no_experiment_are_passed_over(tmp_path: Path) -> None:
    """Levels that contradict each other are never asked; what is left is asked to the last."""
    study = make_study("""
  precision: [amp, fp32]
  loss: {clip: {}, siglip: {siglip: true}}
  gather: {no: {}, yes: {gather_with_grad: true}}
""")
    book = make_book(study, tmp_path)
    asked = search(book, cells=8, workers=2)
    configs = [study.config(cell, seed=0) for cell in asked]
    assert len(asked) == 2 * 3  # siglip refuses gather_with_grad
    assert all(configs.count(config) == 1 for config in configs)


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    """A book that is told the same cells in the same order proposes the same next ones."""
    study = make_study()
    whole = make_book(study, tmp_path / "whole")
    expected = search(whole, cells=24, workers=1)

    first = make_book(study, tmp_path / "cut")
    begun = search(first, cells=14, workers=1)
    assert begun == expected[:14]
    second = make_book(study, tmp_path / "cut")
    for cell in begun:
        second.begin(cell)
        second.tell(cell, run(cell))
    assert search(second, cells=10, workers=1) == expected[14:]


def test_ranges_give_short_values_inside_their_bounds(tmp_path: Path) -> None:
    """A drawn value lies in its range, whole for a whole setting, with at most four digits."""
    study = make_study("""
  lr: {low: 1.0e-4, high: 5.0e-4, log: true}
  warmup: {low: 100, high: 5000}
  precision: [amp, fp32]
""")
    book = make_book(study, tmp_path)
    asked = search(book, cells=25, workers=3)
    book.close()
    assert len({cell.levels for cell in asked}) == 25
    for cell in asked[1:]:
        levels = dict(cell.levels)
        assert 1e-4 <= float(levels["lr"]) <= 5e-4
        assert levels["lr"] == repr(float(f"{float(levels['lr']):.4g}"))
        assert 100 <= int(levels["warmup"]) <= 5000
        assert study.config(cell, seed=0)["warmup"] == int(levels["warmup"])
    stored = in_storage(study, tmp_path)
    assert stored[0].params["lr"] == 1e-3  # the baseline, outside the range that is searched
    assert len(stored) == 25


def test_a_cell_whose_every_trial_failed_may_come_once_more(tmp_path: Path) -> None:
    """Failed and lost say nothing about a setting; but a search does not ask for ever."""
    book = make_book(make_study(SMALL), tmp_path)
    asked = []
    while (cell := book.ask()) is not None:
        asked.append(cell.levels)
        outcome = "failed" if len(asked) % 2 else "lost"
        book.tell(cell, [Result(cell.levels, seed, outcome) for seed in (0, 1)])
    assert {asked.count(levels) for levels in asked} == {2}
    assert len(asked) == 12


def test_an_infeasible_cell_is_not_asked_again(tmp_path: Path) -> None:
    """What did not fit the machine will not fit it the next time."""
    study = make_study(SMALL)
    book = make_book(study, tmp_path)
    for _ in range(6):
        cell = book.ask()
        assert cell is not None
        book.tell(cell, [Result(cell.levels, seed, "infeasible") for seed in (0, 1)])
    assert book.ask() is None
    book.close()
    assert all(t.user_attrs["infeasible"] for t in in_storage(study, tmp_path))


# --------------------------------------------------------------------------- telling


def told(tmp_path: Path, results: Sequence[tuple[str, float | None]]) -> FrozenTrial:
    """What stands in the storage after the baseline's seeds ended like this."""
    study = make_study(SMALL, seeds=str(list(range(len(results)))))
    book = make_book(study, tmp_path)
    cell = book.ask()
    assert cell is not None
    book.tell(
        cell,
        [Result(cell.levels, i, outcome, value) for i, (outcome, value) in enumerate(results)],
    )
    book.close()
    (trial,) = in_storage(study, tmp_path)
    return trial


def test_a_diverged_seed_counts_at_chance_level(tmp_path: Path) -> None:
    """The mean holds the diverged seed, and an attribute tells that there was one."""
    trial = told(tmp_path, [("completed", 0.2), ("diverged", None)])
    assert trial.state == TrialState.COMPLETE
    assert trial.value == pytest.approx((0.2 + CHANCE) / 2)
    assert trial.user_attrs["outcomes"] == "completed 1, diverged 1"
    assert trial.user_attrs["seeds"]["1"]["outcome"] == "diverged"
    assert trial.user_attrs["seeds"]["1"]["score"] == CHANCE


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_non_finite_number_reaches_optuna(tmp_path: Path, value: float) -> None:
    """A seed without a finite score is left out of the mean; alone it has none."""
    assert told(tmp_path / "both", [("completed", 0.2), ("completed", value)]).value == 0.2
    alone = told(tmp_path / "alone", [("completed", value)])
    assert alone.state == TrialState.FAIL
    assert alone.value is None


def test_failed_seeds_are_left_out_and_pruned_ones_void_the_mean(tmp_path: Path) -> None:
    """A crash takes no part in the mean; a seed of another length must not be averaged."""
    assert told(tmp_path / "a", [("completed", 0.2), ("failed", None)]).value == 0.2
    pruned = told(tmp_path / "b", [("completed", 0.2), ("pruned", None)])
    assert pruned.state == TrialState.PRUNED
    assert pruned.value is None


def test_telling_twice_and_rebuilding_leave_the_same_study(tmp_path: Path) -> None:
    """Told once, told twice, told again by the next launch, or written anew: always the same."""
    study = make_study(SMALL)

    def content() -> list[tuple[object, ...]]:
        return sorted(
            (t.user_attrs["cell"], t.state.name, t.value, str(t.user_attrs["seeds"]))
            for t in in_storage(study, tmp_path)
        )

    book = make_book(study, tmp_path)
    asked = search(book, cells=6, workers=2)
    for cell in asked:
        book.tell(cell, run(cell))
    book.close()
    first = content()
    assert len(first) == 6

    for fresh in (False, True):
        book = make_book(study, tmp_path, fresh=fresh)
        for cell in asked:
            book.tell(cell, run(cell))
        book.close()
        assert content() == first


def test_more_seeds_replace_a_cells_mean(tmp_path: Path) -> None:
    """A study that is launched again with another seed shows each cell once, with all its seeds."""
    study = make_study(SMALL)
    book = make_book(study, tmp_path)
    cell = study.cell({})
    book.tell(cell, run(cell, seeds=(0, 1)))
    book.close()
    book = make_book(study, tmp_path)
    book.tell(cell, run(cell, seeds=(0, 1)))
    book.tell(cell, run(cell, seeds=(0, 1, 2)))
    book.close()
    (trial,) = in_storage(study, tmp_path)
    assert set(trial.user_attrs["seeds"]) == {"0", "1", "2"}


# --------------------------------------------------------------------------- the storage


def test_every_cell_of_a_listed_design_stands_in_the_storage(tmp_path: Path) -> None:
    """Without a search too: running cells as running, ended ones with their mean, readable."""
    study = make_study(SMALL)
    book = make_book(study, tmp_path)
    cells = [study.cell({}), study.cell({"precision": "fp32"}), study.cell({"beta2": "0.98"})]
    for cell in cells:
        book.begin(cell)
    for cell in cells[:2]:
        book.tell(cell, run(cell))
    loaded = optuna.load_study(
        study_name="sweep", storage=f"sqlite:///{tmp_path / 'optuna.db'}"
    )  # while the book is open, as the dashboard does
    assert [t.state.name for t in loaded.trials] == ["COMPLETE", "COMPLETE", "RUNNING"]
    assert loaded.direction == optuna.study.StudyDirection.MAXIMIZE
    assert loaded.metric_names == ["imagenet_top1"]
    assert loaded.best_trial.params.keys() == {"precision", "beta2"}
    distribution = loaded.trials[0].distributions["beta2"]
    assert distribution == optuna.distributions.CategoricalDistribution(["0.95", "0.98", "0.999"])
    with sqlite3.connect(tmp_path / "optuna.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()
    book.close()


def test_nothing_stays_running_after_a_crash_or_a_close(tmp_path: Path) -> None:
    """A cell that a killed controller left behind is taken up again, not doubled."""
    study = make_study(SMALL)
    killed = make_book(study, tmp_path)
    cell, other = killed.ask(), killed.ask()
    assert cell is not None and other is not None
    assert [t.state.name for t in in_storage(study, tmp_path)] == ["RUNNING", "RUNNING"]

    book = make_book(study, tmp_path)  # the first one never says good-bye
    assert {t.state.name for t in in_storage(study, tmp_path)} == {"WAITING"}
    book.begin(cell)
    book.begin(other)
    book.tell(cell, run(cell))
    assert [t.state.name for t in in_storage(study, tmp_path)] == ["COMPLETE", "RUNNING"]
    book.close()
    assert [t.state.name for t in in_storage(study, tmp_path)] == ["COMPLETE", "WAITING"]


def test_a_locked_storage_holds_nothing_up_and_is_caught_up_with(tmp_path: Path) -> None:
    """While another program holds the database, cells are asked and told as ever."""
    study = make_study(SMALL)
    book = make_book(study, tmp_path)
    book.ask()
    lock = sqlite3.connect(tmp_path / "optuna.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    begun = time.monotonic()
    asked = search(book, cells=5, workers=1)
    took_s = time.monotonic() - begun
    assert len(asked) == 5
    assert book.trouble is not None and "locked" in book.trouble
    assert took_s < 120
    lock.execute("ROLLBACK")
    lock.close()
    book.close()
    assert book.trouble is None
    states = [t.state.name for t in in_storage(study, tmp_path)]
    assert sorted(states) == ["COMPLETE"] * 5 + ["WAITING"]


def test_a_changed_space_is_written_anew(tmp_path: Path) -> None:
    """Optuna cannot add a choice to a parameter, and a study may gain levels and factors."""
    study = make_study(SMALL)
    book = make_book(study, tmp_path)
    book.tell(study.cell({}), run(study.cell({})))
    book.close()
    wider = make_study(SMALL.replace("0.999]", "0.999, 0.9]") + "  wd: [0.1, 0.2]\n")
    book = make_book(wider, tmp_path)
    for levels in ({}, {"beta2": "0.9"}, {"wd": "0.2"}):
        book.tell(wider.cell(levels), run(wider.cell(levels)))
    book.close()
    assert {t.params["beta2"] for t in in_storage(wider, tmp_path)} == {"0.95", "0.9"}
    assert all("wd" in t.params for t in in_storage(wider, tmp_path))


@pytest.mark.parametrize("url", ["nosuchdb://host/x", "sqlite+nosuchdriver:///x.db"])
def test_a_storage_url_that_can_never_work_is_refused(url: str) -> None:
    """A typo must not become a warning that nobody reads."""
    with pytest.raises(TrackingError, match="cannot be used as Optuna storage"):
        CellBook(make_study(SMALL), storage=url, score=score)


# --------------------------------------------------------------------------- samplers


@pytest.mark.parametrize(
    ("factors", "sampler", "expected"),
    [
        (SMALL, "tpe, options: {startup: 3}", "options.startup: .*no option 'startup'.*n_startup"),
        (SMALL, "random, options: {seed: 3}", "sampler random has no option 'seed'; it takes none"),
        ("\n  lr: {low: 1.0e-4, high: 1.0e-2}", "grid", "factors.lr: sampler grid needs listed"),
    ],
)
def test_options_that_do_not_fit_are_refused(factors: str, sampler: str, expected: str) -> None:
    """Before anything is asked, with the line and what is allowed."""
    with pytest.raises(StudyError, match=expected):
        make_study(factors, sampler=sampler)


def test_values_of_options_are_refused_before_the_search(tmp_path: Path) -> None:
    """Optuna's own refusal comes when the book is opened, not in the middle of a search."""
    with pytest.raises(PlanError, match="sampler qmc.*dice"):
        make_book(make_study(SMALL, sampler="qmc, options: {qmc_type: dice}"), tmp_path)


def test_options_reach_the_sampler(tmp_path: Path) -> None:
    """Other options, another sequence of cells; the same options, the same."""

    def asked(options: str) -> list[Cell]:
        study = make_study(sampler=f"tpe, options: {options}")
        return search(make_book(study, tmp_path / str(hash(options))), cells=20, workers=1)

    eager, patient = asked("{n_startup_trials: 2}"), asked("{n_startup_trials: 19}")
    assert eager[:2] == patient[:2] and eager != patient
    assert asked("{n_startup_trials: 2}") == eager


def test_parallel_proposals_keep_apart(tmp_path: Path) -> None:
    """The constant liar: of ten cells asked while none has ended, fewer crowd the best region.

    Without it, TPE sees the running cells not at all and proposes around the same best cell.
    """

    def crowd(options: str) -> int:
        study = make_study(sampler=f"tpe, options: {options}")
        book = make_book(study, tmp_path / options.strip("{}").replace(": ", "-"))
        search(book, cells=30, workers=1)
        running = [cell for _ in range(10) if (cell := book.ask()) is not None]
        levels = [tuple(level for _, level in cell.levels) for cell in running]
        return sum(
            sum(a != b for a, b in zip(one, two, strict=True))
            for i, one in enumerate(levels)
            for two in levels[:i]
        )

    assert crowd("{constant_liar: true}") > crowd("{constant_liar: false}")


def test_an_earlier_study_informs_the_sampler_and_stands_for_nothing(tmp_path: Path) -> None:
    """With its results, good cells come sooner; each of them is still run here."""
    study = make_study()
    names = [factor.name for factor in study.factors]

    def mean_effect(book: CellBook) -> float:
        asked = search(book, cells=13, workers=1)[1:]
        assert len(asked) == 12
        gains = [sum(EFFECTS.get(f, {}).get(v, 0) for f, v in cell.levels) for cell in asked]
        return sum(gains) / len(gains)

    cold = mean_effect(make_book(study, tmp_path / "cold"))
    warm_book = make_book(study, tmp_path / "warm")
    lot = random.Random(1)
    earlier = []
    for _ in range(60):
        levels = {n: lot.choice([item.name for item in study.factor(n).levels]) for n in names}
        earlier.append((levels, [run(study.cell(levels))[0].value or 0.0]))
    fits = earlier[0][0]
    unfit = [({**fits, "beta2": "0.5"}, [0.2]), ({"beta2": "0.95"}, [0.2]), (fits, [math.nan])]
    assert warm_book.add_earlier("last_year", [*earlier, *unfit]) == 60
    assert mean_effect(warm_book) > cold
    warm_book.close()
    stored = in_storage(study, tmp_path / "warm")
    assert sum(t.user_attrs.get("earlier_study") == "last_year" for t in stored) > 0
    assert sum("earlier_study" not in t.user_attrs for t in stored) == 13


# --------------------------------------------------------------------------- score against cost

COSTED = "imagenet_top1, cost: peak_memory_gib"
STEPS = ("0.1", "0.2", "0.5")
"""Levels of wd that buy score with memory; every other factor only costs score."""


def costed(cell: Cell) -> list[Result]:
    """Two seeds of a cell whose score and cost both rise with wd, and whose score beta2 spoils."""
    levels = dict(cell.levels)
    at = STEPS.index(levels["wd"])
    value = 0.1 + 0.05 * at - 0.04 * ("0.95", "0.98", "0.999").index(levels["beta2"])
    if levels["precision"] == "fp32":
        return [Result(cell.levels, seed, "diverged") for seed in (0, 1)]
    return [Result(cell.levels, seed, "completed", value, cost=4.0 + at) for seed in (0, 1)]


@pytest.mark.parametrize("sampler", ["tpe", "gp", "qmc", "random", "grid"])
def test_a_search_for_score_against_cost_finds_the_front(tmp_path: Path, sampler: str) -> None:
    """Optuna's Pareto front of the stored study is the planted one; diverged is not cheap."""
    study = make_study(
        "\n  precision: [amp, fp32]\n  beta2: [0.95, 0.98, 0.999]\n  wd: [0.1, 0.2, 0.5]\n",
        sampler=sampler,
        objective=COSTED,
    )
    book = make_book(study, tmp_path)
    for _ in range(18):
        cell = book.ask()
        assert cell is not None
        book.tell(cell, costed(cell))
    assert book.ask() is None
    book.close()
    stored = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path / 'optuna.db'}")
    assert stored.metric_names == ["imagenet_top1", "peak_memory_gib"]
    assert [d.name for d in stored.directions] == ["MAXIMIZE", "MINIMIZE"]
    front = sorted((t.params["wd"], t.values[1], round(t.values[0], 9)) for t in stored.best_trials)
    assert front == [("0.1", 4.0, 0.1), ("0.2", 5.0, 0.15), ("0.5", 6.0, 0.2)]
    gone = [t for t in stored.trials if t.params["precision"] == "fp32"]
    assert {t.state for t in gone} == {TrialState.PRUNED}
    assert {t.user_attrs["outcomes"] for t in gone} == {"diverged 2"}


@pytest.mark.exhaustive
def test_tpe_goes_for_both_ends_of_the_front(tmp_path: Path) -> None:
    """In 24 of 243 cells TPE looks at more cells without a spoiled score than lots would draw."""

    def share(sampler: str) -> float:
        study = make_study(sampler=sampler, objective=COSTED)
        book = make_book(study, tmp_path / sampler)
        good = 0
        for _ in range(60):
            cell = book.ask()
            assert cell is not None
            book.tell(cell, costed(cell))
            levels = dict(cell.levels)
            good += levels["beta2"] == "0.95" and levels["precision"] != "fp32"
        return good / 60

    assert share("tpe") > 1.3 * share("random")
