"""Levels that are provably the same experiment, and why.

A rule rewrites a resolved configuration into a simpler one that trains the same model. Two
configurations are the same experiment when the rules bring them to the same form:

    same_experiment(one, two, rules=rules, workers=8)     # Sameness(reasons=(...)) or None

The rules are a recipe's own (its ability ``same_rules``). A new one is one function and one row. It
may rest on algebra only, never on "it usually makes no difference", and must say how exact it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SameRule:
    """One reason why configurations with different fields train the same model."""

    name: str
    is_exact: bool
    """Bit for bit; else up to the rounding of floating point, as another order of summation is."""
    why: str
    rewrite: Callable[[Config, int], Config]
    """(configuration, workers) -> fields to change; empty when the rule does not apply."""
    fields: frozenset[str]
    """All that it reads or rewrites: whatever sets none of them cannot change its answer."""


Rules = Sequence[SameRule]
"""In order: a later rule may rely on what an earlier one has rewritten."""


@dataclass(frozen=True, slots=True)
class Sameness:
    """Why two configurations are one experiment."""

    rules: tuple[SameRule, ...]

    @property
    def is_exact(self) -> bool:
        return all(rule.is_exact for rule in self.rules)

    @property
    def reasons(self) -> tuple[str, ...]:
        return tuple(f"{rule.name}: {rule.why}" for rule in self.rules)


def simplify(
    config: Config, *, rules: Rules, workers: int
) -> tuple[dict[str, Any], tuple[tuple[SameRule, frozenset[str]], ...]]:
    """The configuration's simplest form on a gang of `workers`, and (rule, fields it changed)."""
    simple = dict(config)
    trail = []
    for rule in rules:
        # A field that the recipe does not have stays absent.
        changes = {
            name: value
            for name, value in rule.rewrite(simple, workers).items()
            if name in simple and simple[name] != value
        }
        if changes:
            simple |= changes
            trail.append((rule, frozenset(changes)))
    return simple, tuple(trail)


def same_experiment(one: Config, two: Config, *, rules: Rules, workers: int) -> Sameness | None:
    """Why both configurations train the same model on a gang of `workers`; None if not provable.

    Equal configurations are the same without any rule. Leave out fields that do not matter (names,
    loader workers) before asking; `seed` matters.
    """
    simple_one, trail_one = simplify(one, rules=rules, workers=workers)
    simple_two, trail_two = simplify(two, rules=rules, workers=workers)
    if simple_one != simple_two:
        return None
    differing = {name for name in {*one, *two} if one.get(name) != two.get(name)}
    used = {rule.name for rule, fields in (*trail_one, *trail_two) if fields & differing}
    return Sameness(tuple(rule for rule in rules if rule.name in used))
