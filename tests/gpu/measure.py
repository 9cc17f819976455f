"""Six minutes on one accelerator: what is right, what it costs, what it wastes.

    python tests/gpu/measure.py --out found [--device cpu --tiny] [--only twins,speed]

Writes found/found.json and prints it as a table. Every section is run whatever another one met; an
error is a finding. Needs torch >= 2.11 with torchvision, and the wheels of pack.sh. What needs two
or more accelerators is in gang.py.
"""

from __future__ import annotations

import os
import platform
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from trials import Bench, beside_the_peer, difference, measure, read_probe, smi  # noqa: E402, I001

import interruptions  # noqa: E402
import peer_runs  # noqa: E402
import probes  # noqa: E402
import torch  # noqa: E402
from small_trials import run, start, wait_for  # noqa: E402

NEEDS_MORE = ("two or more: bash tests/gpu/run_gang.sh",)
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "B200": 2250.0}
"""Dense bf16 of a card by its maker's data sheet, TFLOP/s."""


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
    cases = {precision: {"precision": precision} for precision in tolerances}
    return beside_the_peer(bench.folder / "parity", bench, cases, tolerances)


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


if __name__ == "__main__":
    sys.exit(measure(SECTIONS, about=__doc__ or "", needs_more=NEEDS_MORE))
