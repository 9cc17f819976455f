"""Surroundings that fail: terminals, disks, views and outputs. One sentence, and the exit code."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from synthetic import QUICK, study_of, write_study

from ablate.api import open_book, open_run
from ablate.records.folder import StudyRecord
from ablate.tracking.mlflow.refusal import refusal_of

REPOSITORY = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "100"}
ENV.pop("MLFLOW_TRACKING_URI", None)
ABLATE = [sys.executable, "-m", "ablate.cli"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> StudyRecord:
    """A study with two factors whose trials have all ended."""
    folder = tmp_path_factory.mktemp("finished")
    text = QUICK[: QUICK.index("factors:")] + "factors: {beta2: [0.999, 0.98]}\nseeds: [0, 1]\n"
    return write_study(folder, study_of(folder, text), effects={}, diverged={})


def ablate(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*ABLATE, *arguments], cwd=cwd, env={**ENV, **env}, capture_output=True, timeout=300
    )


def test_an_output_that_takes_few_characters_still_gets_the_answer(finished: StudyRecord) -> None:
    """Arrows and dots are spelt, the exit code is that of the verb."""
    found = ablate("report", finished.folder.name, cwd=finished.folder.parent,
                   PYTHONIOENCODING="ascii")  # fmt: skip
    assert found.returncode == 0, found.stderr
    said = found.stdout.decode("ascii")
    assert "beta2" in said and "0.999 -> 0.98" in said


def test_a_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    """The one that a verb is called in was removed, as by a job's clean-up."""
    left = tmp_path / "left"
    left.mkdir()
    call = f"cd {left} && rmdir {left} && exec {' '.join(ABLATE)} check {tmp_path}/s.yaml"
    (tmp_path / "s.yaml").write_text(QUICK)
    found = subprocess.run(["bash", "-c", call], env=ENV, capture_output=True, timeout=300)
    assert found.returncode == 2 and b"the folder this was called in is gone" in found.stderr


def test_a_name_of_a_file_gives_a_terminal_no_orders(tmp_path: Path) -> None:
    """Its escapes are spelt, where it is judged and where it is refused."""
    (tmp_path / "\x1b[31mred.csv").write_text("step,loss\n1,3.0\n2,2.0\n")
    for name in ("\x1b[31mred.csv", "\x1b[31mnone.csv"):
        found = ablate("markers", "import", name, cwd=tmp_path)
        said = found.stdout + found.stderr
        assert b"\x1b" not in said and b"\\x1b[31m" in said


def test_json_is_whole_whatever_the_output_takes() -> None:
    """Characters that cannot be written are JSON's escapes, so nothing is lost."""
    code = "from ablate.cli.terminal import print_json; print_json({'a': 'β → \u0301'})"
    found = subprocess.run([sys.executable, "-c", code], env={**ENV, "PYTHONIOENCODING": "ascii"},
                           capture_output=True, check=True)  # fmt: skip
    assert json.loads(found.stdout.decode("ascii")) == {"a": "β → \u0301"}


def _can_mount() -> bool:
    command = "mount -t tmpfs none /mnt"
    return shutil.which("unshare") is not None and not subprocess.call(
        ["unshare", "-m", "sh", "-c", command], stderr=subprocess.DEVNULL
    )


@pytest.mark.skipif(not _can_mount(), reason="file systems are mounted by root alone")
def test_a_read_only_folder_can_be_read(finished: StudyRecord, tmp_path: Path) -> None:
    """An archived study: the report's answer is printed though nothing can be written, launch and
    export say why in one sentence, each with exit code 3 (optuna 1300)."""
    runs = tmp_path / "runs"
    shutil.copytree(finished.folder.parent, runs, symlinks=True)
    name = finished.folder.name
    script = tmp_path / "try.sh"
    verbs = {
        "report": f"report {runs / name}", "export": f"export {runs / name}",
    }  # fmt: skip
    lines = [f"mount --bind {runs} {runs} && mount -o remount,ro,bind {runs}"]
    lines += [
        f"{' '.join(ABLATE)} {verb} > {tmp_path / key}.out 2> {tmp_path / key}.err; "
        f"echo $? > {tmp_path / key}.rc"
        for key, verb in verbs.items()
    ]
    script.write_text("\n".join(lines))
    subprocess.run(["unshare", "-m", "sh", str(script)], check=True, env=ENV, timeout=300)
    ended = {key: (tmp_path / f"{key}.rc").read_text().strip() for key in verbs}
    errors = {key: (tmp_path / f"{key}.err").read_text() for key in verbs}
    assert ended == {"report": "3", "export": "3"}, errors
    assert "beta2" in (tmp_path / "report.out").read_text()
    for key in ("report", "export"):
        assert "on a read-only file system" in errors[key] and "Traceback" not in errors[key]


HANGING = """\
name: hanging
recipe: command
baseline: {command: "python script.py {checkpoints} {n}", n: 1, metrics: {top1: maximize}}
factors: {n: [1, 2]}
seeds: [0]
"""
SCRIPT = """
import json, pathlib, signal, sys, time
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
for step in range(1, 2000):
    print(json.dumps({"step": step, "loss": 1 / step}), flush=True)
    time.sleep(0.05)
    if stop:
        (pathlib.Path(sys.argv[1]) / "kept").write_text(str(step))
        sys.exit(143)
"""


@pytest.mark.parametrize(
    "hang_up", [pytest.param("signal", marks=pytest.mark.exhaustive), "terminal"]
)
def test_a_terminal_that_hangs_up_stops_in_order(tmp_path: Path, hang_up: str) -> None:
    """SIGHUP, and the loss of the terminal itself, let trials write a checkpoint, as one Ctrl-C
    does; the exit code says that it was stopped (ray 59551, hydra 1407)."""
    (tmp_path / "s.yaml").write_text(HANGING)
    (tmp_path / "script.py").write_text(SCRIPT)
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*ABLATE, "launch", "s.yaml", "--yes", "--cluster", "local", "--cpus", "1"],
        cwd=tmp_path, env=ENV, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        preexec_fn=_own_terminal,
    )  # fmt: skip
    os.close(slave)
    said = bytearray()
    listener = threading.Thread(target=_drain, args=(master, said), daemon=True)
    listener.start()
    try:
        deadline = time.monotonic() + 120
        record = StudyRecord(tmp_path / "runs" / "hanging")
        while not any(folder.trace() for folder in record.records()):
            assert time.monotonic() < deadline and process.poll() is None, said.decode()
            time.sleep(0.1)
        if hang_up == "signal":
            process.send_signal(signal.SIGHUP)
            process.send_signal(signal.SIGHUP)
        else:
            os.close(master)
        assert process.wait(60) == 130, said.decode()
    finally:
        process.kill()
        process.wait()
    (begun,) = (folder for folder in record.records() if folder.attempts())
    assert list(begun.folder.rglob("kept")), "the trial was asked to write its checkpoint"
    assert open_run(record.folder).status().controller == "absent"


def _own_terminal() -> None:
    """Standard input becomes the terminal that the session hangs on; whose hanging up is heard,
    also where the tests themselves run under nohup, which launches respect."""
    import fcntl
    import termios

    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _drain(master: int, said: bytearray) -> None:
    while True:
        try:
            said += os.read(master, 4096)
        except OSError:
            return


def test_a_storage_of_another_version_is_a_view_that_is_behind(
    finished: StudyRecord, tmp_path: Path
) -> None:
    """What another Optuna made stops nothing, is named, and is made anew by a rebuild
    (optuna 2866, 2812, 5360)."""
    study = open_run(finished.folder).study
    record = StudyRecord(tmp_path / "runs" / study.name)
    record.folder.mkdir(parents=True)
    with open_book(study, record, None) as book:
        assert book.trouble is None
    with sqlite3.connect(record.folder / "optuna.db") as database:
        database.execute("UPDATE alembic_version SET version_num = 'v9.9.0.a'")
        database.execute("UPDATE version_info SET schema_version = 99, library_version = '9.9.0'")
    database.close()
    with open_book(study, record, None) as book:
        assert book.trouble is not None
        assert "another version of Optuna" in book.trouble and "ablate rebuild" in book.trouble
    with open_book(study, record, None, fresh=True) as book:
        assert book.trouble is None
    assert (record.folder / "optuna.db.other-version").exists()


class _Refusing(BaseHTTPRequestHandler):
    code = 401

    def _refuse(self) -> None:
        self.send_response(self.code)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_GET = do_POST = do_PATCH = _refuse  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def refusing() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_that_asks_who_one_is_is_named(refusing: str) -> None:
    """A 401 with an empty answer: the number and what to set (mlflow 1760)."""
    with pytest.raises(MlflowException) as caught:
        MlflowClient(refusing).search_experiments()
    assert "401" not in str(caught.value), "the client itself does not say it"
    said = refusal_of(refusing, caught.value) or ""
    assert "(401)" in said and "MLFLOW_TRACKING_USERNAME" in said


def test_a_storage_that_is_not_reached_is_said_at_the_end(
    finished: StudyRecord, tmp_path: Path
) -> None:
    """A rebuild that wrote nothing there has not succeeded, and a launch hears why it is behind."""
    folder = tmp_path / finished.folder.name
    shutil.copytree(finished.folder, folder)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{held.getsockname()[1]}/optuna"
        url = f"postgresql://me:secret@{address}"
        found = ablate("rebuild", folder.name, "--storage", url, cwd=tmp_path)
        behind: list[str] = []
        with open_book(open_run(folder).study, StudyRecord(folder), url, behind=behind.append):
            pass
    said = found.stderr.decode()
    assert found.returncode == 1 and b"Rebuilt" not in found.stdout
    assert f"the Optuna storage postgresql://***@{address} is behind: " in said
    assert "Connection refused" in said and "ablate rebuild" in said
    assert len(behind) == 1 and f"***@{address} is behind" in behind[0]
