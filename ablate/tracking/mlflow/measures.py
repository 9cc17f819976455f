"""What is told of a row of measurements, and under which key.

MLflow's page makes a section of what stands before the slash, and a chart of every key: so a trial
has 25 keys at most. What belongs to single modules, and what is only for the markers, stays in the
trace, which is an artifact. Accuracies are told in per cent, because the page formats nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from ablate.study import Study
from ablate.trial.metrics import METRICS

_STEP = {
    "loss": "train/loss",
    "lr": "train/lr",
    "epoch": "train/epoch",
    "grad_norm": "train/grad_norm",
    "logit_scale": "train/logit_scale",
    "in_batch_accuracy": "train/in_batch_accuracy_pct",
    "scaler_scale": "stability/loss_scale",
    "samples_per_s": "system/samples_per_s",
}
_EVALUATION = {
    "recalibrated_top1": "eval/recalibrated_top1_pct",
    "bn_drift_max": "stability/bn_drift_max",
}
_WORST = {
    "stability/update_ratio_max": (max, ("update_ratio/",)),
    "stability/attention_logit_max": (max, ("attention_logits/",)),
    "stability/feature_std": (min, ("image_feature_std", "text_feature_std")),
    "stability/feature_rank": (min, ("image_feature_rank", "text_feature_rank")),
}
"""Key -> which of several measurements is told; a name with a slash at its end is a group's."""

_SYSTEM = "system/"
"""Measurements of the machine are called so where they are made."""

_CARD = re.compile(r"system/gpu_(\d+)_")

_PLACE = frozenset({"step", "attempt", "time", "samples"})
_MOST_OWN = 8
"""Measurements of one row that only its recipe knows: in the row's order."""

DIGITS = 4
"""Of a final number: the page shows all that there are."""


def short(number: float) -> float:
    """`number` with so many digits as people read; whole ones, which are counts, as they are."""
    return number if float(number).is_integer() else float(f"{number:.{DIGITS}g}")


@dataclass(frozen=True)
class Measures:
    """The keys of one study."""

    study: Study

    def of_step(self, row: Mapping[str, Any]) -> dict[str, float]:
        """A row of the trace."""
        return self._told(row, _STEP, "train/")

    def of_evaluation(self, row: Mapping[str, Any]) -> dict[str, float]:
        """A row of the evaluations; their epoch is the trace's business."""
        return self._told({k: v for k, v in row.items() if k != "epoch"}, _EVALUATION, "eval/")

    def of_machine(self, row: Mapping[str, Any]) -> dict[str, float]:
        """A row about the machine, which has no other measurements. Of several cards it tells the
        worst of each, without a number: the least used, the hottest."""
        told = {name: float(value) for name, value in row.items() if name.startswith(_SYSTEM)}
        if len({found[1] for name in told if (found := _CARD.match(name))}) < 2:
            return told
        of_cards: dict[str, list[float]] = {}
        for name, value in told.items():
            of_cards.setdefault(_CARD.sub(f"{_SYSTEM}gpu_", name), []).append(value)
        return {
            name: (min if name.endswith("gpu_utilization_percentage") else max)(values)
            for name, values in of_cards.items()
        }

    @cached_property
    def objective(self) -> str:
        """Key of the objective's curve."""
        return f"eval/{self.study.objective.metric}{self._ending}"

    @property
    def score(self) -> str:
        """Key of what a trial counts with."""
        return f"score{self._ending}"

    @property
    def best(self) -> str:
        """Key of a trial's best evaluation."""
        return f"best_{self.study.objective.metric}{self._ending}"

    @property
    def curves(self) -> tuple[str, ...]:
        """Keys of the curves that settings have, too."""
        return (self.objective, "train/loss", "train/grad_norm")

    @property
    def factor(self) -> float:
        """Of the objective, as it is told, over what is recorded."""
        return 100.0 if self._ending else 1.0

    @cached_property
    def _ending(self) -> str:
        return "_pct" if self.study.is_share(self.study.objective.metric) else ""

    def _told(
        self, row: Mapping[str, Any], known: Mapping[str, str], section: str
    ) -> dict[str, float]:
        numbers = {
            name: float(value) if math.isfinite(value) else math.nan  # infinity flattens a chart
            for name, value in row.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        told: dict[str, float] = {}
        own = 0
        for name, value in numbers.items():
            key = known.get(name)
            if key is not None:
                told[key] = 100 * value if key.endswith("_pct") else value
            elif self._is_own(name, section) and own < _MOST_OWN:
                own += 1
                share = self.study.is_share(name)
                told[f"{section}{name}{'_pct' if share else ''}"] = 100 * value if share else value
        of_parts: dict[str, list[float]] = {}
        for name, value in numbers.items():
            for key in _summed_up_in(name):
                of_parts.setdefault(key, []).append(value)
        for key, values in of_parts.items():
            worst, _ = _WORST[key]
            told[key] = math.nan if any(map(math.isnan, values)) else worst(values)
        waited, whole = numbers.get("data_time_s"), numbers.get("step_time_s")
        if waited is not None and whole:
            told["system/data_wait_percentage"] = 100 * waited / whole
        return told

    def _is_own(self, name: str, section: str) -> bool:
        """Whether nobody but the recipe knows this measurement, and it is not of a single part."""
        if section == "eval/" and self.study.describe(name) is not None:
            return True
        return name not in _PLACE and "/" not in name and name not in METRICS


@lru_cache(maxsize=10_000)  # the same few names in each of many thousand rows
def _summed_up_in(name: str) -> tuple[str, ...]:
    """Keys of the worst of parts that a measurement counts for."""
    return tuple(
        key
        for key, (_, names) in _WORST.items()
        if any(name.startswith(n) if n.endswith("/") else name == n for n in names)
    )
