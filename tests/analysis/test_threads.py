"""Small matrices are computed by one thread, and what comes after by as many as before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from sweep_worlds import World
from threadpoolctl import threadpool_info, threadpool_limits

from ablate.analysis.results import tabulate
from ablate.analysis.sweep import answer
from ablate.analysis.threads import one_thread


def threads() -> set[int]:
    """Of BLAS and OpenMP, which numpy and torch compute with, and of torch itself."""
    return {pool["num_threads"] for pool in threadpool_info()} | {torch.get_num_threads()}


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    with threadpool_limits(limits=2):
        torch.set_num_threads(2)
        yield
        torch.set_num_threads(before)


def test_an_answer_of_a_sweep_takes_one_thread(two_threads) -> None:
    """A controller answers while its trials train on the same cores."""
    assert threads() == {2}
    world = World("plain", 1)
    seen = set()

    def may_use(cell: tuple[str, ...]) -> bool:
        seen.update(threads())
        return True

    answer(tabulate(world.sweep(cells=8)), world.axes, world.baseline, world.goal, may_use=may_use)
    assert seen == {1}
    assert threads() == {2}


def test_threads_come_back_after_an_error(two_threads) -> None:
    with pytest.raises(ValueError, match="halfway"), one_thread():
        assert threads() == {1}
        raise ValueError("halfway")
    assert threads() == {2}
