"""What `ablate watch` shows: a study's trials, their curves, and what the markers see."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from ablate.api import Run
from ablate.cli.chart import Line, draw
from ablate.cli.display import PlainWatch, render_status
from ablate.records.folder import TrialRecord
from ablate.runner.status import Running, StudyStatus

_PAUSE_S = 2.0
_MOST_CURVES = 6
"""Trials that are drawn side by side."""
_MOST_EVENTS = 6
_LOUD = {"fatal": "red", "severe": "red", "warning": "yellow"}


def follow(opened: Run, chosen: str | None, *, once: bool, console: Console) -> None:
    """Show a study, or one trial of it, until nobody runs it; `once`: as it is now."""
    status = opened.status()
    if once or status.controller == "absent":
        console.print(_screen(opened, status, chosen, console.width))
        return
    if not console.is_terminal:
        plain = PlainWatch(console)
        seen: set[tuple[str, str, int]] = set()
        for status in _statuses(opened):
            plain(status)
            for event in _events(opened, status, chosen):
                if event.key not in seen:
                    seen.add(event.key)
                    console.print(f"event   {event}", markup=False, soft_wrap=True)
        return
    with Live(console=console, auto_refresh=False, screen=False) as live:
        for status in _statuses(opened):
            live.update(_screen(opened, status, chosen, console.width), refresh=True)


def screen_of(opened: Run, chosen: str | None, *, width: int) -> RenderableType:
    """The screen as it is now."""
    return _screen(opened, opened.status(), chosen, width)


def _statuses(opened: Run, pause: Callable[[float], None] = time.sleep) -> Iterator[StudyStatus]:
    """The study again and again until nobody runs it; a large one is read less often."""
    while True:
        begun = time.monotonic()
        status = opened.status()
        yield status
        if status.controller == "absent":
            return
        pause(max(_PAUSE_S, 5 * (time.monotonic() - begun)))


def _screen(opened: Run, status: StudyStatus, chosen: str | None, width: int) -> RenderableType:
    head = Text.assemble((status.name, "bold"), f": controller {status.controller}")
    parts: list[RenderableType] = [head, render_status(status, width=width)]
    parts += _curves(opened, _shown(opened, status, chosen), width)
    events = _events(opened, status, chosen)
    parts += [Text(str(event), style=_LOUD.get(event.severity, "dim")) for event in events]
    return Group(*parts)


def _shown(opened: Run, status: StudyStatus, chosen: str | None) -> list[tuple[str, TrialRecord]]:
    """What is drawn, with its name: the chosen trial, else those that run."""
    if chosen is not None:
        return [(opened.names()[chosen], opened.record.record(chosen))]
    running = status.running[:_MOST_CURVES]
    return [(_name(trial), opened.record.record(trial.trial_id)) for trial in running]


def _name(trial: Running) -> str:
    return f"{trial.name} · seed {trial.seed}"


def _curves(
    opened: Run, shown: Sequence[tuple[str, TrialRecord]], width: int
) -> list[RenderableType]:
    metric = opened.study.objective.metric
    losses, scores, norms = [], [], []
    for name, record in shown:
        trace = record.trace()
        losses.append(Line.of(name, trace, "loss"))
        norms.append(Line.of(name, trace, "grad_norm"))
        scores.append(Line.of(name, record.evaluations(), metric))
    drawn = [("loss", losses), (metric, scores)]
    if len(shown) == 1:
        drawn.append(("grad_norm", norms))
    return [
        draw(title, [line for line in lines if line.points], width=width)
        for title, lines in drawn
        if any(line.points for line in lines)
    ]


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a marker saw in a trial."""

    trial_id: str
    name: str
    marker: str
    first_step: int
    severity: str
    message: str

    @property
    def key(self) -> tuple[str, str, int]:
        return self.trial_id, self.marker, self.first_step

    def __str__(self) -> str:
        return f"{self.name}: {self.marker} at step {self.first_step}: {self.message}"


def _events(opened: Run, status: StudyStatus, chosen: str | None) -> list[_Seen]:
    """The last events of each trial that is watched, the chosen one's or those of all that run."""
    if chosen is not None:
        watched = [(chosen, opened.names()[chosen])]
    else:
        watched = [(trial.trial_id, _name(trial)) for trial in status.running if trial.num_events]
    return [
        _Seen(key, name, e["marker"], e["first_step"], e["severity"], e["message"])
        for key, name in watched
        for e in opened.record.record(key).events()[-_MOST_EVENTS:]
    ]
