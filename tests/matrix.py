"""The kinds of studies there are: every design with what it may be combined with.

A study of the matrix is a design and a set of `OPTIONS`. `trouble` says of a combination that
makes no sense what `check` answers; `covering` chooses few studies in which every two things that
may go together do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

TARGET = "target: {beta2: '0.98', wd: '0.1'}"
FRACTIONS = ("fractional_factorial", "plackett_burman")
DESIGNS = {
    "one_at_a_time": "name: one_at_a_time",
    "full_factorial": "name: full_factorial",
    "fractional_factorial": "name: fractional_factorial, resolution: III",
    "plackett_burman": "name: plackett_burman, fold_over: false",
    "leave_one_out": f"name: leave_one_out, {TARGET}",
    "ablation_path": f"name: ablation_path, {TARGET}",
    "search": "name: search, cells: 4, sampler: random",
}
OPTIONS = (
    "nuisance", "controls", "sequential", "prune", "warm_start", "cost", "diverging", "failed",
    "two",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Kind:
    """One study of the matrix."""

    design: str
    options: frozenset[str]

    def __str__(self) -> str:
        return "-".join([self.design, *sorted(self.options)])

    def text(self, name: str = "kind") -> str:
        """The study file."""
        has = self.options.__contains__
        design = DESIGNS[self.design]
        design += ", prune: {rungs: [0.5]}" if has("prune") else ""
        design += ", warm_start: [runs/earlier]" if has("warm_start") else ""
        seeds = "{min: 2, max: 3, until: decided}" if has("sequential") else "[0, 1]"
        lines = [
            f"name: {name}",
            "recipe: openclip",
            "baseline: {model: tiny-rn-a, train_data: t.tar, train_num_samples: 640,",
            "  imagenet_val: val, precision: fp32, warmup: 2, batch_size: 64, epochs: 1}",
            "factors:",
            "  beta2: [0.999, 0.98]",
            "  wd: [0.2, 0.1]",
            *(["  eps: [1.0e-8, 1.0e-6]"] if self.design in FRACTIONS else []),
            f"design: {{{design}}}",
            f"seeds: {seeds}",
            f"objective: {{margin: 0.02{', cost: num_parameters' if has('cost') else ''}}}",
        ]
        if has("nuisance"):
            lines.append("nuisance: {settings: {lr: [5.0e-4, 1.0e-3]}, seeds: [9]}")
        if has("controls"):
            lines.append("controls: {wd: ['0.1']}")
        return "\n".join(lines) + "\n"

    def rules(self) -> list[dict[str, Any]]:
        """What its trials do: beta2=0.98 is better, wd=0.1 a little worse, but for their noise."""
        rules: list[dict[str, Any]] = []
        if "failed" in self.options:
            rules.append({"match": {"beta2": 0.98, "seed": 1}, "crashes": 99})
        if "diverging" in self.options:
            rules.append({"match": {"wd": 0.1}, "status": "diverged", "value": 0.7})
        for beta2, early in ((0.999, 0.6), (0.98, 0.62)):
            said = {"verdict": "STABLE", "num_parameters": 1000 if beta2 > 0.99 else 1400}
            rules.append(
                {"match": {"beta2": beta2}, "steps": 10, "evals": {"5": early}, "value": 0.7,
                 "result": said}
            )  # fmt: skip
        rules += [
            {"match": {"beta2": 0.98}, "adds": 0.05},
            {"match": {"wd": 0.1}, "adds": -0.012},
            {"match": {"lr": 5e-4}, "adds": -0.03},
            {"match": {"eps": 1e-6, "seed": 0}, "adds": 0.004},
            {"match": {"beta2": 0.98, "seed": 1}, "adds": 0.003},
            {"match": {"wd": 0.1, "seed": 2}, "adds": 0.002},
        ]
        return rules


def trouble(kind: Kind) -> str | None:
    """A part of what `check` answers to a combination that makes no sense; None where it does."""
    has = kind.options.__contains__
    if kind.design != "search" and has("prune"):
        return "prune"
    if kind.design != "search" and has("warm_start"):
        return "warm_start"
    if kind.design == "search" and has("nuisance"):
        return "a search chooses among all settings by itself"
    if kind.design in ("search", "ablation_path") and has("sequential"):
        return "compares cells over all their seeds"
    if has("prune") and has("cost"):
        return "runs are compared by their score alone"
    return None


def everything() -> list[Kind]:
    subsets = [
        frozenset(name for name, on in zip(OPTIONS, chosen, strict=True) if on)
        for chosen in product((False, True), repeat=len(OPTIONS))
    ]
    return [Kind(design, options) for design in DESIGNS for options in subsets]


def allowed() -> list[Kind]:
    return [kind for kind in everything() if trouble(kind) is None]


def covering(kinds: Sequence[Kind]) -> list[Kind]:
    """A few of `kinds`, so that every two things that go together in one of them do in one chosen:
    greedily, the one with the most new pairs first, and the smaller of two that are equal."""
    left = {pair for kind in kinds for pair in _pairs(kind)}
    chosen = []
    while left:
        best = max(kinds, key=lambda kind: (len(left & _pairs(kind)), -len(kind.options)))
        chosen.append(best)
        left -= _pairs(best)
    return chosen


def _pairs(kind: Kind) -> set[frozenset[str]]:
    return {frozenset(pair) for pair in combinations(_things(kind), 2)}


def _things(kind: Kind) -> Iterable[str]:
    return (kind.design, *sorted(kind.options))
