"""Whether an exported setting does what it says, tried in fresh processes.

==========  =======================================================================================
files       every file is as it was written
setting     config.yaml resolves to the configuration that was trained
train.sh    it would run the recorded line, and the upstream trainer's parser takes it
model       upstream's own call loads it and gives the features that were recorded with it
run.sh      its first steps give the recorded losses, to the last bit
==========  =======================================================================================
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablate.errors import AblateError, AnalysisError
from ablate.records.files import find_json, read_rows
from ablate.records.provenance import fingerprint
from ablate.study import load_setting
from ablate.trial.recipe import find_ability

STEPS = 8
"""Steps of run.sh that are compared, where the trial has as many."""
DEADLINE_S = 1800.0
"""Until the first steps of run.sh must be there."""


@dataclass(frozen=True, slots=True)
class Check:
    """One part of a bundle, and what came of trying it."""

    part: str
    kept: bool
    message: str


def verify_bundle(
    folder: Path, *, steps: int = STEPS, tell: Callable[[Check], None] | None = None
) -> list[Check]:
    """Try every part of the bundle in `folder`; nothing in it is changed.

    `tell` hears of each check as it ends.

    Raises:
        AnalysisError: there is no bundle.
    """
    known = find_json(folder / "provenance.json")
    if known is None:
        raise AnalysisError(f"{folder} holds no export. Write it first: ablate export RUN")
    if known.get("format") != 2:
        raise AnalysisError(
            f"{folder} was exported by an earlier version, which noted no losses. Export again"
        )
    tries: dict[str, Callable[[], str]] = {
        "files": lambda: _check_files(folder, known),
        "setting": lambda: _check_setting(folder, known),
        "train.sh": lambda: _check_line(folder, known),
        "model": lambda: _check_model(folder, known),
        "run.sh": lambda: _check_run(folder, known, steps),
    }
    found = []
    for part, attempt in tries.items():
        if part in ("train.sh", "model") and not (folder / part).exists():
            continue
        try:
            found.append(Check(part, True, attempt()))
        except (AblateError, OSError, ValueError) as error:
            found.append(Check(part, False, str(error)))
        if tell is not None:
            tell(found[-1])
    return found


def _check_files(folder: Path, known: Mapping[str, Any]) -> str:
    for name, checksum in known["files"].items():
        path = folder / name
        if not path.is_file():
            raise AnalysisError(f"{name} is gone")
        if hashlib.sha256(path.read_bytes()).hexdigest() != checksum:
            raise AnalysisError(f"{name} was changed after the export")
    return f"{len(known['files'])} files are as they were written"


def _check_setting(folder: Path, known: Mapping[str, Any]) -> str:
    study = load_setting(folder / "config.yaml")
    trial = study.trial(study.cell({}), seed=known["seed"])
    differing = [
        f"{name} is {json.dumps(trial.config.get(name))} in config.yaml, and the trial had "
        f"{json.dumps(known['config'].get(name))}"
        for name in sorted({*trial.config, *known["config"]})
        if trial.config.get(name) != known["config"].get(name)
    ]
    if differing:
        raise AnalysisError("; ".join(differing))
    if trial.id != known["trial"]:
        raise AnalysisError(f"config.yaml is trial {trial.id}, not {known['trial']}")
    return f"config.yaml is trial {trial.id}"


def _check_line(folder: Path, known: Mapping[str, Any]) -> str:
    read = 'eval "words=($(bash "$1" --dry-run))"; printf "%s\\0" "${words[@]}"'
    script = str((folder / "train.sh").resolve())
    done = _run(["bash", "-ec", read, "read", script])
    words = done.stdout.split("\0")[:-1]
    recorded = known["command"]
    start = recorded.index("--") + 2 if known["parser"] else 0
    here = f"{folder.resolve()}/"
    given = [word.replace(here, "") for word in words[start:]]
    if given[: len(recorded) - start] != recorded[start:]:
        raise AnalysisError("train.sh would run another line than the one that was recorded")
    module, _, function = known["parser"].partition(":")
    if module:
        code = f"import sys; from {module} import {function}; {function}(sys.argv[1:])"
        _run([sys.executable, "-c", code, *words[start:]])
        return f"{words[start - 1]} takes its {len(given)} words"
    return f"it would run the {len(given)} words that were recorded"


def _check_model(folder: Path, known: Mapping[str, Any]) -> str:
    if find_ability(known["recipe"], "check_model") is None:
        return f"not tried: the recipe {known['recipe']} does not say how it is loaded"
    code = (
        "import sys; from ablate.trial.recipe import ability; "
        "print(ability(sys.argv[1], 'check_model')(sys.argv[2]))"
    )
    return _run([sys.executable, "-c", code, known["recipe"], str(folder / "model")]).stdout.strip()


def _check_run(folder: Path, known: Mapping[str, Any], steps: int) -> str:
    expected = known["first_losses"][:steps]
    if not expected:
        return "not tried: the trial recorded no losses"
    with tempfile.TemporaryDirectory(prefix="ablate-verify-") as aside:
        losses, said = _first_losses(folder / "run.sh", Path(aside) / "run", len(expected))
    if len(losses) < len(expected):
        raise AnalysisError(f"run.sh gave {len(losses)} of {len(expected)} steps: {said}")
    wrong = [
        n for n, pair in enumerate(zip(losses, expected, strict=True), 1) if pair[0] != pair[1]
    ]
    if wrong:
        step = wrong[0]
        raise AnalysisError(
            f"step {step} of run.sh has loss {losses[step - 1]!r}, and the trial had "
            f"{expected[step - 1]!r}{_other_machine(known)}"
        )
    return f"the first {len(expected)} losses are the trial's, to the last bit"


def _first_losses(script: Path, folder: Path, steps: int) -> tuple[list[float], str]:
    """Losses of the first steps of run.sh, which is then stopped; and its last words."""
    command = ["bash", str(script), "--out", str(folder)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=_environment(),
            start_new_session=True,
        )  # fmt: skip
        trace = folder / "attempts" / "1" / "trace.jsonl"
        end = time.monotonic() + DEADLINE_S
        try:
            while process.poll() is None and len(read_rows(trace)) < steps:
                if time.monotonic() > end:
                    raise AnalysisError(f"run.sh made no {steps} steps in {DEADLINE_S:.0f} s")
                time.sleep(0.2)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                process.wait()
        log.seek(0)
        last = log.read().strip().splitlines()[-1:]
    return [row["loss"] for row in read_rows(trace)[:steps]], " ".join(last)


def _other_machine(known: Mapping[str, Any]) -> str:
    """What differs here from where the trial ran, which may be why."""
    then, now = known["trained_with"], fingerprint()
    differing = [
        f"{name} {then[name]} then, {now.get(name)} now"
        for name in then
        if isinstance(then[name], str) and then[name] != now.get(name)
    ]
    return f". Not the same here: {', '.join(differing)}" if differing else ""


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run to the end in a process of its own.

    Raises:
        AnalysisError: it failed; gives its last words.
    """
    done = subprocess.run(
        command, capture_output=True, text=True, env=_environment(), check=False, timeout=DEADLINE_S
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise AnalysisError(last[0])
    return done


def _environment() -> dict[str, str]:
    """This environment, with the programs that belong to this interpreter found first."""
    tools = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": os.pathsep.join([tools, os.environ.get("PATH", "")])}
