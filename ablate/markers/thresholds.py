"""Thresholds of the markers, as a study file overrides them.

markers:
  loss_spike: {sigma: 4.0}
  divergence: {stop: false}     # label it, but let the trial run on
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ablate.errors import AblateError, suggest
from ablate.markers.marker import Marker
from ablate.markers.rules import RULES

_MAY_BE_ZERO = frozenset({"ignore_first", "grace", "begin"})
_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
}
_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}


class ThresholdError(AblateError, ValueError):
    """An unknown marker or threshold, or a value that is none."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What differs from the rules' defaults: marker -> threshold -> value. Checked when built."""

    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for place, message in check_thresholds(self.overrides):
            raise ThresholdError(f"markers.{'.'.join(place)}: {message}")

    def rules(self) -> list[Marker]:
        """A fresh rule of each kind, in the order of ``RULES``."""
        return [rule(**self.overrides.get(rule.name, {})) for rule in RULES]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return {marker: dict(values) for marker, values in self.overrides.items()}


def check_thresholds(overrides: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """What is wrong with overrides, as (place below ``markers``, message)."""
    rules = {rule.name: rule for rule in RULES}
    for marker, values in overrides.items():
        rule = rules.get(marker)
        if rule is None:
            yield (str(marker),), f"no such marker; {suggest(str(marker), rules)}"
            continue
        if not isinstance(values, Mapping):
            yield (marker,), f"must map thresholds to values, not {values!r}"
            continue
        known = threshold_types(rule)
        for name, value in values.items():
            if name not in known:
                yield (marker, str(name)), f"no such threshold; {suggest(str(name), known)}"
            elif problem := _problem(name, known[name], value):
                yield (marker, name), problem


def threshold_types(rule: type[Marker]) -> dict[str, str]:
    """The thresholds of a rule with the names of their types."""
    return {item.name: str(item.type) for item in fields(rule) if item.init}  # type: ignore[arg-type]


def describe_thresholds() -> dict[str, dict[str, Any]]:
    """Every threshold with its default: marker -> threshold -> value."""
    return {
        rule.name: {item.name: item.default for item in fields(rule) if item.init}  # type: ignore[arg-type]
        for rule in RULES
    }


def thresholds_schema() -> dict[str, Any]:
    """JSON schema of the ``markers`` block, for editors."""
    words = {"int": "integer", "float": "number", "bool": "boolean", "str": "string"}
    defaults = describe_thresholds()
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            rule.name: {
                "type": "object",
                "description": (rule.__doc__ or "").strip().split("\n\n")[0],
                "additionalProperties": False,
                "properties": {
                    name: {"type": words[kind], "default": defaults[rule.name][name]}
                    for name, kind in threshold_types(rule).items()
                },
            }
            for rule in RULES
        },
    }


def _problem(name: str, kind: str, value: Any) -> str:
    wrong_type = not isinstance(value, _KINDS[kind])
    if wrong_type or (kind != "bool" and isinstance(value, bool)):
        return f"must be {_WORDS[kind]}, not {value!r}"
    if kind == "int" and value < (0 if name in _MAY_BE_ZERO else 1):
        return f"must be at least {0 if name in _MAY_BE_ZERO else 1}, not {value!r}"
    if kind == "float" and not (math.isfinite(value) and value >= 0.0):
        return f"must be a finite number of at least 0, not {value!r}"
    return ""
