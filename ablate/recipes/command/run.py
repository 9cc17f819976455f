"""A command's process: started, listened to, asked to stop, and what came of it."""

from __future__ import annotations

import logging
import math
import os
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ablate.errors import DataError
from ablate.markers.foreign.columns import quantity_of
from ablate.recipes.command.fields import Config, fill
from ablate.recipes.command.lines import (
    LONGEST_LINE,
    Row,
    Table,
    Tail,
    near_line,
    parse_line,
)
from ablate.recipes.command.meeting import meet
from ablate.trial.session import Ending, Session, Status

log = logging.getLogger("ablate.recipes.command")

METRICS = "ABLATE_METRICS"
"""Environment variable: file that lines of measurements may go to, in place of the output."""
LARGEST_LOG = 16 << 20
"""Bytes of the command's output that go to the log; measurements are read from all of it."""
JUDGED = ("loss", "grad_norm", "lr")
"""What a command may call by a name of its own, such as train_loss."""
POLL_S = 0.2
GRACE_S = 60.0
"""From SIGTERM until a command that a marker ended is killed."""
LAST_LINES = 5


def run(session: Session) -> Ending:
    """One rank of one attempt: the command, to its end."""
    return _Process(session).run()


class _Process:
    """One rank's command; rank 0's lines are the trial's."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.config: Config = session.config
        session.checkpoints.mkdir(exist_ok=True)
        given = {"checkpoints": session.checkpoints, "folder": session.folder}
        attempt = session.attempt or 1
        self.words = self.config.line(**given, attempt=attempt)
        values = self.config.values(**given, attempt=attempt)
        self.patterns = [re.compile(pattern) for pattern in self.config.patterns]
        place = session.folder / "attempts" / str(attempt) / "metrics.jsonl"
        self.file = Tail(place)
        self.table = None
        if self.config.table is not None:
            self.table = Table(Path(self.config.cwd) / fill(self.config.table, values))
        self.env = _environment(session, self.config, values, place)
        self.metric = session.trial["objective"]["metric"]
        self.step = 0
        self.final: Row = {}
        self.best: Row | None = None
        self.names: dict[str, str] = {}
        """What its columns are called in the record."""
        self.problem = ""
        """Why what it says cannot be used."""
        self.heard = self.told = time.monotonic()
        self.buffer = b""
        self.logged = 0
        self.last: list[str] = []
        self.near = ""
        """How a line that nothing reads would be, where it seems to say the objective."""

    def run(self) -> Ending:
        session, config = self.session, self.config
        session.about(steps_total=config.num_steps, row_interval=config.every)
        session.note(row_interval=config.every if config.every > 1 else None)
        if session.attempt != 1 and "{checkpoints}" not in config.command:
            log.info("the command has no {checkpoints}: it starts again from its first step")
            session.resumed({"step": 0, "starts_over": "the command has no {checkpoints}"})
        session.pulse.rest()  # its lines are waited for here
        line = _program(self.words)
        log.info("%s", shlex.join(line))
        session.phase("training")
        try:
            process = subprocess.Popen(
                line,
                cwd=config.cwd,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        except OSError as error:
            raise DataError(f"{line[0]!r} cannot be started in {config.cwd}: {error}") from error
        with process:
            try:
                why = self._listen(process)
            finally:
                if process.poll() is None:
                    process.kill()
        return self._ending(why, process.returncode)

    # ------------------------------------------------------------------- while it runs

    def _listen(self, process: subprocess.Popen[bytes]) -> str:
        """Read until it ends; why it was ended, if it was."""
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        why, kill_at = "", math.inf
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            open_ = True
            while open_ or process.poll() is None:
                if open_ and selector.select(POLL_S):
                    chunk = os.read(process.stdout.fileno(), 1 << 16)
                    open_ = bool(chunk)
                    self._take_output(chunk)
                elif not open_:
                    time.sleep(POLL_S)
                if time.monotonic() - self.told >= POLL_S:
                    self._take_files(ended=False)
                if not why:
                    why = self._why_leave()
                    if why:
                        kill_at = time.monotonic() + (math.inf if why == "stopped" else GRACE_S)
                        process.terminate()
                if time.monotonic() >= kill_at:
                    process.kill()
                if process.poll() is not None and not selector.select(0):
                    break  # a grandchild may hold the pipe open
        self._take_output(b"\n")
        self._take_files(ended=True)
        return why

    def _why_leave(self) -> str:
        if self.session.leave:
            return self.session.leave
        if self.problem:
            return "problem"
        silent_s = time.monotonic() - self.heard
        return "silent" if silent_s > self.config.patience_s else ""

    def _take_output(self, chunk: bytes) -> None:
        if chunk.strip():
            self.heard = time.monotonic()
        if self.logged < LARGEST_LOG:
            sys.stderr.buffer.write(chunk)
            sys.stderr.buffer.flush()
            self.logged += len(chunk)
            if self.logged >= LARGEST_LOG:
                log.warning("more than %d MiB of output: the rest is not kept", LARGEST_LOG >> 20)
        *lines, rest = (self.buffer + chunk).split(b"\n")
        self.buffer = rest[:LONGEST_LINE]
        for line in lines:
            text = line.decode(errors="replace")
            if text.strip():
                self.last = [*self.last[1 - LAST_LINES :], text.rstrip()[:500]]
            row = parse_line(text, self.patterns)
            if row is None and self.metric not in self.final:
                self.near = near_line(text, self.metric) or self.near
            self._take(row)

    def _take_files(self, *, ended: bool) -> None:
        self.told = time.monotonic()
        for line in self.file.lines():
            self.heard = time.monotonic()
            self._take(parse_line(line, self.patterns))
        if self.table is not None:
            for row in self.table.rows(ended=ended):
                self.heard = time.monotonic()
                self._take(row)

    def _take(self, row: Row | None) -> None:
        """A line's measurements: those that the study declares are an evaluation's. What stands
        beside them is a step's, but for a lone epoch, which says where the evaluation was."""
        if row is None or self.problem:
            return
        is_evaluation = bool(row.pop("eval", 0))
        at = row.pop("step", None)
        measured = {name: row.pop(name) for name in self.config.metrics if name in row}
        if is_evaluation or (measured and row.keys() == {"epoch"}):
            measured |= row
            row = {}
        row = {self._name(column, row): value for column, value in row.items()}
        if at is None:
            at = self.step + (self.config.every if row else 0)
        if at != int(at) or at < self.step or (row and at == self.step and self.step):
            self.problem = f"it said step {at:g} after step {self.step}; steps rise"
            return
        if row:
            self.step = int(at)
            self.session.step({"step": self.step, **row})
        if measured:
            self.step = int(at)
            self.session.evaluation({"step": self.step, **measured})
            self.final = measured
            if self.session.is_better(measured, self.best):
                self.best = {**measured, "step": self.step}

    def _name(self, column: str, row: Row) -> str:
        """``train_loss`` is the loss that markers judge, if it is the only one; so with lr and the
        gradient norm."""
        if column not in self.names:
            quantity, held_out = quantity_of(column)
            known = {*self.names.values(), *row}
            judged = quantity in JUDGED and not held_out and quantity not in known
            self.names[column] = quantity if quantity and judged else column
        return self.names[column]

    # ------------------------------------------------------------------- its end

    def _ending(self, why: str, code: int) -> Ending:
        session, total = self.session, self.config.num_steps
        if why == "stopped":
            return self._end("stopped", f"stopped at step {self.step}")
        if why == "diverged" or session.leave == "diverged":
            return self._end("diverged", session.why_diverged)
        if self.problem:
            return self._end("failed", f"what the command says cannot be used: {self.problem}")
        if why == "silent":
            return self._end(
                "failed",
                f"the command said nothing for {self.config.patience_s:g} s (patience_s) after "
                f"step {self.step}",
            )
        if code:
            end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited {code}"
            said = " | ".join(self.last)
            raise RuntimeError(f"the command {end} after step {self.step}; its last lines: {said}")
        metric = self.metric
        if metric not in self.final:
            how = self.near or "it may say other lines with patterns, or a file of rows with table"
            return self._end(
                "failed",
                f"the command ended without {metric}. A line of JSON on its output says it, "
                f'{{"{metric}": 0.5}}; {how}',
            )
        reached = f"{self.step} of {total} steps" if total else f"{self.step} steps"
        return self._end("completed", reached)

    def _end(self, status: Status, reason: str) -> Ending:
        self.session.note(facts={"command": self.config.command})
        return Ending(
            status=status,
            reason=reason,
            step=self.step,
            steps_total=self.config.num_steps,
            final=self.final,
            best=self.best or {},
        )


def _environment(
    session: Session, config: Config, values: Mapping[str, Any], metrics: Path
) -> dict[str, str]:
    """Ours, what torchrun gives its processes, and what the study adds."""
    env = dict(os.environ)
    meet(session, env)
    env |= {
        "RANK": str(session.rank),
        "WORLD_SIZE": str(session.world_size),
        "LOCAL_RANK": env.get("LOCAL_RANK", "0"),
        "LOCAL_WORLD_SIZE": env.get("LOCAL_WORLD_SIZE", str(session.world_size)),
        "PYTHONUNBUFFERED": "1",
        "ABLATE_SEED": str(config.seed),
    }
    if session.first:
        env[METRICS] = str(metrics)
    return env | {name: fill(text, values) for name, text in config.env.items()}


def _program(line: list[str]) -> list[str]:
    """``python`` is ours, where the machine has another one or none."""
    if line[0] in ("python", "python3"):
        return [sys.executable, *line[1:]]
    return [shutil.which(line[0]) or line[0], *line[1:]]
