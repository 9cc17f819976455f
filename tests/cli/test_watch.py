"""Looking on: the screen of `ablate watch`, its curves, and that all verbs say the same of it."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from rich.console import Console
from scripted_studies import prepare, run
from synthetic import QUICK, study_of, write_study

from ablate import api
from ablate.cli.chart import Line, draw
from ablate.cli.display import render_status
from ablate.cli.live import RENEW_S, LiveServer
from ablate.errors import AblateError
from ablate.records.attempt import AttemptWriter
from ablate.records.folder import StudyRecord
from ablate.runner.status import Running, StudyStatus
from ablate.study.table import UNENDED, read_table


def shown(lines: list[Line], *, width: int = 60, rows: int = 4) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(draw("loss", lines, width=width, rows=rows))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_a_curve_rises_from_its_first_step_to_its_last() -> None:
    """A straight line goes from the lower left corner to the upper right one, with one mark in
    every column, its ends are labelled, and what is not finite is left out."""
    rows = [{"step": step, "loss": 2.0 * step} for step in range(1, 101)]
    rows[50]["loss"] = float("nan")
    head, *grid, foot = shown([Line.of("lr=0.1 · seed 0", rows, "loss")])
    assert "lr=0.1 · seed 0" in head and foot.split() == ["step", "1", "100"]
    assert grid[0].split()[0] == "200" and grid[-1].split()[0] == "2"
    cells = [row[9:].ljust(51) for row in grid]
    assert cells[-1][0] != " " and cells[0].rstrip()[-1] != " "
    marked = [[row for row in range(4) if cells[row][column] != " "] for column in range(50)]
    assert all(marked) and [m[0] for m in marked] == sorted((m[0] for m in marked), reverse=True)


def test_a_flat_curve_and_a_single_point_are_drawn() -> None:
    """Nothing is divided by a range of nothing."""
    for points in ([(1.0, 3.0)], [(1.0, 3.0), (2.0, 3.0)]):
        text = "".join(shown([Line("x", tuple(points))])[1:-1])
        assert any(0x2800 < ord(letter) <= 0x28FF for letter in text)


@pytest.mark.parametrize("width", [80, 105, 106, 130])
def test_no_number_of_what_runs_is_cut_off(width: int) -> None:
    """On a narrow terminal the name of a cell gives way, then whole columns; a number never does.
    The time left is that of what a search has asked so far, which is said."""
    name = "lr=0.003151, warmup=100, beta2=0.9, precision=amp_bf16, augmentation=strong"
    row = Running(
        "3f12cdb4e5cc", name, 2001, 1, "training", 137, 276, 12.5, 12345.0, 12.345, 0.1234, 12, 3541
    )
    status = StudyStatus(
        "sweep", "imagenet_top1", "running", 30, {}, 29, (row,), 1.0, 3541.0, "fraction",
        search=("27 of 30 cells left",),
    )  # fmt: skip
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(render_status(status, width=width))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    head, line = (next(t for t in lines if word in t) for word in ("trial", "lr="))
    assert head.split()[:2] == ["trial", "seed"] and "\N{HORIZONTAL ELLIPSIS}" not in head
    numbers = line.partition("\N{HORIZONTAL ELLIPSIS}")[2]
    assert numbers.split()[0] == "2001"
    for number in ("12.5", "12.345", "12.34%", "59 min 01 s", *["12,345"] * (width >= 106)):
        assert number in numbers
    assert "about 59 min 01 s left for the trials asked so far" in " ".join(" ".join(lines).split())


def ablate(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ablate.cli", *arguments],
        cwd=folder, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


def test_a_study_that_nobody_runs_is_shown_once(tmp_path: Path) -> None:
    """The newest study is meant where none is named; a trial is found by its name, drawn with its
    events; and every verb calls it by its levels. A wrong name is answered with the right ones."""
    study = study_of(tmp_path, QUICK)
    record = write_study(tmp_path, study, missing=[("lr", "0.002", 1)])
    began = study.trial(study.cell({"lr": "0.002"}), seed=1)
    writer = AttemptWriter(record.record(began.id).folder, 1)
    writer.step([{"step": step, "attempt": 1, "time": 1.0, "loss": 3.0 / step} for step in (1, 2)])
    writer.close()
    said = ablate(tmp_path, "watch")
    assert said.returncode == 0, said.stderr
    assert "1 interrupted, 0 waiting" in " ".join(said.stdout.split())

    said = ablate(tmp_path, "watch", "runs/quick", "lr=0.02 · seed 0")
    assert said.returncode == 0, said.stderr
    text = " ".join(said.stdout.split())
    assert "loss ━ lr=0.02 · seed 0" in text and "imagenet_top1 ━ lr=0.02 · seed 0" in text
    assert "lr=0.02 · seed 0: divergence at step" in text
    near = ablate(tmp_path, "watch", "runs/quick", "lr=0.03")
    assert near.returncode == 2 and "baseline · seed 0" in near.stderr

    named = f"lr=0.002 · seed 1 ({began.id})"
    judged = " ".join(ablate(tmp_path, "markers", "runs/quick", "--json").stdout.split())
    assert began.id in judged, "scripts read ids"
    assert named in " ".join(ablate(tmp_path, "verify", "runs/quick").stdout.split())
    table = ablate(tmp_path, "markers", "runs/quick").stdout
    assert "lr=0.002 · seed 1" in " ".join(table.split())


def test_status_and_report_agree_on_what_runs(tmp_path: Path) -> None:
    """While a study runs, and after it was stopped: the same trials in the same states."""
    study = prepare(tmp_path, [{"hold": True, "steps": 3}])
    record = StudyRecord(tmp_path / "runs" / study.name)
    seen: list[tuple[int, ...]] = []

    def counts(opened: api.Run) -> tuple[int, ...]:
        table = read_table(study, record, active=opened.active())
        status = opened.status()
        states = tuple(table.count(state) for state in UNENDED)
        waiting = status.waiting - status.interrupted
        assert states == (len(status.running), status.interrupted, waiting)
        return states

    def watch(status: StudyStatus) -> None:
        stepped = [trial for trial in status.running if trial.step]
        if len(stepped) == 2 and not seen:
            seen.append(counts(api.Run(study, record)))

    run(study, tmp_path, watch=watch, stop_level=lambda: len(seen))
    seen.append(counts(api.Run(study, record)))
    assert seen == [(2, 0, 4), (0, 2, 4)]


@pytest.mark.parametrize("verb", ["watch", "status"])
def test_a_folder_without_a_study_is_answered(tmp_path: Path, verb: str) -> None:
    """With what to do, and no traceback."""
    said = ablate(tmp_path, verb, "nowhere")
    assert said.returncode == 2 and "Traceback" not in said.stderr


def test_a_page_shows_what_watch_shows(tmp_path: Path) -> None:
    """Studies, a study and a trial by links, each renewing itself and never kept; names of levels
    are text; what is not there is not found, nothing outside the folder is read, and only this
    machine is served."""
    study = study_of(tmp_path, QUICK.replace("seeds: [0, 1, 2, 3]", "seeds: [0]"))
    write_study(tmp_path, study)
    opened = api.open_run(tmp_path / "runs" / "quick")
    with LiveServer(tmp_path / "runs", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def read(path: str) -> str:
            with urllib.request.urlopen(server.url + path, timeout=60) as answer:
                assert answer.headers["Cache-Control"] == "no-store"
                return answer.read().decode()

        assert server.server_address[0] == "127.0.0.1"
        with pytest.raises(AblateError, match="--port"):
            LiveServer(tmp_path / "runs", server.server_address[1])
        assert 'href="/quick"' in read("")
        page = read("quick")
        assert f'content="{RENEW_S}"' in page and "11 of 11 ended" in page
        key, name = next(iter(opened.names().items()))
        assert f'href="/quick/{key}"' in page and name in page
        drawn = read(f"quick/{key}")
        assert any(0x2800 < ord(letter) <= 0x28FF for letter in drawn) and "grad_norm" in drawn
        for nowhere in ("nothing", "quick/nothing", "..%2f..", f"quick/{key}/trial.json"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                read(nowhere)
        server.shutdown()
