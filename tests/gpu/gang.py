"""Two or more accelerators of one machine: what one alone cannot show.

    python tests/gpu/gang.py --out found --ranks 2 [--device cpu --tiny] [--only resume,alone]

Writes found/found.json and prints it as a table, like measure.py, with the same needs.
"""

from __future__ import annotations

import signal
import sys
import tempfile
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
import torch.distributed as dist  # noqa: E402
from small_trials import log_of, run, start, wait_for  # noqa: E402

from ablate.trial.identity import EXIT_ALONE  # noqa: E402

NEEDS_MORE = (
    "two nodes: RDMA found or not, NCCL_SOCKET_IFNAME on hosts of several networks, a lost host "
    "while NCCL waits; a suspension of 11 minutes",
)
REDUCED_MIB = 256


def machine(bench: Bench) -> dict[str, Any]:
    """What it is measured on, and how fast the accelerators add up a large tensor."""
    found: dict[str, Any] = {"torch": torch.__version__, "ranks": bench.ranks}
    if bench.gpus:
        found["nvidia-smi"] = smi("--query-gpu=name,driver_version,memory.total")
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        pairs = [(a, b) for a in range(bench.ranks) for b in range(bench.ranks) if a < b]
        found["reach each other"] = all(torch.cuda.can_device_access_peer(*pair) for pair in pairs)
    with tempfile.TemporaryDirectory(dir=bench.folder) as place:
        told = Path(place) / "seconds"
        torch.multiprocessing.spawn(
            add_up, args=(bench.ranks, bench.device, 1 if bench.tiny else REDUCED_MIB, str(told)),
            nprocs=bench.ranks,
        )  # fmt: skip
        found["all_reduce_gb_per_s"] = float(told.read_text())
    return found


def add_up(rank: int, ranks: int, device: str, mib: int, told: str) -> None:
    """GB/s of an all-reduce of so many MiB, the bytes that each rank hands in; by rank 0."""
    store = f"file://{told}.store"
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=ranks)
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    tensor = torch.ones(mib * 2**18, device=place)
    for _ in range(3):
        dist.all_reduce(tensor)
    probes.settle(device == "cuda")
    began, times = time.perf_counter(), 10
    for _ in range(times):
        dist.all_reduce(tensor)
    probes.settle(device == "cuda")
    seconds = (time.perf_counter() - began) / times
    if rank == 0:
        Path(told).write_text(str(mib * 2**20 / seconds / 1e9))
    dist.destroy_process_group()


def resume(bench: Bench) -> dict[str, Any]:
    """A run killed in step 6 and resumed, with each number of ranks: the first field that differs
    from the run that nobody killed."""
    found = {}
    for ranks in range(2, bench.ranks + 1):
        for precision in ("fp32",) if bench.tiny else ("fp32", "amp", "amp_bf16"):
            name = f"{ranks} ranks, {precision}"
            fields = {**interruptions.SMALL, "batch_size": 8, "precision": precision}
            whole = bench.trial(f"{name} whole", gang=ranks, **fields)
            killed = bench.trial(f"{name} killed", gang=ranks, **fields)
            codes = [run(whole.folder, workers=ranks)]
            dying = partial(interruptions.after_step, 6)
            start(killed.folder, workers=ranks, prepare=dying).wait_for_a_death()
            codes.append(run(killed.folder, workers=ranks))
            found[name] = {"resumed": difference(whole, killed), "exit": codes}
    return found


def alone(bench: Bench) -> dict[str, Any]:
    """One rank runs out of memory while the others wait in a collective, before the first step and
    after some: seconds until its end says so, which is what the keeper ends the others by."""
    found = {}
    for at in (0, 3):
        trial = bench.trial(f"alone {at}", gang=bench.ranks, **bench.fields())
        prepare = partial(probes.run_out_of_memory, trial.folder, bench.ranks - 1, at)
        ranks = start(trial.folder, workers=bench.ranks, prepare=prepare)
        codes = ranks.wait_for_a_death()
        began = read_probe(trial.folder, codes)
        if "error" in began:
            found[f"step {at}"] = began
            continue
        result = trial.result(1) or {}
        found[f"step {at}"] = {
            "seconds": time.time() - began["at"],
            "says so": codes[-1] == EXIT_ALONE,
            "status": result.get("status", log_of(trial)[-200:]),
        }
    return found


def leaving(bench: Bench) -> dict[str, Any]:
    """SIGTERM to every rank of a run, whatever it is in: seconds until all have left with a
    checkpoint of one and the same step."""
    trial = bench.trial("leaving", gang=bench.ranks, **bench.fields())
    ranks = start(trial.folder, workers=bench.ranks)
    wait_for(lambda: len(trial.trace()) >= 5 or not ranks.processes[0].is_alive(), "step 5")
    began = time.perf_counter()
    ranks.signal(signal.SIGTERM)
    codes = ranks.wait()
    kept = sorted((trial.folder / "checkpoints").glob("step-*"))
    return {
        "seconds": time.perf_counter() - began,
        "exit": codes,
        "checkpoint": kept[-1].name if kept else "none",
        "last step": len(trial.trace()),
    }


def losses(bench: Bench) -> dict[str, Any]:
    """Two ranks: the ways to share the loss, and BatchNorm over both, beside the peer."""
    cases: dict[str, dict[str, Any]] = {
        f"local_loss {local}, gather_with_grad {gather}": {
            "local_loss": local, "gather_with_grad": gather,
        }
        for local in (False, True)
        for gather in (False, True)
    }  # fmt: skip
    tolerances = {"fp32": 1e-3, "amp_bf16": 2e-2}
    if bench.tiny:
        tolerances = {"fp32": peer_runs.TOLERANCE}
        cases = dict(list(cases.items())[-1:])
    if bench.gpus:
        cases["use_bn_sync"] = {"use_bn_sync": True}
        cases["amp_bf16"] = {"precision": "amp_bf16"}
    return beside_the_peer(bench.folder / "losses", bench, cases, tolerances, workers=2)


def speed(bench: Bench) -> dict[str, Any]:
    """Milliseconds of a step with one rank and with all, each with the same samples of its own."""
    first, last = (3, 6) if bench.tiny else (10, 49)
    graphs = {"fused": True, "channels_last": True, "torchcompile": True, "cuda_graphs": True}
    variants: dict[str, dict[str, Any]] = {"fast": {"fused": True, "channels_last": True}}
    if bench.gpus:
        variants["fast, graphs"] = graphs
    found: dict[str, Any] = {}
    for name, fields in variants.items():
        for ranks in (1, bench.ranks):
            found[f"{name}, {ranks} ranks"] = bench.probed(
                f"speed {name} {ranks}", probes.time_steps, first, last, gang=ranks, **fields
            )
    return found


SECTIONS = (machine, resume, alone, leaving, losses, speed)
"""In the order of their worth, should the time run out."""


if __name__ == "__main__":
    here = max(2, torch.cuda.device_count())
    sys.exit(measure(SECTIONS, about=__doc__ or "", needs_more=NEEDS_MORE, ranks=here))
