"""Did it learn? What changed between two checkpoints, and whether their features are any good.

A falling loss does not show that a model learns, nor a flat one that it does not: weights may be
loaded in part, a tower may be frozen by mistake, an optimizer may hold a stale copy of the
parameters, features may have collapsed. These functions look at the weights and the features
themselves. Features are arrays of shape (samples, dimensions), labels of shape (samples,).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch

from ablate.errors import CheckpointError
from ablate.training import checkpoint
from ablate.training.health import effective_rank
from ablate.training.optim import module_group

Features = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Verdict = Literal["learning", "not learning", "collapsed"]

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, slots=True)
class Change:
    """How one tensor changed from A to B."""

    name: str
    group: str
    """Its part of the model, as in ``grad_norm/<group>``."""
    buffer: bool
    """Whether it is a running statistic and no parameter."""
    numbers: int
    relative: float
    """|B - A| / |A|, Euclidean; infinite when A is zero and B is not."""
    cosine: float
    largest: float
    """Largest absolute difference of a number."""
    sign_flips: float
    """Share of numbers that changed their sign."""

    @property
    def moved(self) -> bool:
        return self.largest > 0 or math.isnan(self.largest)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What changed between two checkpoints of one model."""

    changes: tuple[Change, ...]
    """Largest relative change first."""
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    flags: tuple[str, ...]
    """What is wrong, as sentences; empty when nothing is."""

    def by_group(self) -> dict[str, float]:
        """Median relative change of each part of the model's parameters."""
        groups: dict[str, list[float]] = {}
        for change in self.changes:
            if not change.buffer:
                groups.setdefault(change.group, []).append(change.relative)
        return {name: float(np.median(values)) for name, values in groups.items()}


def read_model(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint folder or of a .safetensors file.

    Raises:
        CheckpointError: it is damaged or not there.
    """
    if path.is_dir():
        problem = checkpoint.fault(path)
        if problem is not None:
            raise CheckpointError(f"{path} is no whole checkpoint: {problem}")
        path = path / "model.safetensors"
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def compare_weights(
    a: Mapping[str, torch.Tensor],
    b: Mapping[str, torch.Tensor],
    *,
    frozen: Sequence[str] = (),
    moments: Mapping[str, torch.Tensor] | None = None,
) -> Comparison:
    """Compare the tensors of two checkpoints, A the earlier.

    `frozen` are globs of parameters that must not move. `moments` is B's optimizer state by
    name (``parameter/exp_avg``): with it, parameters that the optimizer updates elsewhere are
    told from parameters without gradient.
    """
    changes = [_change(name, a[name], b[name]) for name in a if name in b]
    changes.sort(key=lambda change: -np.nan_to_num(change.relative, nan=np.inf))
    only_a, only_b = tuple(sorted(set(a) - set(b))), tuple(sorted(set(b) - set(a)))
    flags = list(_flags(changes, frozen, moments or {}))
    if only_a or only_b:
        flags.append(f"not the same model: {len(only_a)} tensors only in A, {len(only_b)} in B")
    return Comparison(tuple(changes), only_a, only_b, tuple(flags))


def _change(name: str, a: torch.Tensor, b: torch.Tensor) -> Change:
    if a.shape != b.shape:
        nan = float("nan")
        return Change(name, module_group(name), False, b.numel(), nan, nan, nan, nan)
    old, new = a.double().flatten(), b.double().flatten()
    moved, norm = float((new - old).norm()), float(old.norm())
    both = norm * float(new.norm())
    return Change(
        name=name,
        group=module_group(name),
        buffer=name.endswith(BUFFERS),
        numbers=b.numel(),
        relative=moved / norm if norm else (math.inf if moved else 0.0),
        cosine=float(old @ new) / both if both else float("nan"),
        largest=float((new - old).abs().max()) if len(old) else 0.0,
        sign_flips=float((old.sign() * new.sign() < 0).double().mean()) if len(old) else 0.0,
    )


def _flags(
    changes: Sequence[Change], frozen: Sequence[str], moments: Mapping[str, torch.Tensor]
) -> list[str]:
    flags = []
    parameters = [change for change in changes if not change.buffer]
    must_not = [c for c in parameters if any(fnmatchcase(c.name, glob) for glob in frozen)]
    trained = [c for c in parameters if c not in must_not]
    static = [c for c in trained if not c.moved]
    if any(c.moved for c in must_not):
        moved = [c.name for c in must_not if c.moved]
        flags.append(f"frozen but moved: {_some(moved)}")
    if trained and len(static) == len(trained):
        statistics = any(c.moved for c in changes if c.buffer)
        flags.append(
            "only BatchNorm statistics changed, no parameter did" if statistics else "no change"
        )
    elif static:
        flags.append(f"trainable but static: {_some([c.name for c in static])}")
    stale = [
        c.name
        for c in static
        if f"{c.name}/exp_avg" in moments and bool(moments[f"{c.name}/exp_avg"].any())
    ]
    if stale:
        flags.append(
            f"the optimizer has gradients for parameters that do not move: {_some(stale)}; "
            "it holds another copy of them"
        )
    broken = [c.name for c in changes if math.isnan(c.largest)]
    if broken:
        flags.append(f"not finite, or of another shape: {_some(broken)}")
    return flags


def _some(names: Sequence[str]) -> str:
    groups = list(dict.fromkeys(module_group(name) for name in names))
    shown = ", ".join(groups[:6]) + (" ..." if len(groups) > 6 else "")
    return f"{len(names)} tensors in {shown}"


def at_initialisation(
    model: Mapping[str, torch.Tensor], fresh: Mapping[str, torch.Tensor]
) -> tuple[str, ...]:
    """Parameters that equal a fresh initialisation to the bit, where that is not constant.

    Gains of one and biases of zero say nothing, so tensors of one repeated number are left out.
    All others at their initialisation: nothing was loaded. Some of them: loaded in part.
    """
    return tuple(
        name
        for name, value in fresh.items()
        if name in model
        and not name.endswith(BUFFERS)
        and value.numel() > 1
        and bool((value != value.flatten()[0]).any())
        and torch.equal(value, model[name])
    )


# --------------------------------------------------------------------------- features


@dataclass(frozen=True, slots=True)
class Score:
    """A share of correct answers, with a 95 % interval from resampled images."""

    value: float
    low: float
    high: float
    samples: int


def bootstrap(correct: npt.NDArray[np.bool_], *, seed: int = 0, rounds: int = 1000) -> Score:
    """Mean of `correct` with its percentile interval over images."""
    rng = np.random.default_rng(seed)
    size = len(correct)
    means = rng.binomial(size, correct.mean(), rounds) / size  # resampling a binary outcome
    low, high = np.quantile(means, [0.025, 0.975])
    return Score(float(correct.mean()), float(low), float(high), size)


def knn_top1(
    features: Features, labels: Labels, *, neighbours: int = 200, temperature: float = 0.1
) -> Score:
    """Weighted nearest-neighbour accuracy, each sample against all others.

    Votes are exp(cosine / temperature), as in Wu et al. 2018 (arXiv 1805.01978) and lightly.
    """
    x = torch.nn.functional.normalize(torch.from_numpy(features).float(), dim=1)
    classes = int(labels.max()) + 1
    target = torch.from_numpy(labels)
    k = min(neighbours, len(x) - 1)
    correct = []
    for start in range(0, len(x), 1024):
        cosines = x[start : start + 1024] @ x.T
        rows = torch.arange(len(cosines))
        cosines[rows, start + rows] = -torch.inf
        near, index = cosines.topk(k, dim=1)
        votes = torch.zeros(len(near), classes)
        votes.scatter_add_(1, target[index], (near / temperature).exp())
        correct.append(votes.argmax(dim=1) == target[start : start + 1024])
    return bootstrap(torch.cat(correct).numpy())


def linear_top1(
    features: Features, labels: Labels, *, seed: int = 0, penalty: float = 1e-3
) -> Score:
    """Accuracy of a logistic regression on half of the samples of each class, on the other half."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    train = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        mine = order[labels[order] == label]
        train[mine[: max(1, len(mine) // 2)]] = True
    x = torch.from_numpy(features).float()
    x = (x - x[train].mean(dim=0)) / x[train].std(dim=0).clamp_min(1e-6)
    y = torch.from_numpy(labels)
    weight = torch.zeros(x.shape[1], int(labels.max()) + 1, requires_grad=True)
    bias = torch.zeros(weight.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        fit = torch.nn.functional.cross_entropy(x[train] @ weight + bias, y[train])
        value = fit + penalty * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        found = (x[~train] @ weight + bias).argmax(dim=1)
    return bootstrap((found == y[~train]).numpy())


def linear_cka(a: Features, b: Features) -> float:
    """Similarity of two representations of the same samples, 0 to 1, whatever the rotation.

    Linear centred kernel alignment, Kornblith et al. 2019 (arXiv 1905.00414).
    """
    x = a.astype(np.float64) - a.mean(axis=0)
    y = b.astype(np.float64) - b.mean(axis=0)
    cross = np.linalg.norm(y.T @ x) ** 2
    own = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(cross / own) if own else float("nan")


def judge_features(
    before: Score, after: Score, *, rank: float, chance: float
) -> tuple[Verdict, str]:
    """Whether features became better between two checkpoints, with the reason.

    `rank` is the effective rank of the later ones. The loss is not asked: it may be flat while
    neighbours become neighbours.
    """
    if not math.isfinite(rank) or rank < 2:
        return "collapsed", f"the features span {rank:.1f} dimensions"
    if after.low > before.value:
        return "learning", f"nearest neighbours {before.value:.3f} -> {after.value:.3f}"
    if after.low <= chance:
        return "not learning", f"nearest neighbours {after.value:.3f}, chance is {chance:.3f}"
    return "not learning", f"nearest neighbours stay at {before.value:.3f} -> {after.value:.3f}"


def rank_of(features: Features) -> float:
    """Effective rank of features."""
    return effective_rank(torch.from_numpy(features))


def plane(features: Features) -> npt.NDArray[np.float64]:
    """The features' first two principal components, for a picture; shape (samples, 2)."""
    centred = features.astype(np.float64) - features.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    flat: npt.NDArray[np.float64] = centred @ axes[:2].T
    return flat


def read_config(path: Path) -> dict[str, Any]:
    """trial.json of the trial that a checkpoint folder belongs to.

    Raises:
        CheckpointError: the folder is not part of a trial.
    """
    trial = path.resolve().parent.parent / "trial.json"
    if not trial.is_file():
        raise CheckpointError(f"{path} is not TRIAL/checkpoints/step-...: no {trial}")
    content: dict[str, Any] = json.loads(trial.read_text(encoding="utf-8"))
    return content
