"""What happens to a study reaches a chat, each once; a chat that is away costs nothing."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from scripted_studies import STUDY, prepare, run

from ablate.errors import StudyError, TrackingError
from ablate.runner.status import StudyStatus
from ablate.study import parse_study
from ablate.testing import SinkContract
from ablate.tracking.sinks import open_sink, telling
from ablate.tracking.sinks.webhook import body, news, shape_of


class Chat:
    """A real HTTP server on this machine; what was posted to it, as (path, JSON)."""

    def __init__(self, *, answer: int = 200, hangs: bool = False) -> None:
        self.posts: list[tuple[str, dict[str, Any]]] = []
        self.answer = answer
        self.arrived = threading.Event()
        self.release = threading.Event()
        chat = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                chat.arrived.set()
                if hangs:
                    chat.release.wait(60)
                chat.posts.append((self.path, json.loads(content)))
                self.send_response(chat.answer)
                self.end_headers()

            def log_message(self, *given: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@contextmanager
def chat(**how: Any) -> Iterator[Chat]:
    found = Chat(**how)
    thread = threading.Thread(target=found.server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield found
    finally:
        found.release.set()
        found.server.shutdown()
        found.server.server_close()
        thread.join()


BEFORE = StudyStatus(
    name="s", metric="top1", controller="running", num_trials=4, outcomes={"completed": 1},
    waiting=2, running=(), worker_hours=0.0, eta_s=None,
)  # fmt: skip


class TestWebhook(SinkContract):
    """A webhook is a sink."""

    url = "http://127.0.0.1:9/nobody"
    status = BEFORE
    wrong = ("https://", "ntfy+https://ntfy.sh/")


@pytest.mark.parametrize(
    ("change", "event", "words"),
    [
        ({"outcomes": {"completed": 1, "diverged": 1}}, "diverged", "a trial diverged; 2 of 4"),
        ({"outcomes": {"completed": 1, "diverged": 3}}, "diverged", "3 trials diverged"),
        ({"preempted": 2}, "preempted", "2 attempts preempted"),
        ({"stuck": "the disk is full"}, "stuck", "nothing can go on now: the disk is full"),
        ({"over_budget": True}, "budget", "the budget is spent"),
        ({"controller": "absent"}, "ended", "left before its end; 1 of 4"),
        ({"controller": "absent", "outcomes": {"completed": 4}}, "decided", "decided; 4 of 4"),
    ],
)
def test_each_kind_of_news_is_told_once(change: dict[str, Any], event: str, words: str) -> None:
    """From one status to the next a message; while it stays so, none."""
    now = replace(BEFORE, **change)
    (message,) = news(BEFORE, now)
    assert message.event == event and words in message.text and message.text.startswith("s: ")
    assert news(now, now) == [] and news(BEFORE, BEFORE) == []


def test_each_service_has_its_shape() -> None:
    """Known hosts are known, a scheme's first word names a shape, others take plain JSON."""
    (message,) = news(BEFORE, replace(BEFORE, stuck="x"))
    for url, shape in (
        ("https://hooks.slack.com/services/T/B/x", "slack"),
        ("https://discord.com/api/webhooks/1/x", "discord"),
        ("https://ntfy.sh/mine", "ntfy"),
        ("slack+https://chat.example.org/hooks/x", "slack"),
        ("https://example.org/hook", "json"),
    ):
        assert shape_of(url)[0] == shape
    assert shape_of("slack+https://chat.example.org/hooks/x")[1].startswith("https://chat.")
    assert body(message, "slack") == {"text": message.text}
    assert body(message, "discord") == {"content": message.text}
    assert body(message, "ntfy", topic="mine") == {
        "topic": "mine", "title": "ablate: stuck", "message": message.text
    }  # fmt: skip
    assert body(message, "json") == {"event": "stuck", "study": "s", "text": message.text}


def test_a_study_tells_what_came_of_it(tmp_path: Path) -> None:
    """A real launch of which a cell diverges tells that, and its end; launched again, nothing."""
    rules = [{"match": {"warmup": 1}, "status": "diverged"}, {}]
    study = prepare(tmp_path, rules, STUDY.replace("seeds: [0, 1]", "seeds: [0]"))
    with chat() as plain, chat() as ntfy:
        urls = (plain.url, "env:CHAT")
        env = {"CHAT": f"ntfy+{ntfy.url}/mine"}
        for _ in range(2):
            with telling(urls, env) as sinks:
                last, _, _ = run(study, tmp_path, watch=sinks.update)
                sinks.update(last)
        events = [content["event"] for _, content in plain.posts]
        assert events == ["diverged", "decided"], plain.posts
        assert plain.posts[1][1]["text"].startswith("scripted: decided; 3 of 3 trials ended")
        assert [path for path, _ in ntfy.posts] == ["/", "/"]
        assert {content["topic"] for _, content in ntfy.posts} == {"mine"}


@pytest.mark.parametrize("how", [{"hangs": True}, {"answer": 500}, None])
def test_a_chat_that_is_away_costs_nothing(tmp_path: Path, how: dict[str, Any] | None) -> None:
    """One that hangs, refuses or does not exist: telling it returns at once, the end in seconds."""
    with chat(**(how or {})) as away:
        url = away.url if how is not None else "http://127.0.0.1:9/nobody"
        began = time.monotonic()
        with telling([url]) as sinks:
            for number in range(100):
                sinks.update(replace(BEFORE, preempted=number))
            told_s = time.monotonic() - began
            assert how is None or away.arrived.wait(30), "it was never told"
            began = time.monotonic()
        assert told_s < 10.0 and time.monotonic() - began < 60.0


def test_what_was_not_taken_is_sent_later() -> None:
    """A message that was refused goes out with the next status, once."""
    with chat(answer=500) as away:
        sink = open_sink(away.url)
        sink.update(BEFORE)
        with pytest.raises(OSError):
            sink.update(replace(BEFORE, stuck="x"))
        away.answer = 200
        for _ in range(2):
            sink.update(replace(BEFORE, stuck="x"))
        assert [content["event"] for _, content in away.posts] == ["stuck", "stuck"]


def test_a_wrong_address_is_told_before_anything_starts(tmp_path: Path) -> None:
    """No such scheme, a variable that is not set; an address that is a password is no line of a
    study file."""
    with pytest.raises(TrackingError, match="'htps' is no scheme of a sink; .*https"):
        with telling(["htps://example.org"]):
            pass
    with pytest.raises(TrackingError, match="CHAT is not set here; export CHAT="):
        with telling(["env:CHAT"], {}):
            pass
    study = prepare(tmp_path, [], STUDY + "notify: env:CHAT\n")
    assert study.notify == ("env:CHAT",)
    for line, words in (
        ("notify: https://hooks.slack.com/services/T/B/x", "write env:NAME and export"),
        ("notify: me", "neither env:NAME nor an address"),
    ):
        with pytest.raises(StudyError, match=words):
            parse_study(STUDY + line + "\n", path="s.yaml", root=tmp_path)
