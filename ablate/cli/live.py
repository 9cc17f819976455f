"""What `ablate watch` shows, as a page that renews itself: `ablate ui --live`."""

from __future__ import annotations

import io
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from rich.console import Console

from ablate.api import open_run
from ablate.cli.screen import screen_of
from ablate.errors import AblateError

RENEW_S = 3
"""Seconds after which a browser asks again."""
_WIDTH = 130
_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="refresh" content="{renew}"><title>{title}</title><style>
:root {{ color-scheme: light dark }} body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem }}
pre {{ font: 13px/1.25 ui-monospace, monospace; overflow-x: auto }} a {{ color: inherit }}
</style></head><body>{body}</body></html>"""


class LiveServer(ThreadingHTTPServer):
    """Serves the studies of a folder, on the loopback interface alone."""

    daemon_threads = True

    def __init__(self, runs: Path, port: int) -> None:
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise AblateError(
                f"port {port} cannot be served ({error.strerror}); give another: --port"
            ) from error
        self.runs = runs

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: LiveServer

    def do_GET(self) -> None:
        parts = [unquote(part) for part in self.path.partition("?")[0].split("/") if part]
        try:
            page = _page(self.server.runs, parts)
        except (AblateError, OSError) as error:  # a record that is being written, or damaged
            page = _PAGE.format(renew=RENEW_S, title="ablate", body=escape(str(error)))
        self._send(page)

    def _send(self, page: str | None) -> None:
        status = HTTPStatus.NOT_FOUND if page is None else HTTPStatus.OK
        body = (page or "There is no such study or trial.").encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Every look would be a line."""


def _page(runs: Path, parts: list[str]) -> str | None:
    """The list of studies, a study, or one of its trials; None for what is not there."""
    studies = {path.parent.name: path.parent for path in sorted(runs.glob("*/study.json"))}
    if not parts:
        rows = (f'<li><a href="/{quote(name)}">{escape(name)}</a></li>' for name in studies)
        body = f"<h1>Studies</h1><ul>{''.join(rows) or 'none yet'}</ul>"
        return _PAGE.format(renew=RENEW_S, title="ablate", body=body)
    name, trial = parts[0], parts[1] if len(parts) == 2 else None
    if name not in studies or len(parts) > 2:
        return None
    opened = open_run(studies[name])
    names = opened.names()
    if trial is not None and trial not in names:
        return None
    console = Console(file=io.StringIO(), record=True, width=_WIDTH, force_terminal=True)
    console.print(screen_of(opened, trial, width=_WIDTH))
    shown = console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
    links = (
        f'<li><a href="/{quote(name)}/{quote(key)}">{escape(called)}</a></li>'
        for key, called in names.items()
    )
    body = f'<p><a href="/">studies</a> · <a href="/{quote(name)}">{escape(name)}</a></p>{shown}'
    body += f"<details><summary>trials</summary><ul>{''.join(links)}</ul></details>"
    return _PAGE.format(renew=RENEW_S, title=escape(name), body=body)
