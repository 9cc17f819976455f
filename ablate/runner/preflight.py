"""Can a gang start now? A probe gang on every free seat, started as a trial is, looks around.

Each rank says what it sees of the study folder and the data, which versions it runs, how much disk
is left, and takes part in a 64 MiB all-reduce. :func:`examine` turns that into findings. No torch
and no ray here; the probe imports torch in its own process.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import shutil
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ablate.cluster.contract import Attempt, Capacity, Cluster, GangEvent, Shape
from ablate.records import stores
from ablate.records.files import free_gib
from ablate.records.provenance import installed
from ablate.runner import doctor, surroundings
from ablate.runner.doctor import Finding, Level
from ablate.runner.plan.cost import over_disk
from ablate.study import Study
from ablate.trial.recipe import load

_PACKAGES = ("ablate-runner", "torch", "torchvision", "open_clip_torch", "ray", "numpy")
_DATA = "ABLATE_PREFLIGHT_DATA"
_STORE = "ABLATE_PREFLIGHT_STORE"
_REDUCED_BYTES = 64 * 2**20
# Two checkpoints (weights and two moments, 4 bytes each) of a model of a billion parameters.
_ANY_MODEL_GIB = 24.0
# Many nodes are covered by as many gangs; no cluster needs more to be believed.
_MOST_GANGS = 256


def glance(
    cluster: Cluster,
    *,
    shape: Shape,
    folder: Path,
    data: Sequence[Path] = (),
    checkpoints: str | None = None,
    need_gib: float | None = None,
) -> list[Finding]:
    """What can be known without starting anything, in a second: for every launch.

    Errors are what no trial could outlive. `data` is looked for on this machine alone; `need_gib`
    is the disk that checkpoints will take, where that is known.
    """
    findings = [_seats(cluster.capacity(shape), shape)]
    if missing := [str(path) for path in data if not path.exists()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        findings.append(
            Finding("data", "warning", f"{missing[0]}{more} does not exist on this machine")
        )
    if checkpoints is not None:
        problem = stores.probe(checkpoints)
        findings.append(
            Finding("checkpoints", "error", f"{checkpoints} cannot be used: {problem}")
            if problem
            else Finding("checkpoints", "ok", f"{checkpoints} can be written and read from here")
        )
    short = over_disk(folder, need_gib, free_gib=free_gib(folder))
    disk = Finding("disk", "warning", short[0]) if short else doctor.examine_disk(folder)
    return [*findings, *doctor.examine_versions(), disk]


def disk_needed(study: Study, *, trials: int, free_gib: float) -> float | None:
    """About what the checkpoints of so many trials take in GiB; None where `free_gib` hold those of
    any model, or the recipe does not know.

    Sketches the baseline's model, which imports torch.
    """
    if free_gib >= trials * _ANY_MODEL_GIB:
        return None
    recipe, gang = load(study.recipe), study.gang
    trial = study.trial(study.cell({}), seed=study.seeds[0])
    outline = recipe.outline(
        recipe.Config(**trial.config),
        workers=gang.workers,
        gpus=gang.gpus_per_worker,
        root=Path(study.root),
        deep=True,
    )
    if outline.checkpoint_bytes is None:
        return None
    return trials * outline.checkpoint_bytes / 2**30


def _seats(capacity: Capacity, shape: Shape) -> Finding:
    if capacity.total == 0:
        return Finding("seats", "error", capacity.reason)
    seats = f"{capacity.free} of {capacity.total} gangs of {shape} can start now"
    if capacity.free == 0:
        return Finding("seats", "warning", f"{seats}: {capacity.busy}")
    return Finding("seats", "ok", seats)


def examine(
    cluster: Cluster,
    *,
    shape: Shape,
    folder: Path,
    data: Sequence[Path] = (),
    checkpoints: str | None = None,
    need_gib: float | None = None,
    shared_gib: float | None = None,
    timeout_s: float = 180.0,
) -> list[Finding]:
    """Findings on a cluster for a study: seats, nodes, folder, data, versions, network, disk.

    `folder` is the study folder, `data` what its trials read, `checkpoints` the object store that
    they are copied to, `need_gib` the disk it will fill, and `shared_gib` what a worker's loading
    processes hold in /dev/shm, where these are known.
    It takes every free seat for the some seconds that the probes run; other attempts wait.
    """
    capacity = cluster.capacity(shape)
    seats = _seats(capacity, shape)
    if capacity.free == 0:
        return [seats]
    # Nodes have working folders of their own.
    probes, began = folder.absolute() / f".preflight-{secrets.token_hex(4)}", time.time()
    gangs = min(capacity.free, _MOST_GANGS)
    try:
        for number in range(gangs):
            trial = probes / str(number)
            trial.mkdir(parents=True)
            env = {
                _DATA: json.dumps([str(path.absolute()) for path in data]),
                _STORE: checkpoints or "",
            }
            cluster.start(
                Attempt(
                    f"preflight-{number}", 1, trial, shape, "ablate.runner.preflight:probe", env
                )
            )
        ends = _wait(cluster, gangs, timeout_s)
        over = time.time()
        sights = [sight for number in range(gangs) for sight in _read(probes / str(number))]
    finally:
        shutil.rmtree(probes, ignore_errors=True)
    return [
        seats,
        *judge(ends, sights, shape=shape, need_gib=need_gib),
        *surroundings.judge(sights, between=(began, over), shared_gib=shared_gib),
    ]


def _wait(cluster: Cluster, gangs: int, timeout_s: float) -> list[GangEvent]:
    """The last event of every probe gang; stops those that do not end in time."""
    ends: list[GangEvent] = []
    deadline: float | None = time.monotonic() + timeout_s
    while len(ends) < gangs:
        ends += [event for event in cluster.wait(0.5) if event.kind != "placed"]
        if deadline is not None and time.monotonic() > deadline:
            deadline = None
            for number in range(gangs):
                cluster.stop(f"preflight-{number}", grace_s=1.0)
    return ends


def _read(trial: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(trial.glob("attempts/1/sight-*.json"))]


def judge(
    ends: Sequence[GangEvent],
    sights: Sequence[Mapping[str, Any]],
    *,
    shape: Shape,
    need_gib: float | None,
) -> list[Finding]:
    """Plain rules over what the probes saw."""
    findings = [
        Finding("gang", "error", end.detail) for end in ends if set(end.exit_codes) != {0}
    ] or [Finding("gang", "ok", f"{len(ends)} probe gangs started and ended in order")]
    if not sights:
        return findings
    nodes = sorted({sight["node"] for sight in sights})
    findings.append(Finding("nodes", "ok", f"{len(nodes)} probed: {', '.join(nodes)}"))
    findings += [
        _compare(package, {sight["node"]: sight["versions"][package] for sight in sights})
        for package in sights[0]["versions"]
    ]
    missing: dict[str, set[str]] = defaultdict(set)
    for sight in sights:
        for path in sight["missing"]:
            missing[path].add(sight["node"])
    findings += [
        Finding("data", "error", f"{path} does not exist on {', '.join(sorted(where))}")
        for path, where in missing.items()
    ] or [Finding("data", "ok", "every node sees what the study reads")]
    if closed := {s["node"]: s["store"] for s in sights if s["store"]}:
        why = "; ".join(f"{problem} on {node}" for node, problem in sorted(closed.items()))
        findings.append(Finding("checkpoints", "error", f"cannot be copied: {why}"))
    poorest = min(sights, key=lambda sight: float(sight["free_gib"]))
    free = f"{poorest['free_gib']:.1f} GiB free at the study folder ({poorest['node']})"
    if need_gib is None:
        findings.append(Finding("disk", "ok", f"{free}; what the study takes is not known here"))
    else:
        level: Level = "ok" if poorest["free_gib"] >= need_gib else "error"
        takes = f"the checkpoints of the trials to run take up to {need_gib:.1f} GiB"
        findings.append(Finding("disk", level, f"{free}; {takes}"))
    if shape.gpus_per_worker:
        short = {s["node"] for s in sights if s["gpus"] < shape.gpus_per_worker}
        findings.append(
            Finding("accelerators", "error", f"torch sees too few on {', '.join(sorted(short))}")
            if short
            else Finding("accelerators", "ok", "torch sees those of its gang on every node")
        )
    if times := [s["all_reduce_s"] for s in sights if s["all_reduce_s"] is not None]:
        slowest = max(times)
        findings.append(
            Finding(
                "network",
                "ok",
                f"an all-reduce of 64 MiB took at most {slowest * 1e3:.0f} ms "
                f"({_REDUCED_BYTES / slowest / 1e9:.1f} GB/s)",
            )
        )
    return findings


def _compare(package: str, by_node: Mapping[str, str | None]) -> Finding:
    """One version everywhere, or who has which."""
    nodes_of: dict[str, list[str]] = defaultdict(list)
    for node, version in sorted(by_node.items()):
        nodes_of[version or "none"].append(node)
    if len(nodes_of) == 1:
        (version,) = nodes_of
        return Finding(package, "ok", f"{version} on every node")
    spread = "; ".join(f"{version} on {', '.join(nodes)}" for version, nodes in nodes_of.items())
    return Finding(package, "error", f"differs between nodes: {spread}; install one version")


def probe() -> int:
    """What a rank of a probe gang does: look around, all-reduce, write down what it saw."""
    from datetime import timedelta

    import torch

    from ablate.training.ranks import barrier, join, leave, sum_over_ranks

    folder = Path(os.environ["ABLATE_TRIAL"])
    gpus = torch.cuda.device_count()
    gang = join(gpus_per_worker=gpus, timeout=timedelta(seconds=60))
    took: float | None = None
    if gang.world_size > 1:
        value = torch.ones(_REDUCED_BYTES // 4, device=gang.device)
        sum_over_ranks(value, gang)  # connects
        barrier(gang)
        value.fill_(1.0)
        began = time.perf_counter()
        sum_over_ranks(value, gang)
        if float(value[-1]) != gang.world_size:
            print(f"the all-reduce gave {float(value[-1])}, not {gang.world_size}", file=sys.stderr)
            return 1
        took = time.perf_counter() - began
    paths = [Path(path) for path in json.loads(os.environ[_DATA])]
    url = os.environ[_STORE]
    sight = {
        "node": socket.gethostname(),
        "versions": {
            "python": platform.python_version(),
            **{package: installed(package) for package in _PACKAGES},
        },
        "missing": [str(path) for path in paths if not path.exists()],
        "free_gib": free_gib(folder),
        "gpus": gpus // gang.local_world_size,
        "store": stores.probe(f"{url}/{secrets.token_hex(4)}") if url else "",
        "all_reduce_s": took,
        **surroundings.look(),
    }
    part = folder / "attempts" / "1" / f"sight-{gang.rank}.json"
    part.with_suffix(".part").write_text(json.dumps(sight))
    part.with_suffix(".part").rename(part)
    leave()
    return 0
