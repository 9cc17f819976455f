"""Where no server is reached, the words say what lies between."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import postgres_server
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from ablate.errors import TrackingError
from ablate.tracking.mlflow.refusal import not_reached
from ablate.tracking.mlflow.store import one_at_a_time


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that asks once, in an environment without proxies of its own."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")


def said_of(uri: str) -> str | None:
    with pytest.raises(MlflowException) as told:
        MlflowClient(uri).get_experiment_by_name("study")
    return not_reached(uri, told.value)


@contextmanager
def listening(certificate: Path | None = None) -> Iterator[int]:
    """The port of a server that knows no question, encrypted with a certificate of its own."""
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def test_a_port_without_a_server() -> None:
    assert "Connection refused" in str(said_of(f"http://127.0.0.1:{free_port()}"))


def test_a_host_that_nobody_knows() -> None:
    assert "no host 'mlflow.invalid'" in str(said_of("http://mlflow.invalid:5000"))


def test_a_server_that_says_nothing() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert "timed out" in str(said_of(f"http://127.0.0.1:{silent.getsockname()[1]}"))


@pytest.mark.parametrize("kind", ["http", "https"])
def test_a_proxy_of_the_environment_is_named_without_its_password(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    port = free_port()
    monkeypatch.setenv(f"{kind}_proxy", f"http://me:secret@127.0.0.1:{port}")
    said = str(said_of(f"{kind}://tracking.example:5000"))
    assert f"127.0.0.1:{port}" in said and "no_proxy=tracking.example" in said
    assert "secret" not in said


def test_a_certificate_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "server.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=localhost", "-keyout", str(file), "-out", str(tmp_path / "certificate.pem")],
        check=True, capture_output=True,
    )  # fmt: skip
    file.write_text(file.read_text() + (tmp_path / "certificate.pem").read_text())
    with listening(file) as port:
        assert "REQUESTS_CA_BUNDLE" in str(said_of(f"https://127.0.0.1:{port}"))


def test_a_server_without_encryption_that_is_called_https() -> None:
    with listening() as port:
        assert "is its address https?" in str(said_of(f"https://127.0.0.1:{port}"))


def test_a_server_that_answers_is_reached() -> None:
    """What it says is another matter."""
    with listening() as port:
        assert said_of(f"http://127.0.0.1:{port}") is None


def test_a_database_without_a_server_is_told_at_once() -> None:
    """MLflow would try fifteen times first, for minutes."""
    begun = time.monotonic()
    with (
        pytest.raises(TrackingError, match="Connection refused"),
        one_at_a_time(f"postgresql+psycopg://me@127.0.0.1:{free_port()}/mlflow"),
    ):
        pass
    assert time.monotonic() - begun < 60.0


def test_a_database_that_lets_nobody_in_says_so() -> None:
    """A wrong password, a database that is not there; the right ones are let in."""
    with postgres_server.running(password="right") as server:
        address = f"127.0.0.1:{server.port}"
        for who, said in (
            ("ablate:wrong", "password authentication failed"),
            ("nobody:right", "password authentication failed"),
        ):
            url = f"postgresql+psycopg://{who}@{address}/optuna"
            with pytest.raises(TrackingError, match=said), one_at_a_time(url):
                pass
        missing = f"postgresql+psycopg://ablate:right@{address}/mlflow"
        with pytest.raises(TrackingError, match="does not exist"), one_at_a_time(missing):
            pass
        with one_at_a_time(f"postgresql+psycopg://ablate:right@{address}/optuna"):
            pass
