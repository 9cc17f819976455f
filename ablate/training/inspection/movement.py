"""What changed between the weights of two checkpoints, and what is wrong with that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt
import scipy
import torch

from ablate.training.optim import module_group

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")

_KS_SAMPLE = 20_000
_KS_LEVEL = 0.01
_WHOLE_PARTS = 0.25
"""Share of a part's tensors that must be unrelated to A before it is said: training alone
turns single small tensors, such as positional embeddings, by a right angle."""
_LEAST_NUMBERS = 256
"""Tensors of fewer numbers say nothing about their distribution."""


@dataclass(frozen=True, slots=True)
class Change:
    """How one tensor changed from A to B."""

    name: str
    group: str
    """Its part of the model, as in ``grad_norm/<group>``."""
    buffer: bool
    """Whether it is a running statistic and no parameter."""
    numbers: int
    norm: float
    """|A|, Euclidean."""
    distance: float
    """|B - A|."""
    cosine: float
    largest: float
    """Largest absolute difference of a number."""
    sign_flips: float
    """Share of numbers that changed their sign."""

    @property
    def relative(self) -> float:
        """|B - A| / |A|; infinite when A is zero and B is not."""
        return _ratio(self.distance, self.norm)

    @property
    def moved(self) -> bool:
        return self.largest > 0 or math.isnan(self.largest)


def _ratio(distance: float, norm: float) -> float:
    return distance / norm if norm else (math.inf if distance else 0.0)


@dataclass(frozen=True, slots=True)
class Module:
    """How the parameters of one part of the model moved."""

    name: str
    tensors: int
    moved: int
    relative: float
    """|B - A| / |A| over all its numbers."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What changed between two checkpoints of one model."""

    changes: tuple[Change, ...]
    """Largest relative change first."""
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    flags: tuple[str, ...]
    """What is wrong, as sentences; empty when nothing is."""

    @property
    def parameters(self) -> list[Change]:
        """Changes of parameters, without running statistics."""
        return [change for change in self.changes if not change.buffer]

    def modules(self) -> list[Module]:
        """Parts of the model, the one that moved most first."""
        parts: dict[str, list[Change]] = {}
        for change in self.parameters:
            parts.setdefault(change.group, []).append(change)
        found = [
            Module(
                name,
                len(changes),
                sum(change.moved for change in changes),
                _ratio(
                    math.hypot(*(change.distance for change in changes)),
                    math.hypot(*(change.norm for change in changes)),
                ),
            )
            for name, changes in parts.items()
        ]
        return sorted(found, key=lambda part: -np.nan_to_num(part.relative, nan=np.inf))


def compare_weights(
    a: Mapping[str, torch.Tensor],
    b: Mapping[str, torch.Tensor],
    *,
    frozen: Sequence[str] = (),
    moments: Mapping[str, torch.Tensor] | None = None,
    zero_gradients: Mapping[str, int] | None = None,
) -> Comparison:
    """Compare the tensors of two checkpoints, A the earlier.

    `frozen` are globs of parameters that must not move. `moments` is B's optimizer state by name
    (``parameter/exp_avg``) and `zero_gradients` for how many steps in a row before B a parameter
    had no gradient: with either, parameters that the optimizer updates elsewhere are told from
    parameters without gradient.
    """
    shared = [name for name in a if name in b]
    reshaped = [name for name in shared if a[name].shape != b[name].shape]
    changes = [_change(name, a[name], b[name]) for name in shared if name not in reshaped]
    changes.sort(key=lambda change: -np.nan_to_num(change.relative, nan=np.inf))
    only_a, only_b = tuple(sorted(set(a) - set(b))), tuple(sorted(set(b) - set(a)))
    flags = _flags(changes, frozen, moments or {}, zero_gradients or {})
    if only_a or only_b:
        flags.append(f"not the same model: {len(only_a)} tensors only in A, {len(only_b)} in B")
    if reshaped:
        flags.append(f"of another shape in B, so not compared: {name_some(reshaped)}")
    return Comparison(tuple(changes), only_a, only_b, tuple(flags))


def _change(name: str, a: torch.Tensor, b: torch.Tensor) -> Change:
    old, new = a.double().flatten(), b.double().flatten()
    norm = float(old.norm())
    both = norm * float(new.norm())
    return Change(
        name=name,
        group=module_group(name),
        buffer=name.endswith(BUFFERS),
        numbers=b.numel(),
        norm=norm,
        distance=float((new - old).norm()),
        cosine=float(old @ new) / both if both else float("nan"),
        largest=float((new - old).abs().max()) if len(old) else 0.0,
        sign_flips=float((old.sign() * new.sign() < 0).double().mean()) if len(old) else 0.0,
    )


def _flags(
    changes: Sequence[Change],
    frozen: Sequence[str],
    moments: Mapping[str, torch.Tensor],
    zero_gradients: Mapping[str, int],
) -> list[str]:
    flags = []
    parameters = [change for change in changes if not change.buffer]
    must_not = [c for c in parameters if any(fnmatchcase(c.name, glob) for glob in frozen)]
    kept = {c.name for c in must_not}
    trained = [c for c in parameters if c.name not in kept]
    static = [c for c in trained if not c.moved]
    if any(c.moved for c in must_not):
        moved = [c.name for c in must_not if c.moved]
        flags.append(f"frozen but moved: {name_some(moved)}")
    if trained and len(static) == len(trained):
        statistics = any(c.moved for c in changes if c.buffer)
        flags.append(
            "only BatchNorm statistics changed, no parameter did" if statistics else "no change"
        )
    elif static:
        flags.append(f"trainable but static: {name_some([c.name for c in static])}")
    stale = [c.name for c in static if _has_gradient(c.name, moments, zero_gradients)]
    if stale:
        flags.append(
            f"gradients arrive at parameters that do not move: {name_some(stale)}; the optimizer "
            "holds another copy of them (was it built before the model was copied or moved?), "
            "or the learning rate is 0, or so small that its steps vanish in the rounding of the "
            "weights"
        )
    broken = [c.name for c in changes if math.isnan(c.largest)]
    if broken:
        flags.append(f"not finite, or of another shape: {name_some(broken)}")
    return flags + _unrelated(parameters)


def _has_gradient(
    name: str, moments: Mapping[str, torch.Tensor], zero_gradients: Mapping[str, int]
) -> bool:
    average = moments.get(f"{name}/exp_avg")
    return zero_gradients.get(name) == 0 or (average is not None and bool(average.any()))


def _unrelated(parameters: Sequence[Change]) -> list[str]:
    """Whole parts whose direction has nothing of A's: replaced, and not trained from it."""
    parts: dict[str, list[Change]] = {}
    for change in parameters:
        if change.numbers >= _LEAST_NUMBERS and math.isfinite(change.cosine):
            parts.setdefault(change.name.partition(".")[0], []).append(change)
    lost = {part: [c.name for c in changes if is_unrelated(c)] for part, changes in parts.items()}
    found = [
        name
        for part, names in lost.items()
        if len(names) >= max(2, _WHOLE_PARTS * len(parts[part]))
        for name in names
    ]
    if not found:
        return []
    return [
        f"nothing in common with A: {name_some(found)}; re-initialised, loaded in part, or of "
        "another run"
    ]


def is_unrelated(change: Change) -> bool:
    """Two independent directions in n dimensions have a cosine of deviation 1 / sqrt(n)."""
    return abs(change.cosine) < 4 / math.sqrt(change.numbers)


def name_some(names: Sequence[str]) -> str:
    """How many tensors, and the parts of the model that they are in."""
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


def like_initialisation(
    model: Mapping[str, torch.Tensor], fresh: Mapping[str, torch.Tensor]
) -> tuple[tuple[str, ...], int]:
    """Parameters distributed as in a fresh initialisation of any seed, and of how many judged.

    A two-sample Kolmogorov-Smirnov test of each tensor of at least 256 numbers that are not all
    one number, on at most 20,000 of them.
    """
    judged, found = 0, []
    for name, value in fresh.items():
        if name not in model or value.numel() < _LEAST_NUMBERS or name.endswith(BUFFERS):
            continue
        if bool((value == value.flatten()[0]).all()):
            continue
        judged += 1
        mine, theirs = (_thin(tensor) for tensor in (model[name], value))
        if scipy.stats.ks_2samp(mine, theirs, method="asymp").pvalue > _KS_LEVEL:
            found.append(name)
    return tuple(found), judged


def _thin(tensor: torch.Tensor) -> npt.NDArray[np.float64]:
    flat = tensor.detach().flatten()
    thinned: npt.NDArray[np.float64] = flat[:: -(-len(flat) // _KS_SAMPLE)].double().cpu().numpy()
    return thinned
