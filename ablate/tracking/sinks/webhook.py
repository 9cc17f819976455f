"""Messages to a chat: a POST for what a person wants to know at once, each told once.

Told are: the study has ended, a trial diverged, the study is stuck, its budget is spent, trials
were preempted. The address says in which shape: Slack's and Mattermost's ``text``, Discord's
``content``, ntfy's ``topic`` and ``message``, or all that is known as plain JSON.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

from ablate.errors import TrackingError
from ablate.runner.status import StudyStatus

Shape = Literal["slack", "discord", "ntfy", "json"]

SHAPES: tuple[Shape, ...] = ("slack", "discord", "ntfy", "json")
SCHEMES = (
    "https", "http", *(f"{shape}+{kind}" for shape in SHAPES for kind in ("https", "http"))
)  # fmt: skip

_HOSTS: Mapping[str, Shape] = {
    "hooks.slack.com": "slack",
    "discord.com": "discord",
    "discordapp.com": "discord",
    "ntfy.sh": "ntfy",
}
_TIMEOUT_S = 10.0
_LONGEST = 1900
"""Characters of a message; Discord takes 2000."""


@dataclass(frozen=True, slots=True)
class Message:
    """What is told."""

    event: Literal["decided", "ended", "diverged", "stuck", "budget", "preempted"]
    study: str
    text: str


def open(url: str) -> Webhook:
    """The webhook at `url`, whose scheme or host says the shape.

    Raises:
        TrackingError: the address has no host, or ntfy's no topic.
    """
    shape, address = shape_of(url)
    parts = urlsplit(address)
    if not parts.hostname or (shape == "ntfy" and not parts.path.strip("/")):
        wanted = "https://ntfy.sh/TOPIC" if shape == "ntfy" else "https://HOST/PATH"
        raise TrackingError(f"notify: the address is not complete; write {wanted}")
    return Webhook(address, shape)


def shape_of(url: str) -> tuple[Shape, str]:
    """The shape of its messages and the address alone: ``slack+https://...`` names it, known hosts
    are known, all others take plain JSON."""
    scheme, _, rest = url.partition("://")
    named, plus, kind = scheme.partition("+")
    if plus:
        return next(shape for shape in SHAPES if shape == named), f"{kind}://{rest}"
    return _HOSTS.get(urlsplit(url).hostname or "", "json"), url


def news(before: StudyStatus, now: StudyStatus) -> list[Message]:
    """What happened between two statuses of a launch."""

    def told(event: Any, text: str) -> Message:
        return Message(event, now.name, f"{now.name}: {text}"[:_LONGEST])

    found = []
    diverged = now.outcomes.get("diverged", 0) - before.outcomes.get("diverged", 0)
    if diverged > 0:
        number = "a trial" if diverged == 1 else f"{diverged} trials"
        found.append(told("diverged", f"{number} diverged; {_standing(now)}"))
    if now.preempted > before.preempted:
        number = f"{now.preempted - before.preempted} attempts"
        found.append(told("preempted", f"{number} preempted; they go on from their checkpoints"))
    if now.stuck and not before.stuck:
        found.append(told("stuck", f"nothing can go on now: {now.stuck}"))
    if now.over_budget and not before.over_budget:
        found.append(told("budget", f"the budget is spent; {_standing(now)}"))
    if now.controller == "absent" and before.controller != "absent":
        if now.num_ended >= now.num_trials:
            found.append(told("decided", f"decided; {_standing(now)}. Next: ablate report"))
        else:
            found.append(told("ended", f"left before its end; {_standing(now)}"))
    return found


def _standing(status: StudyStatus) -> str:
    counts = ", ".join(f"{count} {name}" for name, count in sorted(status.outcomes.items()))
    return f"{status.num_ended} of {status.num_trials} trials ended ({counts or 'none'})"


def body(message: Message, shape: Shape, *, topic: str = "") -> dict[str, Any]:
    """The JSON of a message, as each service documents it."""
    if shape == "slack":
        return {"text": message.text}
    if shape == "discord":
        return {"content": message.text}
    if shape == "ntfy":
        title = f"ablate: {message.event}"
        return {"topic": topic, "title": title, "message": message.text}
    return {"event": message.event, "study": message.study, "text": message.text}


class Webhook:
    """Sends what is new; what could not be sent is tried again with the next status."""

    def __init__(self, address: str, shape: Shape, *, timeout_s: float = _TIMEOUT_S) -> None:
        self._shape = shape
        self._topic = ""
        if shape == "ntfy":  # JSON goes to the server's root, which finds the topic in it
            parts = urlsplit(address)
            self._topic = parts.path.strip("/")
            address = urlunsplit((parts.scheme, parts.netloc, "/", "", ""))
        self._address = address
        self._timeout_s = timeout_s
        self._first: StudyStatus | None = None
        self._before: StudyStatus | None = None
        self._unsent: list[Message] = []

    def update(self, status: StudyStatus) -> None:
        self._first = self._first or status
        for message in news(self._before or status, status):
            # A study that had ended before this launch is no news.
            if message.event != "decided" or status.num_ended > self._first.num_ended:
                self._unsent.append(message)
        self._before = status
        while self._unsent:
            self._send(self._unsent[0])
            self._unsent.pop(0)

    def close(self) -> None:
        """Nothing is held open."""

    def _send(self, message: Message) -> None:
        content = json.dumps(body(message, self._shape, topic=self._topic)).encode()
        request = urllib.request.Request(
            self._address, content, {"Content-Type": "application/json", "User-Agent": "ablate"}
        )
        with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:
            answer.read(1024)
