"""What goes into the markers and what comes out: a row, the run's context, an event.

An event is told when its evidence suffices and told again, with the same key, when it ends
or its consequences are known (a spike that did not recover). Readers keep the last telling.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Severity = Literal["info", "warning", "severe", "fatal"]
VerdictName = Literal["NUMERIC_FAIL", "DIVERGED", "COLLAPSED", "DEGRADED", "SPIKY", "STABLE"]

PRECEDENCE: tuple[VerdictName, ...] = (
    "NUMERIC_FAIL",
    "DIVERGED",
    "COLLAPSED",
    "DEGRADED",
    "SPIKY",
    "STABLE",
)
"""Worst first; a run is called by the worst thing that any of its events argues for."""

_SEVERITY: dict[VerdictName, Severity] = {
    "NUMERIC_FAIL": "fatal",
    "DIVERGED": "fatal",
    "COLLAPSED": "severe",
    "DEGRADED": "severe",
    "SPIKY": "warning",
    "STABLE": "info",
}


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened in a run, with the evidence for it."""

    marker: str
    first_step: int
    last_step: int
    severity: Severity
    evidence: Mapping[str, Any]
    """Always has ``kind`` (which rule of the marker) and ``quantity`` (what was read)."""
    detected_at: int
    """Optimizer step at which the evidence sufficed."""
    message: str
    verdict: VerdictName = "STABLE"
    """What the run must at least be called because of this event."""
    flag: str = ""
    """Orthogonal label for the run, e.g. SATURATED."""
    stop: bool = False
    """The trial should end now; only ever true for a fatal event."""

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What makes it the same event when it is told again."""
        evidence = self.evidence
        return (self.marker, str(evidence["kind"]), str(evidence["quantity"]), self.first_step)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; the form of a line in events.jsonl."""
        return {
            "marker": self.marker,
            "first_step": self.first_step,
            "last_step": self.last_step,
            "severity": self.severity,
            "evidence": dict(self.evidence),
            "detected_at": self.detected_at,
            "message": self.message,
            "verdict": self.verdict,
            "flag": self.flag,
            "stop": self.stop,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Event:
        """The event that ``to_dict`` wrote."""
        return cls(**data)

    def revised(self, *, evidence: Mapping[str, Any] | None = None, **changes: Any) -> Event:
        """The same event told again: evidence is added, other fields are replaced."""
        merged = {**self.evidence, **_plain(evidence or {})}
        return replace(self, evidence=merged, **changes)


def event(
    marker: str,
    *,
    kind: str,
    quantity: str,
    first_step: int,
    last_step: int,
    detected_at: int,
    message: str,
    verdict: VerdictName = "STABLE",
    severity: Severity | None = None,
    flag: str = "",
    stop: bool = False,
    **evidence: Any,
) -> Event:
    """Build an event; its severity follows from the verdict it argues for unless given."""
    return Event(
        marker=marker,
        first_step=first_step,
        last_step=last_step,
        severity=severity or _SEVERITY[verdict],
        evidence={"kind": kind, "quantity": quantity, **_plain(evidence)},
        detected_at=detected_at,
        message=message,
        verdict=verdict,
        flag=flag,
        stop=stop,
    )


def latest(events: Iterable[Event]) -> list[Event]:
    """Each event once, as it was last told, in the order of first steps."""
    by_key = {item.key: item for item in events}
    return sorted(by_key.values(), key=lambda item: (item.first_step, item.detected_at, item.key))


def event_key(line: Mapping[str, Any]) -> tuple[str, str, str, int]:
    """``Event.key`` of a line of events.jsonl."""
    evidence = line["evidence"]
    return (line["marker"], str(evidence["kind"]), str(evidence["quantity"]), line["first_step"])


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Evidence without numpy types and non-finite floats, which JSON cannot hold."""
    return {key: _plain_value(value) for key, value in values.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, float):  # np.float64 is one too
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return _plain(value)
    if isinstance(value, list | tuple):
        return [_plain_value(item) for item in value]
    return value


ACCURACY = "accuracy"
"""How the rules read what ``Context.accuracy`` names."""

UNIFORM = 6.9
"""Nat, the loss of uniform logits over a batch of 1,000."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What the rules must know about a run beside its rows. Unknown is None, never a guess."""

    global_batch: int | None = None
    """Samples whose logits share one softmax (per-worker batch x workers x accumulation):
    uniform CLIP logits give a loss of exactly ln(global_batch) nat."""
    warmup: int = 0
    """Steps of learning-rate warm-up."""
    steps_total: int | None = None
    """Planned optimizer steps. Windows of a run too short for the published ones shrink."""
    row_interval: int = 1
    """Optimizer steps between two rows; above 1 only for logs that were made elsewhere."""
    accuracy: str | None = None
    """Measurement of the evaluations whose collapse is a fault: a fraction of images."""
    chance_top1: float | None = None
    """That accuracy by guessing: 1 / number of classes."""
    eval_images: int | None = None
    """Images per evaluation, where evaluation rows do not say it."""
    feature_dim: int | None = None
    """Width of the joint embedding."""
    uniform_loss: float | None = None
    """Loss of a model that says nothing, where that is not ln(global_batch)."""
    in_nats: bool = True
    """The loss is a cross entropy. Of another loss thresholds in nat say nothing: they are then
    taken in shares of where the loss began, as if that had been ``UNIFORM`` nat."""

    @property
    def chance_loss(self) -> float | None:
        """Loss of a model that says nothing; in nat, where the loss is."""
        if self.uniform_loss is not None:
            return self.uniform_loss
        if self.global_batch is None or self.global_batch < 2:
            return None
        return math.log(self.global_batch)

    @property
    def rows_total(self) -> int | None:
        """Rows that a complete run leaves."""
        if self.steps_total is None:
            return None
        return max(1, self.steps_total // self.row_interval)

    @property
    def settled(self) -> int:
        """Step after which a run must have begun to learn.

        Twice the warm-up; where that is more than half of the run, the half, but never
        before the warm-up is over.
        """
        late = 2 * self.warmup
        if self.steps_total is None:
            return late
        return min(late, max(self.warmup, self.steps_total // 2))

    def rows(self, full: int, *, share: float, least: int) -> int:
        """A window of ``full`` rows, or ``share`` of a shorter run.

        It is at least ``least`` rows, unless that is more than a quarter of the run.
        """
        if self.rows_total is None:
            return full
        floor = min(least, self.rows_total // 4)
        return max(1, min(full, max(int(share * self.rows_total), floor)))

    def hold(self, full: int, *, share: float, least: int) -> int:
        """Like ``rows``, for how long something must last that condemns a run.

        Never below 20 rows: a run of a few steps has had no time to learn, and nothing can be
        held against it.
        """
        return max(self.rows(full, share=share, least=least), min(full, 20))

    def near(self, steps: int) -> int:
        """How many rows apart two rows are that lie ``steps`` optimizer steps apart."""
        return max(1, round(steps / self.row_interval))


Layout = Mapping[str, Sequence[tuple[str, str]]]


@dataclass(slots=True)
class Row:
    """One measured row. Reads numbers by name; absent, null and unreadable ones are None."""

    step: int
    values: Mapping[str, Any]
    layout: Layout = field(default_factory=dict)
    """Names by their part before the slash -> (part after it, full name)."""

    def get(self, name: str) -> float | None:
        """The number, possibly non-finite."""
        return number(self.values.get(name))

    def finite(self, name: str) -> float | None:
        """The number if it is finite: what may enter a window."""
        value = number(self.values.get(name))
        return value if value is not None and math.isfinite(value) else None

    def group(self, prefix: str) -> list[tuple[str, float]]:
        """Finite numbers of all names ``prefix/<part>`` as (part, number)."""
        found = []
        for part, name in self.layout.get(prefix, ()):
            value = number(self.values[name])
            if value is not None and math.isfinite(value):
                found.append((part, value))
        return found


def number(value: Any) -> float | None:
    """A float from what a record holds; text is read as JSON-safe "NaN" and "Infinity" are, and as
    C's library on Windows prints them."""
    if type(value) is float:
        return value
    if value is None:
        return None
    try:
        return float(value)
    except OverflowError:  # a whole number beyond every float
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError):
        text = str(value).strip().lower()
        found = _WINDOWS.get(text.lstrip("+-").rstrip("0"))
        return -found if found and text.startswith("-") else found


_WINDOWS = {
    "1.#inf": math.inf,
    **dict.fromkeys(("nan(ind)", "nan(snan)", "1.#qnan", "1.#ind", "1.#snan"), math.nan),
}


def layout_of(names: Iterable[str]) -> Layout:
    """Grouped names of a row, see ``Row.layout``."""
    grouped: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        prefix, slash, part = name.partition("/")
        if slash:
            grouped.setdefault(prefix, []).append((part, name))
    return grouped
