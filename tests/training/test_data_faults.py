"""Data that break while ranks train on them: substituted and counted, or the end of all ranks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_trials import SHARD_SAMPLES, log_of, run, write_pairs, write_trial

from ablate.errors import DataError
from ablate.recipes import openclip
from ablate.records.folder import TrialRecord
from ablate.training.data import batches as data_module
from ablate.training.data.order import Order, child_seeds
from ablate.training.data.shards import index_shards

SMALL: dict[str, Any] = {"model": "tiny-test-rn", "imagenet_val": None, "cache_gib": 0.0}
TWO: dict[str, Any] = {**SMALL, "gang": 2, "batch_size": 8}


def damaged(data: Path, folder: Path, samples: Iterable[int]) -> Path:
    """A copy of the data in which the images of these samples break off in the middle."""
    shutil.copytree(data, folder)
    index = index_shards(str(data / "train" / "{00000..00002}.tar"), cache=None)
    pairs = [index.read(number) for number in range(index.num_samples)]
    for number in samples:
        pairs[number] = (pairs[number][0][:300], pairs[number][1])
    for shard in range(3):
        mine = pairs[shard * SHARD_SAMPLES : (shard + 1) * SHARD_SAMPLES]
        write_pairs(folder / "train" / f"{shard:05d}.tar", mine)
    return folder


def at(positions: Iterable[int]) -> list[int]:
    """Samples at these positions of the first epoch."""
    order = Order(np.array([SHARD_SAMPLES] * 3), key=child_seeds(0)[0])
    return order.ids(0, np.array(list(positions))).tolist()


def allow_substitutes(count: int) -> None:
    data_module.MAX_SUBSTITUTES = count


def truncate_in_step(step: int, path: Path) -> None:
    """Rank 0 cuts the shard in half while it is in a step."""
    from ablate.training.step import Step

    original = Step.take

    def optimize(run: Any, model: Any, number: int, *rest: Any) -> Any:
        if number + 1 == step and os.environ["RANK"] == "0":
            os.truncate(path, path.stat().st_size // 2)
        return original(run, model, number, *rest)

    Step.take = optimize  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("rank", "loaders"), [pytest.param(0, 2, marks=pytest.mark.exhaustive), (1, 0)]
)
def test_one_rank_without_data_ends_all(
    tmp_path: Path, data: Path, rank: int, loaders: int
) -> None:
    """When one rank finds no substitute, all leave in order at that step: a data fault that says
    where, no row and no checkpoint of what was computed without data."""
    first = 2 * 16 + rank * 8  # in the third step
    bad = damaged(data, tmp_path / "data", at([first, first + 1]))
    trial = write_trial(tmp_path / "t", bad, workers=loaders, max_fault_share=1.0, **TWO)
    assert run(trial.folder, workers=2, prepare=partial(allow_substitutes, 1)) == [0, 0]
    result = trial.result(1)
    assert result is not None and result["status"] == "failed", log_of(trial)
    assert result["reason"].startswith(f"data fault: rank {rank} at step 3: 1 samples in a row")
    assert f"position {first} of epoch 0" in result["reason"] and result["step"] == 2
    assert [row["step"] for row in trial.trace()] == [1, 2]
    assert not list((trial.folder / "checkpoints").glob("step-*"))


def test_a_shard_that_breaks_off_in_a_run_ends_all_ranks(tmp_path: Path, data: Path) -> None:
    """A shard truncated under a running trial: substitutes up to the limit, then a data fault."""
    own = damaged(data, tmp_path / "data", [])
    trial = write_trial(tmp_path / "t", own, max_fault_share=0.05, **TWO)
    cut = partial(truncate_in_step, 2, own / "train" / "00001.tar")
    assert run(trial.folder, workers=2, prepare=cut) == [0, 0]
    result = trial.result(1)
    assert result is not None and result["status"] == "failed", log_of(trial)
    assert "samples were unreadable, more than the share of 0.05" in result["reason"]
    assert result["data_faults"] > 0.05 * 96
    rows = trial.trace()
    assert rows[-1]["data_faults"] == result["data_faults"] > rows[0]["data_faults"] == 0


def losses(trial: TrialRecord) -> list[tuple[float, int]]:
    return [(row["loss"], row["data_faults"]) for row in trial.trace()]


@pytest.mark.exhaustive
def test_substitutes_are_the_same_each_time(tmp_path: Path, data: Path) -> None:
    """Bad samples within the limit: the trial completes, they are counted in each epoch, and
    loaders, caches and another run change neither the substitutes nor the losses."""
    bad = damaged(data, tmp_path / "data", at([3, 4, 40]))
    share: dict[str, Any] = {"max_fault_share": 0.05, "epochs": 2}
    one = write_trial(tmp_path / "one", bad, **share, **TWO)
    two = write_trial(tmp_path / "two", bad, workers=2, **share, **{**TWO, "cache_gib": 1.0})
    assert run(one.folder, workers=2) == run(two.folder, workers=2) == [0, 0]
    assert losses(one) == losses(two)
    assert [faults for _, faults in losses(one)][:6] == [2, 2, 3, 3, 3, 3]
    assert losses(one)[-1][1] == 6
    whole = write_trial(tmp_path / "whole", data, **share, **TWO)
    assert run(whole.folder, workers=2) == [0, 0]
    assert losses(whole)[0][0] != losses(one)[0][0]


def test_a_shard_that_was_not_fetched_whole_is_refused(tmp_path: Path, data: Path) -> None:
    """Truncated before the trial: what is lost counts against the limit, at plan time too; within
    the limit it is recorded."""
    own = damaged(data, tmp_path / "data", [])
    path = own / "train" / "00002.tar"
    os.truncate(path, path.stat().st_size // 2 + 100)
    trial = write_trial(tmp_path / "t", own, **SMALL)
    assert run(trial.folder) == [0]
    result = trial.result(1)
    assert result is not None and result["status"] == "failed"
    assert "data fault: about 15 of 96 samples" in result["reason"]
    assert f"{path}: 1 x truncated" in result["reason"]
    with pytest.raises(DataError, match="about 15 of 96"):
        openclip.num_samples(openclip.Config(**trial.trial()["config"]), root=own)
    allowed = write_trial(tmp_path / "u", own, max_fault_share=0.2, epochs=1, **SMALL)
    assert run(allowed.folder) == [0]
    ended = allowed.result(1)
    assert ended is not None and ended["status"] == "completed", log_of(allowed)
    assert ended["facts"]["shard_faults"] == {"truncated": 1, "lost_samples": 15}
