"""What both scripts for accelerators stand on: trials to measure, and how it is told."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "training"), str(ROOT / "tests/gpu")]
sys.path[:0] = HERE
os.environ["PYTHONPATH"] = os.pathsep.join([*HERE, os.environ.get("PYTHONPATH", "")])

import interruptions  # noqa: E402
import peer_runs  # noqa: E402
from small_trials import make_data, run, write_trial  # noqa: E402


@dataclass(frozen=True)
class Bench:
    """Where and with what is measured."""

    folder: Path
    data: Path
    device: str
    tiny: bool
    ranks: int = 1
    """Accelerators of this machine that a trial may have."""

    @property
    def gpus(self) -> int:
        return int(self.device == "cuda")

    def fields(self, **changes: Any) -> dict[str, Any]:
        """A step that computes: RN50 on 128 images, or its small sister."""
        large = {"model": "RN50", "batch_size": 128, "train_num_samples": 128 * 200}
        small = {"model": "tiny-test-rn", "batch_size": 16, "train_num_samples": 16 * 200}
        common = {"epochs": 1, "warmup": 10, "imagenet_val": None, "precision": "amp_bf16"}
        return {**(small if self.tiny else large), **common, **changes}

    def trial(self, name: str, *, gang: int = 1, **fields: Any) -> Any:
        folder = self.folder / name.replace(" ", "-")
        return write_trial(folder, self.data, gang=gang, gpus=self.gpus, **fields)

    def probed(
        self, name: str, probe: Callable[..., None], *given: Any, gang: int = 1, **fields: Any
    ) -> dict[str, Any]:
        """What `probe` found in a run of these fields."""
        trial = self.trial(name, gang=gang, **self.fields(**fields))
        codes = run(trial.folder, workers=gang, prepare=partial(probe, trial.folder, *given))
        return read_probe(trial.folder, codes)


def read_probe(folder: Path, codes: list[int | None]) -> dict[str, Any]:
    path = folder / "probe.json"
    if not path.exists():
        log = (folder / "log-0.txt").read_text().strip().splitlines()
        return {"error": f"exit {codes}: {log[-1] if log else 'nothing said'}"}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def smi(asked: str) -> str:
    command = ("nvidia-smi", asked, "--format=csv,noheader,nounits")
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"


def difference(whole: Any, other: Any) -> str:
    """Where two runs part, in words; "none" when losses, records and files are equal."""
    expected, seen = (interruptions.measured(trial.trace()) for trial in (whole, other))
    if not expected:
        return "the whole run recorded nothing"
    for step, row in expected.items():
        for name, value in row.items():
            other_value = seen.get(step, {}).get(name)
            if other_value != value:
                return f"step {step}, {name}: {value} and {other_value}"
    try:
        interruptions.assert_same(other, whole)
    except (AssertionError, IndexError, OSError) as error:
        return f"{type(error).__name__} in evaluations or files: {str(error)[:200]}"
    return "none"


def beside_the_peer(
    folder: Path,
    bench: Bench,
    cases: Mapping[str, Mapping[str, Any]],
    tolerances: Mapping[str, float],
    *,
    workers: int = 1,
) -> dict[str, Any]:
    """Of each case, whether 52 steps beside open_clip_train.main stay within its tolerance."""
    found = {}
    for name, changes in cases.items():
        tolerance = tolerances[str(changes.get("precision", "fp32"))]
        try:
            peer_runs.follow(
                folder / name.replace(" ", "-"), bench.data, workers, dict(changes),
                gpus=bench.gpus, tolerance=tolerance,
            )  # fmt: skip
            found[name] = f"within {tolerance:g}"
        except AssertionError as error:
            found[name] = (
                f"NOT within {tolerance:g}: {(str(error) or repr(error)).splitlines()[0][:200]}"
            )
    return found


Section = Callable[[Bench], dict[str, Any]]


def measure(
    sections: Sequence[Section], *, about: str, needs_more: Sequence[str], ranks: int | None = None
) -> int:
    """Run every section whatever another one met, and tell; 1 when one could not be measured.

    `about` is the script's text, whose command line is read here; `ranks` how many accelerators a
    script for several takes unless told.
    """
    asked = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    asked.add_argument("--out", type=Path, default=Path("found"))
    asked.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    asked.set_defaults(ranks=1)
    if ranks is not None:
        asked.add_argument("--ranks", type=int, default=ranks, help="accelerators to take")
    asked.add_argument(
        "--tiny", action="store_true", help="a small model, for a machine without GPUs"
    )
    asked.add_argument("--only", default="", help="sections, by comma")
    asked.add_argument(
        "--seconds", type=float, default=360.0, help="start no section after so long"
    )
    given = asked.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    began, found = time.perf_counter(), dict[str, Any]()
    with tempfile.TemporaryDirectory(prefix="ablate-gpu-") as place:
        os.environ["ABLATE_CACHE"] = str(Path(place) / "cache")
        data = make_data(Path(place) / "data")
        bench = Bench(Path(place), data, given.device, given.tiny, given.ranks)
        for section in sections:
            name = section.__name__
            if given.only and name not in given.only.split(","):
                continue
            if time.perf_counter() - began > given.seconds:
                found[name] = {"skipped": f"{given.seconds:.0f} s were over"}
                continue
            at = time.perf_counter()
            try:
                found[name] = section(bench)
            except Exception as error:
                traceback.print_exc()
                found[name] = {"error": f"{type(error).__name__}: {error}"}
            found[name]["seconds"] = time.perf_counter() - at
            (given.out / "found.json").write_text(json.dumps(found, indent=1))
    width = max(len(where) for where, _ in rows(found))
    for where, value in rows(found):
        print(f"{where:<{width}}  {value}")
    print("not here, for it needs more accelerators:")
    for line in needs_more:
        print(f"  {line}")
    return int(any("error" in content for content in found.values()))


def rows(found: Any, path: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """Leaves of what was found, with the way to each."""
    if isinstance(found, dict) and found:
        return [row for name, value in found.items() for row in rows(value, (*path, str(name)))]
    if isinstance(found, float):
        return [(" / ".join(path), f"{found:.4g}")]
    return [(" / ".join(path), str(found))]
