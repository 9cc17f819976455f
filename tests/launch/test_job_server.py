"""What KubeRay asks of a node and of Ray's job server, asked of the `cluster` extra on loopback.

On demand: it installs the extra's own packages into an environment beside the present one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TOKEN = "0123456789abcdef" * 4

TAKES_ITS_TIME = """
import pathlib, signal, sys, time
up, saved = map(pathlib.Path, sys.argv[1:])
def leave(*_):
    time.sleep(6)
    saved.touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, leave)
up.touch()
while True:
    signal.pause()
"""
"""A job whose checkpoint takes longer than the 3 s that Ray gives one that is stopped."""

pytestmark = [pytest.mark.exhaustive, pytest.mark.timeout(1200)]


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def ask(url: str, *, token: str = "") -> tuple[int, bytes]:
    """Status and body of a GET; 0 while nobody answers."""
    request = urllib.request.Request(url)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the `cluster` extra on top of this one; its bin folder."""
    folder = tmp_path_factory.mktemp("cluster")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    below = [path for path in sys.path if path.endswith("site-packages")]
    (inner,) = folder.glob("lib/python*/site-packages")
    (inner / "below.pth").write_text("\n".join([str(REPOSITORY), *below]))
    constraints = str(REPOSITORY / "launch" / "constraints.txt")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--constraint", constraints, "ray[default]", "boto3"], check=True)
    return folder / "bin"


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder with a short name: a Unix socket's path has at most 107 letters."""
    with tempfile.TemporaryDirectory(prefix="ablate-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def test_probes_submitter_and_exit_codes(
    environment: Path, tmp_path: Path, short_folder: Path
) -> None:
    """Both of KubeRay's probes answer, the job server asks for the token, an entrypoint's own
    exit code stands in the job, in the words that kuberay/launch.sh reads, and one that is stopped
    has time for a checkpoint."""
    port, dashboard, agent = free_ports(3)
    python = environment / "python"
    settings = dict(
        line.split("=", 1)
        for line in (REPOSITORY / "launch" / "ray.env").read_text().splitlines()
        if line and not line.startswith("#")
    )
    manifest = (REPOSITORY / "launch" / "kuberay" / "rayjob.yaml").read_text()
    (patience,) = re.findall(r'name: (RAY_JOB_STOP_WAIT_TIME_S), value: "(\d+)"', manifest)
    env = {
        **os.environ,
        **settings,
        **dict([patience]),
        "RAY_AUTH_TOKEN": TOKEN,
        "PATH": f"{environment}:/usr/bin:/bin",
    }
    ray = [str(python), "-m", "ray.scripts.scripts"]
    head = [*ray, "start", "--head", f"--port={port}", "--include-dashboard=true"]
    head += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    head += ["--num-cpus=1", "--disable-usage-stats", f"--temp-dir={short_folder}", "--block"]
    server = f"http://127.0.0.1:{dashboard}"
    with (
        open(tmp_path / "log", "wb") as log,
        subprocess.Popen(head, env=env, stdout=log, stderr=log, start_new_session=True) as process,
    ):
        try:
            waiting = {f"{server}/api/gcs_healthz", f"http://127.0.0.1:{agent}/api/healthz"}
            deadline = time.monotonic() + 300
            while waiting := {url for url in waiting if ask(url)[0] != 200}:
                assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
                assert time.monotonic() < deadline, f"no answer from {waiting}"
                time.sleep(0.5)
            assert ask(f"{server}/api/jobs/")[0] == 401
            (tmp_path / "wrong.yaml").write_text("recipe: none\n")
            entry = [str(python), "-m", "ablate", "launch", str(tmp_path / "wrong.yaml"), "--yes"]
            submit = [*ray, "job", "submit", "--address", server, "--submission-id", "one"]
            subprocess.run([*submit, "--no-wait", "--", *entry], env=env, check=True, timeout=300)
            while (job := json.loads(ask(f"{server}/api/jobs/one", token=TOKEN)[1]))[
                "status"
            ] not in ("FAILED", "SUCCEEDED", "STOPPED"):
                assert time.monotonic() < deadline + 300, job
                time.sleep(0.5)
            assert (job["status"], job["driver_exit_code"]) == ("FAILED", 2), job["message"]
            pattern = r"entrypoint command failed with exit code \([0-9]*\)"
            assert pattern in (REPOSITORY / "launch" / "kuberay" / "launch.sh").read_text()
            found = re.search(r"entrypoint command failed with exit code ([0-9]*)", job["message"])
            assert found and found[1] == "2"
            up, saved = tmp_path / "up", tmp_path / "saved"
            entry = [str(python), "-c", TAKES_ITS_TIME, str(up), str(saved)]
            submit[-1] = "two"
            subprocess.run([*submit, "--no-wait", "--", *entry], env=env, check=True, timeout=300)
            while not up.exists():
                assert time.monotonic() < deadline + 600, "the second job did not start"
                time.sleep(0.1)
            stop = [*ray, "job", "stop", "--address", server, "two"]
            subprocess.run(stop, env=env, check=True, timeout=300)
            assert saved.exists()
            job = json.loads(ask(f"{server}/api/jobs/two", token=TOKEN)[1])
            assert job["status"] == "STOPPED"
        finally:
            if process.poll() is None:
                process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
