"""Six minutes on one accelerator: what is right, what it costs, what it wastes.

    python tests/gpu/measure.py --out found [--device cpu --tiny] [--only twins,speed]

Writes found/found.json and prints it as a table. Every section is run whatever another one met; an
error is a finding. Needs torch >= 2.11 with torchvision, and the wheels of pack.sh. What needs two
or more accelerators is not here: see NEEDS_MORE.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
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
import probes  # noqa: E402
import torch  # noqa: E402
from small_trials import make_data, run, start, wait_for, write_trial  # noqa: E402

NEEDS_MORE = (
    "two: one rank out of memory or without data while the others wait in NCCL; gather_with_grad "
    "and local_loss against the peer on NCCL; SyncBatchNorm; DDP with graphs; "
    "SIGTERM in a collective; a suspension of 11 minutes",
    "three or four: a kill and resume, bit by bit",
    "two nodes: RDMA found or not (GB/s of 256 MiB), a lost host while NCCL waits",
)
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "B200": 2250.0}
"""Dense bf16 of a card by its maker's data sheet, TFLOP/s."""


@dataclass(frozen=True)
class Bench:
    """Where and with what is measured."""

    folder: Path
    data: Path
    device: str
    tiny: bool

    @property
    def gpus(self) -> int:
        return int(self.device == "cuda")

    def fields(self, **changes: Any) -> dict[str, Any]:
        """A step that computes: RN50 on 128 images, or its small sister."""
        large = {"model": "RN50", "batch_size": 128, "train_num_samples": 128 * 200}
        small = {"model": "tiny-test-rn", "batch_size": 16, "train_num_samples": 16 * 200}
        common = {"epochs": 1, "warmup": 10, "imagenet_val": None, "precision": "amp_bf16"}
        return {**(small if self.tiny else large), **common, **changes}

    def trial(self, name: str, **fields: Any) -> Any:
        return write_trial(
            self.folder / name.replace(" ", "-"), self.data, gpus=self.gpus, **fields
        )

    def probed(
        self, name: str, probe: Callable[..., None], *given: Any, **fields: Any
    ) -> dict[str, Any]:
        """What `probe` found in a run of these fields."""
        trial = self.trial(name, **self.fields(**fields))
        codes = run(trial.folder, prepare=partial(probe, trial.folder, *given))
        return read_probe(trial.folder, codes)


def read_probe(folder: Path, codes: list[int | None]) -> dict[str, Any]:
    path = folder / "probe.json"
    if not path.exists():
        log = (folder / "log-0.txt").read_text().strip().splitlines()
        return {"error": f"exit {codes}: {log[-1] if log else 'nothing said'}"}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


# --------------------------------------------------------------------------- sections


def machine(bench: Bench) -> dict[str, Any]:
    """What it is measured on."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    found["cores"] = os.cpu_count()
    if bench.gpus:
        asked = "--query-gpu=name,driver_version,memory.total,memory.used"
        found["nvidia-smi"] = smi(asked)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["cuda"] = torch.version.cuda
    return found


def smi(asked: str) -> str:
    command = ("nvidia-smi", asked, "--format=csv,noheader,nounits")
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"


def twins(bench: Bench) -> dict[str, Any]:
    """The same run twice, and once killed in step 6 and resumed: the first field that differs."""
    cases: dict[str, dict[str, Any]] = {
        "fp32": {"precision": "fp32"},
        "amp": {"precision": "amp"},
        "amp_bf16": {"precision": "amp_bf16"},
        "fused, channels last": {"precision": "fp32", "fused": True, "channels_last": True},
    }
    found = {}
    for name, changes in cases.items():
        fields = {**interruptions.SMALL, "batch_size": 16, **changes}
        whole = bench.trial(f"{name} whole", **fields)
        twin = bench.trial(f"{name} twin", **fields)
        killed = bench.trial(f"{name} killed", **fields)
        codes = [run(whole.folder), run(twin.folder)]
        start(killed.folder, prepare=partial(interruptions.after_step, 6)).wait_for_a_death()
        codes.append(run(killed.folder))
        found[name] = {
            "twin": difference(whole, twin),
            "resumed": difference(whole, killed),
            "exit": codes,
        }
    return found


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


def waits(bench: Bench) -> dict[str, Any]:
    """How often a step waits for the device: 0, but for amp without fused, whose scaler reads
    whether something overflowed."""
    return {
        name: bench.probed(f"waits {name}", probes.count_waits, 5, 9, **fields)
        for name, fields in {
            "fp32": {"precision": "fp32"},
            "amp": {"precision": "amp"},
            "amp, fused": {"precision": "amp", "fused": True},
            "amp_bf16": {},
        }.items()
    }


def speed(bench: Bench) -> dict[str, Any]:
    """A step on one batch in memory: milliseconds, samples a second, share of the card's peak."""
    fast = {"fused": True, "channels_last": True}
    variants: dict[str, dict[str, Any]] = {
        "exact": {},
        "fast": fast,
        "fast, amp": {**fast, "precision": "amp"},
        "fast, compiled": {**fast, "torchcompile": True},
        "fast, graphs": {**fast, "torchcompile": True, "cuda_graphs": True},
        "exact, 512": {"batch_size": 512},
        "fast, 512": {**fast, "batch_size": 512},
    }
    if bench.tiny:
        variants = {name: fields for name, fields in variants.items() if "," not in name}
    first, last = (3, 6) if bench.tiny else (10, 49)
    found = {}
    for name, fields in variants.items():
        found[name] = bench.probed(f"speed {name}", probes.time_steps, first, last, **fields)
        if bench.gpus and "ms_a_step" in found[name]:
            found[name]["of_peak"] = share_of_peak(found[name])
    return found


def share_of_peak(found: dict[str, Any]) -> float | None:
    name = torch.cuda.get_device_properties(0).name if torch.cuda.is_available() else ""
    peak = next((value for card, value in PEAK_TFLOPS.items() if card in name), None)
    if peak is None or not found["tflop_a_step"]:
        return None
    return float(found["tflop_a_step"] / (found["ms_a_step"] / 1000) / peak)


def parity(bench: Bench) -> dict[str, Any]:
    """52 steps beside open_clip_train.main on the same batches, within a tolerance."""
    tolerances = {"fp32": 1e-3, "amp": 2e-2, "amp_bf16": 2e-2, "pure_bf16": 5e-2}
    if bench.tiny:
        tolerances = {"fp32": peer_runs.TOLERANCE}
    found = {}
    for precision, tolerance in tolerances.items():
        folder = bench.folder / f"parity-{precision}"
        try:
            peer_runs.follow(
                folder,
                bench.data,
                1,
                {"precision": precision},
                gpus=bench.gpus,
                tolerance=tolerance,
            )
            found[precision] = f"within {tolerance:g}"
        except AssertionError as error:
            found[precision] = f"NOT within {tolerance:g}: {str(error).splitlines()[0][:200]}"
    return found


def leaving(bench: Bench) -> dict[str, Any]:
    """Steps between SIGTERM and the checkpoint that the run leaves with; and a kill: seconds until
    the device's memory is free again."""
    found = {"stop": bench.probed("stop", probes.ask_to_stop, 20)}
    trial = bench.trial("killed", **bench.fields())
    before = smi("--query-gpu=memory.used") if bench.gpus else "0"
    ranks = start(trial.folder, prepare=partial(probes.hold, trial.folder, 3))
    wait_for(
        lambda: (trial.folder / "probe.json").exists() or not ranks.processes[0].is_alive(),
        "step 3",
    )
    if not ranks.processes[0].is_alive():
        return {**found, "kill": read_probe(trial.folder, ranks.wait())}
    held = smi("--query-gpu=memory.used") if bench.gpus else "0"
    ranks.signal(signal.SIGKILL)
    began = time.perf_counter()
    if bench.gpus and before.isdigit():
        wait_for(
            lambda: int(smi("--query-gpu=memory.used")) <= int(before) + 64, "memory to be free"
        )
    ranks.wait()
    found["kill"] = {
        "mib_before": before,
        "mib_held": held,
        "seconds_until_free": time.perf_counter() - began,
    }
    return found


def sharing(bench: Bench) -> dict[str, Any]:
    """Two trials at once on the device, against one alone."""
    first, last = (3, 6) if bench.tiny else (10, 49)
    small = {"model": "tiny-test-rn", "batch_size": 64, "train_num_samples": 64 * 200}
    alone = bench.probed("alone", probes.time_steps, first, last, **small)
    trials = [bench.trial(f"shared {n}", **bench.fields(**small, seed=n)) for n in (0, 1)]
    ranks = [
        start(trial.folder, prepare=partial(probes.time_steps, trial.folder, first, last))
        for trial in trials
    ]
    codes = [rank.wait() for rank in ranks]
    shared = [read_probe(trial.folder, code) for trial, code in zip(trials, codes, strict=True)]
    return {"alone": alone, "two at once": shared}


def memory(bench: Bench) -> dict[str, Any]:
    """A batch that does not fit is infeasible, with what to try."""
    if not bench.gpus:
        return {"skipped": "a CPU's memory is not ours to fill"}
    trial = bench.trial("too large", **bench.fields(batch_size=8192, train_num_samples=8192 * 2))
    codes = run(trial.folder, prepare=probes.one_batch_for_all)
    result = trial.result(1) or {}
    return {"exit": codes, "status": result.get("status"), "reason": result.get("reason")}


SECTIONS = (machine, twins, waits, speed, leaving, memory, sharing, parity)
"""In the order of their worth, should the time run out."""


# --------------------------------------------------------------------------- telling


def rows(found: Any, path: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """Leaves of what was found, with the way to each."""
    if isinstance(found, dict) and found:
        return [row for name, value in found.items() for row in rows(value, (*path, str(name)))]
    if isinstance(found, float):
        return [(" / ".join(path), f"{found:.4g}")]
    return [(" / ".join(path), str(found))]


def main() -> int:
    """Measure and tell; 1 when a section could not be measured."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--out", type=Path, default=Path("found"))
    asked.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
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
        bench = Bench(Path(place), make_data(Path(place) / "data"), given.device, given.tiny)
        for section in SECTIONS:
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
    for line in NEEDS_MORE:
        print(f"  {line}")
    return int(any("error" in content for content in found.values()))


if __name__ == "__main__":
    sys.exit(main())
