"""How many gangs of a shape fit on machines, and which resource runs out where."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ablate.cluster.contract import Shape


def count_gangs(shape: Shape, machines: Sequence[Mapping[str, float]]) -> int:
    """How many gangs of one shape fit on machines with these resources ("CPU", "GPU")."""
    seats = [count_seats(shape, machine) for machine in machines]
    match shape.strategy:
        case "STRICT_PACK":
            return sum(n // shape.workers for n in seats)
        case "STRICT_SPREAD":
            # g gangs fit when every machine takes at most one worker of each.
            gangs = 0
            while sum(min(n, gangs + 1) for n in seats) >= (gangs + 1) * shape.workers:
                gangs += 1
            return gangs
        case _:
            return sum(seats) // shape.workers


def count_seats(shape: Shape, machine: Mapping[str, float]) -> int:
    """How many workers of such a gang one machine holds."""
    # A sum of fractions of CPUs misses an integer by rounding errors.
    seats = math.floor(machine.get("CPU", 0.0) / shape.cpus_per_worker + 1e-9)
    if shape.gpus_per_worker:
        seats = min(seats, int(machine.get("GPU", 0.0)) // shape.gpus_per_worker)
    return seats


def explain_shortage(
    shape: Shape, machines: Mapping[str, Mapping[str, float]], *, now: bool = False
) -> str:
    """Why not even one gang fits, naming the resource that is short on each machine; else nothing.

    `now`: the resources are those that are free at the moment.
    """
    if count_gangs(shape, list(machines.values())):
        return ""
    if not machines:
        such = " with these labels" if shape.labels else ""
        return f"the gang needs {shape}, but the cluster has no machine{such}"
    needs = {"CPU": shape.cpus_per_worker}
    if shape.gpus_per_worker:
        needs["GPU"] = float(shape.gpus_per_worker)
    seen = []
    for name, resources in machines.items():
        seats = count_seats(shape, resources)
        has = " and ".join(f"{resources.get(kind, 0.0):g} {kind}" for kind in needs)
        has += " free" if now else ""
        per_seat = {kind: resources.get(kind, 0.0) / need for kind, need in needs.items()}
        short = min(per_seat, key=lambda kind: per_seat[kind])
        seen.append(f"{name} has {has}: {seats} of {shape.workers} workers, {short} runs out")
    where = {
        "STRICT_PACK": " on one machine (STRICT_PACK)",
        "STRICT_SPREAD": " each on a machine of its own (STRICT_SPREAD)",
    }.get(shape.strategy, "")
    return f"the gang needs {shape}{where}, but " + "; ".join(seen)
