"""MLflow's web page over a tracking store, for this machine alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from ablate.errors import TrackingError
from ablate.tracking.mlflow.store import artifacts_beside, one_at_a_time
from ablate.tracking.mlflow.views import OPENING, view_link

_APP = "ablate"
"""Name of our page among MLflow's apps, where the package is installed with its entry points."""


@dataclass(slots=True)
class Server:
    """An MLflow server that was started here; also a context manager."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    is_ours: bool
    """Whether the page is served by :mod:`ablate.tracking.mlflow.page`."""

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Wait until it answers.

        Raises:
            TrackingError: it ended, or did not answer in time; with the tail of its log.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.1)
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
        state = (
            f"ended with code {self.process.returncode}"
            if self.process.poll() is not None
            else f"did not answer within {timeout_s:g} s"
        )
        raise TrackingError(f"the MLflow server at {self.url} {state}. Its log {self.log}:\n{tail}")

    def pages(self) -> dict[str, str]:
        """Study -> link to its settings, best first, for every study in the store."""
        request = urllib.request.Request(
            f"{self.url}/api/2.0/mlflow/experiments/search",
            data=json.dumps(
                {"max_results": 1000, "filter": "attribute.name != 'Default'"}
            ).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            experiments = json.load(answer).get("experiments", [])
        return {item["name"]: f"{self.url}/{self._link(item)}" for item in experiments}

    def _link(self, experiment: Mapping[str, Any]) -> str:
        """Where our page is served, every study opens by itself as it should."""
        number = str(experiment["experiment_id"])
        return f"#/experiments/{number}/runs" if self.is_ours else view_link(number, OPENING)

    def close(self) -> None:
        """End the server with all its workers."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=5)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(uri: str, *, port: int = 5000, host: str = "127.0.0.1", log: Path) -> Server:
    """Start MLflow's web page over a tracking store, for this machine alone.

    It listens on a loopback address, answers only requests that name it, and takes none from other
    pages. What it prints goes to `log`.

    Raises:
        TrackingError: the port is taken; or `host` is not a loopback address: MLflow has no
            authentication of its own switched on, so anyone who reaches it could change everything.
    """
    if host not in ("127.0.0.1", "localhost", "::1"):
        raise TrackingError(
            f"the page is served on loopback only, not on {host!r}; from another machine use "
            f"`ssh -L {port}:127.0.0.1:{port} THIS_HOST`"
        )
    with socket.socket(socket.AF_INET6 if host == "::1" else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise TrackingError(
                f"port {port} on {host} cannot be used ({error.strerror}); another page may be "
                f"open there. Give another one: --port {port + 1}"
            ) from error
    names = ("127.0.0.1", "localhost")
    command = [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--backend-store-uri", uri),
        *("--host", host, "--port", str(port), "--workers", "1"),
        *("--allowed-hosts", ",".join(f"{name}:{port}" for name in names)),
        *("--cors-allowed-origins", ",".join(f"http://{name}:{port}" for name in names)),
        "--no-serve-artifacts",  # files are read from where the runs say they are
    ]
    is_ours = any(entry_points(group="mlflow.app", name=_APP))
    if is_ours:
        command += ["--app-name", _APP]
    if uri.startswith("sqlite:///"):
        with one_at_a_time(uri):  # or a server that is ended early leaves half of the tables
            pass
        beside = artifacts_beside(Path(uri.removeprefix("sqlite:///")))
        command += ["--default-artifact-root", beside]
    environment = {
        **os.environ,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    return Server(process, f"http://{'[::1]' if host == '::1' else host}:{port}", log, is_ours)
