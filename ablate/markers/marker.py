"""What a marker is: a small dataclass with thresholds, a state, and ways of being fed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, fields
from typing import Any, ClassVar

from ablate.markers.event import Context, Event, Row


class Marker:
    """Base of all markers. A subclass is a dataclass in a file of its own in ``rules/``:

    - its ``init`` fields are the thresholds, which a study file may override;
    - its ``field(init=False)`` fields are the state: numbers, text, None, lists and dicts of
      them, or objects with ``state``/``load_state``. Together they must determine everything
      that follows, so that a run that was cut and resumed is judged as if it never was.

    ``start`` is called once before anything else. A marker reads only what ``reads`` names and
    says nothing about a row that lacks it.
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]]
    """Measurements it lives on; without any of them it is silent. ``rms/`` means all of a group."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Fields of the context without which it, or a part of it, is silent."""

    def start(self, context: Context) -> None:
        """Size the windows for the run."""

    def update(self, row: Row) -> Iterable[Event]:
        """Take in the row of one optimizer step."""
        return ()

    def evaluate(self, row: Row) -> Iterable[Event]:
        """Take in the row of one evaluation."""
        return ()

    def hear(self, told: Sequence[Event], row: Row) -> Iterable[Event]:
        """What all markers told of this row; answer with events, or with theirs revised."""
        return ()

    def finish(self, step: int) -> Iterable[Event]:
        """The run is over; tell what is still open."""
        return ()

    def state(self) -> dict[str, Any]:
        """JSON-able state."""
        return {item.name: _store(getattr(self, item.name)) for item in _state_fields(self)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from where ``state`` was taken; ``start`` has been called."""
        for item in _state_fields(self):
            held = getattr(self, item.name)
            if hasattr(held, "load_state"):
                held.load_state(state[item.name])
            else:
                setattr(self, item.name, _store(state[item.name]))


def _state_fields(marker: Any) -> list[Field[Any]]:
    return [item for item in fields(marker) if not item.init]


def _store(value: Any) -> Any:
    """A copy in plain types, so that neither side sees later changes of the other."""
    if hasattr(value, "state"):
        return value.state()
    if isinstance(value, dict):
        return {key: _store(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_store(item) for item in value]
    return value
