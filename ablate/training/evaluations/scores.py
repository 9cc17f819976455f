"""How good features are: neighbours, a linear probe, retrieval, and how two sets compare.

Features have shape (samples, dimensions), labels (samples,), both torch tensors. Nothing here
draws from a global generator, so measuring changes no training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ablate.training.arithmetic import full_float32
from ablate.training.evaluations.health import effective_rank

NEIGHBOURS = 200
TEMPERATURE = 0.1
"""Both as in Wu et al. 2018 (arXiv 1805.01978) and lightly's kNN benchmark."""
PENALTY = 1e-3
RECALLS = (1, 5, 10)

ROWS = 1024
"""Rows of a matrix of similarities that are computed at a time; ranks share whole ones of these."""
TIE = 32 * 2.0**-23
"""Cosines nearer than this are equal: 32 units in the last place of 1 in fp32.

A cosine is a sum of d products of fp32 numbers (on a GPU too, not of TF32's), whose error grows as
sqrt(d) half units, 16 units at d = 1024; which of two equal targets rounds higher depends on the
processor and on their place in the matrix.
"""


@dataclass(frozen=True, slots=True)
class Score:
    """A share of correct answers, or a difference of two, with an interval over images."""

    value: float
    low: float
    high: float
    samples: int


def bootstrap(correct: torch.Tensor, *, seed: int = 0, rounds: int = 2000) -> Score:
    """Mean of `correct` (samples,) with its 95 % percentile interval over resampled images."""
    size = len(correct)
    share = float(correct.double().mean())
    rng = np.random.default_rng(seed)
    means = rng.binomial(size, share, rounds) / size  # resampling a binary outcome
    low, high = np.quantile(means, [0.025, 0.975])
    return Score(share, float(low), float(high), size)


def gain(
    before: torch.Tensor,
    after: torch.Tensor,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    rounds: int = 10_000,
) -> Score:
    """Rise of the share of correct answers on the same images, with its interval over images.

    Resampling pairs of answers is drawing how many were won, lost and kept.
    """
    size = len(before)
    won = float((after & ~before).double().mean())
    lost = float((before & ~after).double().mean())
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(size, [won, lost, max(0.0, 1 - won - lost)], rounds)
    tail = (1 - confidence) / 2
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / size, [tail, 1 - tail])
    return Score(won - lost, float(low), float(high), size)


@full_float32()
def knn_correct(
    features: torch.Tensor,
    labels: torch.Tensor,
    *,
    reference: tuple[torch.Tensor, torch.Tensor] | None = None,
    rows: slice = slice(None),
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> torch.Tensor:
    """Whether the nearest neighbours name the class of each of `rows`.

    Votes are exp(cosine / temperature). Neighbours are the samples of `reference` (features,
    labels), or without it all samples but the one that is asked; then no more vote than a class
    has others at the median, because the asked one's class has one less than all the others.
    """
    x = torch.nn.functional.normalize(features.float(), dim=1)
    bank, target = (x, labels) if reference is None else reference
    bank = torch.nn.functional.normalize(bank.float(), dim=1)
    classes = int(max(labels.max(), target.max())) + 1
    k = min(neighbours, len(bank))
    if reference is None:
        counts = torch.bincount(labels)
        k = max(1, min(k, int(counts[counts > 0].median()) - 1))
    places = torch.arange(len(x), device=x.device)[rows]
    found = []
    for asked in torch.split(places, ROWS):
        cosines = x[asked] @ bank.T
        if reference is None:
            cosines[torch.arange(len(asked), device=x.device), asked] = -torch.inf
        near, index = cosines.topk(k, dim=1)
        votes = torch.zeros(len(near), classes, device=x.device)
        votes.scatter_add_(1, target[index], (near / temperature).exp())
        # Of classes with equal votes the first, whichever way the sums were rounded.
        most = votes.max(dim=1, keepdim=True).values
        first = (votes >= most * (1 - TIE)).int().argmax(dim=1)
        found.append((first == labels[asked]) & most.isfinite()[:, 0])
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.bool, device=x.device)


@full_float32()
def linear_correct(
    features: torch.Tensor,
    labels: torch.Tensor,
    *,
    reference: tuple[torch.Tensor, torch.Tensor] | None = None,
    penalty: float = PENALTY,
    iterations: int = 200,
    seed: int = 0,
) -> torch.Tensor:
    """Whether a logistic regression on frozen features names the class of each sample judged.

    It is fitted to `reference` (features, labels) and judges all samples; without `reference` it
    is fitted to half of the samples of each class and judges the others. Features are
    standardised; `penalty` times the squared weights is added to the mean cross entropy.
    """
    if reference is None:
        train = halves(labels, seed=seed)
        reference = features[train], labels[train]
        features, labels = features[~train], labels[~train]
    x, y = reference[0].float(), reference[1]
    mean, deviation = x.mean(dim=0), x.std(dim=0).clamp_min(1e-6)
    x = (x - mean) / deviation
    classes = int(max(labels.max(), y.max())) + 1
    with torch.inference_mode(False), torch.enable_grad():
        x, y = x.clone(), y.clone()
        weight = torch.zeros(x.shape[1], classes, device=x.device, requires_grad=True)
        bias = torch.zeros(classes, device=x.device, requires_grad=True)
        solver = torch.optim.LBFGS(
            [weight, bias], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe"
        )

        def loss() -> torch.Tensor:
            solver.zero_grad()
            fit = torch.nn.functional.cross_entropy(x @ weight + bias, y)
            value = fit + penalty * weight.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        solver.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        judged = (features.float() - mean) / deviation @ weight + bias
        return judged.argmax(dim=1) == labels


def halves(labels: torch.Tensor, *, seed: int) -> torch.Tensor:
    """Half of the samples of each class, at least one, by a seed."""
    numbers = labels.cpu().numpy()
    order = np.random.default_rng(seed).permutation(len(numbers))
    ranked = order[np.argsort(numbers[order], kind="stable")]
    _, starts, counts = np.unique(numbers[ranked], return_index=True, return_counts=True)
    place = np.arange(len(numbers)) - np.repeat(starts, counts)
    chosen = np.zeros(len(numbers), bool)
    chosen[ranked] = place < np.maximum(1, np.repeat(counts, counts) // 2)
    return torch.from_numpy(chosen).to(labels.device)


@full_float32()
def recalls(
    queries: torch.Tensor, targets: torch.Tensor, *, rows: slice = slice(None)
) -> torch.Tensor:
    """Recall at 1, 5 and 10 of each of `rows`: the chance that its own target is among the first.

    Query i belongs to target i; all are of norm 1. Targets of equal similarity (to `TIE`) come in
    random order, so features that are all the same score k over the number of targets, and not
    one. Shape (rows, 3).
    """
    places = torch.arange(len(queries), device=queries.device)[rows]
    found = []
    for asked in torch.split(places, ROWS):
        similar = queries[asked].float() @ targets.float().T
        own = similar[torch.arange(len(asked), device=queries.device), asked][:, None]
        # What is not finite is never below: features that are not finite find nothing.
        better = (~(similar <= own + TIE)).sum(dim=1, dtype=torch.float64)
        equal = ((similar - own).abs() <= TIE).sum(dim=1, dtype=torch.float64)  # itself too
        equal = equal.clamp_min(1)
        found.append(torch.stack([((k - better) / equal).clamp(0, 1) for k in RECALLS], dim=1))
    return torch.cat(found) if found else torch.zeros(0, len(RECALLS), dtype=torch.float64)


def linear_cka(a: torch.Tensor, b: torch.Tensor) -> float:
    """Similarity of two representations of the same samples, 0 to 1, whatever the rotation.

    Linear centred kernel alignment, Kornblith et al. 2019 (arXiv 1905.00414).
    """
    x = a.double() - a.double().mean(dim=0)
    y = b.double() - b.double().mean(dim=0)
    own: float = ((x.T @ x).norm() * (y.T @ y).norm()).item()
    cross: float = (y.T @ x).norm().item()
    return cross**2 / own if own else math.nan


def rank_of(features: torch.Tensor) -> float:
    """Effective rank of features: exp of the entropy of their normalised singular values."""
    return effective_rank(features)


def spread_of(features: torch.Tensor) -> float:
    """Mean deviation of the normalised features' dimensions, times sqrt(dimensions).

    About 1 when they fill the sphere, 0 when they are all one.
    """
    x = torch.nn.functional.normalize(features.double(), dim=1)
    return float(x.std(dim=0).mean()) * math.sqrt(x.shape[1])


def plane(features: torch.Tensor) -> npt.NDArray[np.float64]:
    """The features' first two principal components, for a picture; shape (samples, 2)."""
    centred = features.double() - features.double().mean(dim=0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    flat: npt.NDArray[np.float64] = (centred @ axes[:2].T).numpy()
    return flat
