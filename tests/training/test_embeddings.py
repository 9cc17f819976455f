"""Summing an embedding's touched rows is what DDP does with the whole of it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from embedding_ranks import Reader, learn

from ablate.training.embeddings import large_embeddings
from ablate.training.ranks import Gang

CPU = torch.device("cpu")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["plain", "tied", "bf16"])
def test_two_ranks_learn_the_same_to_the_last_bit(tmp_path: Path, case: str) -> None:
    """Also where the model uses its words' weight a second time, so that every row is touched, and
    where a rank begins with other words, which DDP would give rank 0's."""
    theirs, ours = follow(tmp_path, 2, case)
    for name, value in theirs.items():
        assert torch.equal(value, ours[name]), name


@pytest.mark.filterwarnings("ignore")
def test_three_ranks_learn_the_same_but_for_the_order_of_sums(tmp_path: Path) -> None:
    """Sums of three round by the order, which DDP takes from a place in its bucket."""
    theirs, ours = follow(tmp_path, 3, "plain")
    for name, value in theirs.items():
        torch.testing.assert_close(value, ours[name], rtol=1e-4, atol=1e-5)


def follow(folder: Path, ranks: int, case: str) -> list[dict[str, torch.Tensor]]:
    """What DDP alone and ours have learnt; every rank has the same."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(learn, (ranks, port, str(folder), case), nprocs=ranks)
    learnt = []
    for name in ("theirs", "ours"):
        first, *others = (torch.load(folder / f"{name}-{rank}") for rank in range(ranks))
        for other in others:
            assert all(torch.equal(value, other[key]) for key, value in first.items())
        learnt.append(first)
    return learnt


def test_only_what_is_worth_it_is_summed_apart() -> None:
    """One rank, a GPU's, a small or a frozen embedding: DDP, or nobody, has them."""
    model = Reader(tied=False, dtype=torch.float32)
    two = Gang(0, 2, 0, 2, CPU)
    assert list(large_embeddings(model, two)) == ["words.weight"]
    assert not large_embeddings(model, Gang(0, 1, 0, 1, CPU))
    assert not large_embeddings(model, Gang(0, 2, 0, 2, torch.device("cuda")))
    model.words.weight.requires_grad_(False)
    assert not large_embeddings(model, two)
