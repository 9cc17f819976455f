"""MLflow's page as a study's reader meets it; installed as MLflow's app ``ablate``.

A fresh browser would open every study in the part of the page for language models, with an
assistant beside it, and with columns and charts that nobody chose. What decides this lies in the
browser's local storage and nowhere else, so the first page sets what is not set yet: a reader's own
choice stays. Everything else is MLflow's app, untouched.

    mlflow server --app-name ablate ...        (`ablate ui` does so)
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.server.fastapi_app import app as mlflow_app
from mlflow.server.handlers import _get_tracking_store

from ablate.tracking.mlflow.views import OPENING, page_state, tag_of

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_MOST_STUDIES = 1000

_NOBODY_CHOSE = {
    "mlflow.workflowType_v1": '"machine_learning"',
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
}
"""Local storage of MLflow 3.17's page: which part of it, and that the assistant was there."""

_SCRIPT = """<script>(function(){var s=localStorage,d=%s;\
for(var k in d)if(s.getItem(k)===null)s.setItem(k,d[k])})()</script>"""

_STALE = frozenset({b"if-none-match", b"if-modified-since", b"accept-encoding", b"range"})
"""Of the request: what would bring no page, or one that is packed."""

_ITS_OWN = frozenset({b"content-length", b"etag", b"last-modified"})
"""Of the answer: what is true of the page as it was."""


class Page:
    """MLflow's app, whose first page brings a study's reader to where the study is."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in ("/", ""):
            await mlflow_app(scope, receive, send)
            return
        start: Message = {}
        parts: list[bytes] = []

        async def catch(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
                return
            parts.append(message.get("body", b""))
            if message.get("more_body"):
                return
            page = b"".join(parts).replace(b"<head>", b"<head>" + script(), 1)
            kept = [pair for pair in start["headers"] if pair[0].lower() not in _ITS_OWN]
            start["headers"] = [*kept, (b"content-length", str(len(page)).encode())]
            await send(start)
            await send({"type": "http.response.body", "body": page})

        asked = [pair for pair in scope["headers"] if pair[0].lower() not in _STALE]
        await mlflow_app({**scope, "headers": asked}, receive, catch)


def script() -> bytes:
    """What sets a fresh browser's choices, with a view of each study that has one."""
    chosen = {**_NOBODY_CHOSE, **_opening_views()}
    return (_SCRIPT % json.dumps(chosen).replace("</", "<\\/")).encode()


def _opening_views() -> dict[str, str]:
    try:
        found = _get_tracking_store().search_experiments(max_results=_MOST_STUDIES)
    except MlflowException:  # a store that is busy: the page comes all the same
        return {}
    return {
        "MLflowLocalStorage-1.1-ExperimentPage-"
        f'["{experiment.experiment_id}"]-ReactComponentState': page_state(view)
        for experiment in found
        if (view := experiment.tags.get(tag_of(OPENING))) is not None
    }


app = Page()
