"""The markers over one run, live: rows in, events out, and whether the trial should end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ablate.markers.event import (
    ACCURACY,
    PRECEDENCE,
    Context,
    Event,
    Layout,
    Row,
    VerdictName,
    latest,
    layout_of,
)
from ablate.markers.rules import RULES
from ablate.markers.thresholds import Thresholds

VERSION = 13
"""Raised whenever a rule may judge the same trace differently."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Where and by which marker a trial was to be ended."""

    step: int
    marker: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a run is called, and why."""

    name: VerdictName
    flags: tuple[str, ...]
    """Labels of all events, in the order of their first occurrence."""
    marker: str | None
    """Whose event decided the name; None for STABLE."""
    first_step: int | None
    message: str
    stop: Stop | None
    counts: Mapping[str, int]
    """Marker -> number of events, for those that have any."""
    first_steps: Mapping[str, int]
    """Marker -> first step of its first event."""
    silent: tuple[str, ...]
    """Markers that none of the rows could feed."""
    thresholds: Mapping[str, Mapping[str, Any]]
    judged: bool = True
    """Whether there was anything to judge by: a row with a loss or a gradient norm."""
    version: int = VERSION

    @property
    def called(self) -> str:
        """The name; empty where nothing was judged."""
        return self.name if self.judged else ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


class Monitor:
    """Feeds rows through all rules. Rows come in the order of steps, each step once.

    An evaluation at step s comes after the row of step s and before that of step s + 1; then
    the live run and its replay say the same.
    """

    def __init__(
        self, thresholds: Thresholds | None = None, context: Context | None = None
    ) -> None:
        self.thresholds = thresholds or Thresholds()
        self.context = context or Context()
        self._rules = self.thresholds.rules()
        for rule in self._rules:
            rule.start(self.context)
        self._events: dict[tuple[str, str, str, int], Event] = {}
        self._stop: Stop | None = None
        self._step = 0
        self._seen: set[str] = set()
        self._layouts: dict[tuple[str, ...], Layout] = {}

    @property
    def stop(self) -> Stop | None:
        """Set once the trial should end."""
        return self._stop

    @property
    def events(self) -> list[Event]:
        """Everything so far, each event once, as last told."""
        return latest(self._events.values())

    def observe(self, values: Mapping[str, Any]) -> list[Event]:
        """Take in one row of step measurements; new events and known ones that changed."""
        row = self._row(values)
        found = [item for rule in self._rules for item in rule.update(row)]
        return self._accept(found, row) if found else found

    def evaluate(self, values: Mapping[str, Any]) -> list[Event]:
        """Take in one row of evaluation measurements."""
        accuracy = self.context.accuracy
        if accuracy is not None and accuracy in values:
            values = {**values, ACCURACY: values[accuracy]}
        row = self._row(values)
        found = [item for rule in self._rules for item in rule.evaluate(row)]
        return self._accept(found, row)

    def finish(self) -> list[Event]:
        """The run is over (not merely interrupted): events that were still open."""
        found = [item for rule in self._rules for item in rule.finish(self._step)]
        return self._accept(found, Row(self._step, {}))

    def missing(self) -> dict[str, list[str]]:
        """Marker -> inputs it never had; those of the context are written ``context.<name>``."""
        lacking = {}
        for rule in RULES:
            names = [name for name in rule.reads if name not in self._seen]
            names += [
                f"context.{name}" for name in rule.needs if getattr(self.context, name) is None
            ]
            if names:
                lacking[rule.name] = names
        return lacking

    def silent(self) -> tuple[str, ...]:
        """Markers without any input so far: their silence says nothing."""
        return tuple(rule.name for rule in RULES if not self._seen.intersection(rule.reads))

    def verdict(self) -> Verdict:
        """What the run must be called by what has been seen so far."""
        events = self.events
        flags: dict[str, None] = {}
        counts: dict[str, int] = {}
        first_steps: dict[str, int] = {}
        deciding: Event | None = None
        for item in events:
            if item.flag:
                flags.setdefault(item.flag)
            if "predicted_by" in item.evidence:
                flags.setdefault("PREDICTED")
            counts[item.marker] = counts.get(item.marker, 0) + 1
            first_steps.setdefault(item.marker, item.first_step)
            best = PRECEDENCE.index(deciding.verdict if deciding else "STABLE")
            if PRECEDENCE.index(item.verdict) < best:
                deciding = item
        judged = deciding is not None or not self._seen.isdisjoint(("loss", "grad_norm"))
        calm = "nothing unusual" if judged else "no row has a loss or a gradient norm"
        return Verdict(
            name=deciding.verdict if deciding else "STABLE",
            flags=tuple(flags),
            marker=deciding.marker if deciding else None,
            first_step=deciding.first_step if deciding else None,
            message=deciding.message if deciding else calm,
            stop=self._stop,
            counts=counts,
            first_steps=first_steps,
            silent=self.silent(),
            thresholds=self.thresholds.to_dict(),
            judged=judged,
        )

    def state(self) -> dict[str, Any]:
        """JSON-able; a monitor that loads it goes on as if there had been no interruption."""
        return {
            "version": VERSION,
            "thresholds": self.thresholds.to_dict(),
            "context": asdict(self.context),
            "step": self._step,
            "seen": sorted(self._seen),
            "stop": asdict(self._stop) if self._stop else None,
            "events": [item.to_dict() for item in self._events.values()],
            "rules": {rule.name: rule.state() for rule in self._rules},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``.

        Raises ValueError when it was written by other rules, thresholds or for another run;
        then a new monitor that is fed the trace up to the checkpoint takes its place.
        """
        mine = self.state()
        for part in ("version", "thresholds", "context"):
            if state.get(part) != mine[part]:
                raise ValueError(
                    f"state of the markers has {part} {state.get(part)!r}, but this run has "
                    f"{mine[part]!r}; feed the trace up to this step instead of the state"
                )
        self._step = state["step"]
        self._seen = set(state["seen"])
        self._stop = Stop(**state["stop"]) if state["stop"] else None
        events = [Event.from_dict(item) for item in state["events"]]
        self._events = {item.key: item for item in events}
        for rule in self._rules:
            rule.load_state(state["rules"][rule.name])

    def _row(self, values: Mapping[str, Any]) -> Row:
        names = tuple(values)
        layout = self._layouts.get(names)
        if layout is None:
            if len(self._layouts) > 64:  # rows of ever new shapes must not fill the memory
                self._layouts.clear()
            layout = self._layouts[names] = layout_of(names)
            self._seen.update(names)
            self._seen.update(f"{prefix}/" for prefix in layout)
        self._step = int(values["step"])
        return Row(self._step, values, layout)

    def _accept(self, found: list[Event], row: Row) -> list[Event]:
        """Let the markers answer to what was found, and keep what is new or was told anew."""
        if found:
            found = [*found, *(item for rule in self._rules for item in rule.hear(found, row))]
        told = []
        for item in {one.key: one for one in found}.values():
            if self._events.get(item.key) == item:
                continue
            self._events[item.key] = item
            told.append(item)
            if item.stop and self._stop is None:
                self._stop = Stop(self._step, item.marker)
        return told
