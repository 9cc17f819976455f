"""A PostgreSQL server of a test's own, from Debian's package."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

DEADLINE_S = 60.0
BIN = next(
    (str(p.parent) for p in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)),
    os.path.dirname(shutil.which("initdb") or ""),
)
HAS_POSTGRES = bool(BIN) and importlib.util.find_spec("psycopg") is not None
needs_postgres = pytest.mark.skipif(
    not HAS_POSTGRES,
    reason="no PostgreSQL server, or no psycopg, is installed",
)


class Postgres:
    """A server of its own on a Unix socket, as a user that is not root; it can be stopped.

    With a password it also listens on loopback, at `port`, and asks for it there.
    """

    def __init__(self, folder: Path, *, password: str = "") -> None:
        self.folder = folder
        self.port = 0
        if password:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
        self._as: list[str] = []
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(folder, user.pw_uid, user.pw_gid)
            self._as = ["runuser", "-u", "postgres", "--"]
        asked = []
        if password:
            (folder / "password").write_text(password)
            (folder / "password").chmod(0o644)
            asked = ["--auth-host=scram-sha-256", "--pwfile", str(folder / "password")]
        self._run(
            "initdb", "--auth-local=trust", *asked, "-U", "ablate", "-N", "-D", str(folder / "data")
        )
        self.start()
        self._run("createdb", *self._local, "optuna")

    @property
    def _local(self) -> list[str]:
        return [
            "-h",
            str(self.folder),
            "-U",
            "ablate",
            *(["-p", str(self.port)] if self.port else []),
        ]

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://ablate@/optuna?host={self.folder}"

    def url_of(self, database: str) -> str:
        """The URL of a new, empty database."""
        self._run("createdb", *self._local, database)
        return self.url.replace("/optuna?", f"/{database}?")

    def start(self) -> None:
        where = (
            f"-c listen_addresses=127.0.0.1 -p {self.port}"
            if self.port
            else "-c listen_addresses=''"
        )
        options = f"{where} -c fsync=off -k {self.folder}"
        log = str(self.folder / "log")
        self._run(
            "pg_ctl", "-D", str(self.folder / "data"), "-l", log, "-w", "-o", options, "start"
        )

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-w", "-m", "fast", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [*self._as, f"{BIN}/{program}", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            timeout=DEADLINE_S,
        )
        assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def running(*, password: str = "") -> Iterator[Postgres]:
    """A server while the block runs; skips where none can run."""
    if not HAS_POSTGRES:
        pytest.skip("no PostgreSQL server, or no psycopg, is installed")
    if os.geteuid() == 0 and not any(user.pw_name == "postgres" for user in pwd.getpwall()):
        pytest.skip("the server does not run as root, and there is no user postgres")
    with tempfile.TemporaryDirectory(prefix="ablate-pg-") as folder:
        server = Postgres(Path(folder), password=password)
        try:
            yield server
        finally:
            with contextlib.suppress(AssertionError):
                server.stop()
