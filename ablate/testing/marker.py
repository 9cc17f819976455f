"""The contract of a marker.

::

    class TestMine(ablate.testing.MarkerContract):
        marker = Mine

        def healthy(self):
            return Trace([{"step": k, "loss": 2.0} for k in range(1, 500)])

        def ill(self):
            return Trace([{"step": k, "loss": 2.0 + (k > 200)} for k in range(1, 500)])
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from ablate.markers import RULES, Context, Event, Marker, Thresholds, latest
from ablate.markers.event import ACCURACY, Row, layout_of

CUTS = 3
"""Places at which a run is cut and goes on from what the marker kept."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What a run measured, and what is known of it."""

    rows: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]] = ()
    context: Context = field(default_factory=Context)

    def in_order(self) -> Iterator[tuple[bool, Mapping[str, Any]]]:
        """(is it an evaluation, the row): each evaluation after the row of its step."""
        every = [(row["step"], False, row) for row in self.rows]
        every += [(row["step"], True, row) for row in self.evaluations]
        for _, evaluated, row in sorted(every, key=lambda item: item[:2]):
            accuracy = row.get(self.context.accuracy or "")
            yield evaluated, row if accuracy is None else {**row, ACCURACY: accuracy}


class MarkerContract:
    """What holds of every marker: a dataclass in a file of its own in ``ablate/markers/rules/``."""

    marker: ClassVar[type[Marker]]

    def healthy(self) -> Trace:
        """A run that measures all that the marker reads, and of which it says nothing."""
        raise NotImplementedError

    def ill(self) -> Trace:
        """A run of which it speaks."""
        raise NotImplementedError

    def test_it_is_found_and_says_what_it_is(self) -> None:
        """It lies in the file of its name, names what it reads, and is described."""
        assert self.marker in RULES, "a marker is a dataclass in ablate/markers/rules/"
        assert self.marker.__module__.endswith(f".{self.marker.name}")
        assert self.marker.reads and (self.marker.__doc__ or "").strip()
        known = {item.name for item in fields(Context)}
        assert set(self.marker.needs) <= known, "needs names fields of the context"

    def test_a_study_may_set_its_thresholds(self) -> None:
        """Each has a default, and is a key under ``markers`` in a study file."""
        made: Any = self.marker()
        given = {item.name: getattr(made, item.name) for item in fields(made) if item.init}
        assert json.loads(json.dumps(given, allow_nan=False)) == given
        assert Thresholds({self.marker.name: given}).to_dict() in (
            {},
            {self.marker.name: given},
        )

    def test_it_speaks_of_what_is_ill_alone(self) -> None:
        """An event, with its evidence as strict JSON and no earlier than its first step; none of a
        healthy run, and none of a run that measures nothing it reads."""
        assert self._told(self.healthy()) == []
        events = self._told(self.ill())
        assert events
        for event in events:
            assert event.marker == self.marker.name and event.message
            assert event.first_step <= event.last_step and event.first_step <= event.detected_at
            assert json.loads(json.dumps(event.to_dict(), allow_nan=False)) == event.to_dict()
            assert not event.stop or event.severity == "fatal"
        bare = [{"step": row["step"]} for row in self.ill().rows]
        assert self._told(Trace(bare, context=self.ill().context)) == []

    def test_a_run_that_was_cut_is_judged_as_if_it_never_was(self) -> None:
        """Its state goes through strict JSON at any step, and the same is told afterwards."""
        trace = self.ill()
        rows = list(trace.in_order())
        marker, told = self._made(trace), list[Event]()
        at = {len(rows) * part // (CUTS + 1) for part in range(1, CUTS + 1)}
        for place, (evaluated, row) in enumerate(rows):
            if place in at:
                state = json.loads(json.dumps(marker.state(), allow_nan=False))
                marker = self._made(trace)
                marker.load_state(state)
            told += _feed(marker, row, evaluated=evaluated)
        told += marker.finish(rows[-1][1]["step"])
        assert latest(told) == self._told(trace)

    def _told(self, trace: Trace) -> list[Event]:
        marker, told, step = self._made(trace), list[Event](), 0
        for evaluated, row in trace.in_order():
            told += _feed(marker, row, evaluated=evaluated)
            step = row["step"]
        return latest([*told, *marker.finish(step)])

    def _made(self, trace: Trace) -> Marker:
        marker = self.marker()
        marker.start(trace.context)
        return marker


def _feed(marker: Marker, values: Mapping[str, Any], *, evaluated: bool) -> Iterable[Event]:
    row = Row(int(values["step"]), values, layout_of(values))
    told = list(marker.evaluate(row) if evaluated else marker.update(row))
    return [*told, *marker.hear(told, row)]
