"""The marker of parameters, and whole towers, that get no gradient."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from ablate.markers.event import Event, Row, event
from ablate.markers.marker import Marker

_NAMED = 20  # names listed in one event; the rest is counted


@dataclass
class DeadGradient(Marker):
    """Parameters whose gradient has been exactly zero for ``least`` steps.

    ``zero_grad_steps/<parameter>`` counts steps in a row with a zero or missing gradient, but for
    steps in which the recipe holds the parameter still on purpose (``Learner.frozen``). The first
    ``grace`` steps are free: a ResNet that begins with zero scales on its residual branches gives
    their weights their first gradients late.

    A tower (all measured ``grad_norm/<tower>.<part>`` of one first name) whose norms have been
    exactly zero for ``least`` steps is cut off from the loss: the run is DEGRADED, until it gets
    a gradient again. Parameters that are locked on purpose have no norm at all. And so is a run
    whose whole ``grad_norm`` is exactly zero for ``least`` rows: nothing is learnt from one pair
    a batch, or from a loss that is constant.
    """

    name: ClassVar[str] = "dead_gradient"
    reads: ClassVar[tuple[str, ...]] = ("zero_grad_steps/", "grad_norm/", "grad_norm")

    least: int = 50
    grace: int = 10

    dead: dict[str, int] = field(default_factory=dict, init=False)
    """Parameter -> step at which its gradient vanished."""
    towers: dict[str, list[int]] = field(default_factory=dict, init=False)
    """Tower without a gradient -> first step of that, and whether it was told."""

    def update(self, row: Row) -> Iterable[Event]:
        norm = row.finite("grad_norm")
        nothing = [] if norm is None else self._watch("the model", norm, row.step, "NO_GRADIENT")
        return [*nothing, *self._parameters(row), *self._towers(row)]

    def _towers(self, row: Row) -> Iterable[Event]:
        norms: dict[str, float] = {}
        for group, norm in row.group("grad_norm"):
            tower, dot, _ = group.partition(".")
            if dot:
                norms[tower] = max(norms.get(tower, 0.0), norm)
        for tower, norm in norms.items():
            yield from self._watch(tower, norm, row.step, f"DEAD_TOWER({tower})")

    def _watch(self, tower: str, norm: float, step: int, flag: str) -> Iterable[Event]:
        """Tell a tower that has had no gradient for long, and that it has one again."""
        first, told = self.towers.get(tower, [step, 0])
        if norm > 0.0:
            self.towers.pop(tower, None)
            if told:
                yield self._tell_tower(tower, first, step, flag, alive=True)
        elif step <= self.grace:
            return
        elif step - first < self.least or told:
            self.towers[tower] = [first, told]
        else:
            self.towers[tower] = [first, 1]
            yield self._tell_tower(tower, first, step, flag, alive=False)

    def _tell_tower(self, tower: str, first: int, step: int, flag: str, *, alive: bool) -> Event:
        return event(
            self.name,
            kind="tower",
            quantity="grad_norm" if flag == "NO_GRADIENT" else f"grad_norm/{tower}",
            first_step=first,
            last_step=step,
            detected_at=step,
            verdict="STABLE" if alive else "DEGRADED",
            severity="info" if alive else "severe",
            flag=flag,
            message=f"{tower} got no gradient from step {first} on"
            + (f", until step {step}" if alive else ""),
        )

    def _parameters(self, row: Row) -> Iterable[Event]:
        fresh: dict[str, int] = {}
        for name, steps in row.group("zero_grad_steps"):
            since = max(row.step - int(steps), self.grace)
            if row.step - since < self.least:
                self.dead.pop(name, None)
            elif name not in self.dead:
                fresh[name] = self.dead[name] = since + 1
        if not fresh:
            return ()
        names = sorted(fresh)
        what = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more parameters"
        return [
            event(
                self.name,
                kind="zero",
                quantity="zero_grad_steps",
                first_step=min(fresh.values()),
                last_step=row.step,
                detected_at=row.step,
                severity="warning",
                flag=f"DEAD_PARAM({_common(names)})",
                message=f"no gradient for {self.least} steps: {what}",
                parameters=names[:_NAMED],
                count=len(names),
            )
        ]


def _common(names: list[str]) -> str:
    """A name, or the module that all names share followed by a star."""
    if len(names) == 1:
        return names[0]
    shared = []
    for parts in zip(*(name.split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join([*shared, "*"])
