"""Does a study's gang fit on these nodes? ``check_nodes.py STUDY NODES CPUS GPUS``, per node.

Exit code 3, with the Slurm flag to change, where it does not; 2 for a study that is wrong.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from ablate.cluster.contract import Shape
from ablate.cluster.seats import explain_shortage
from ablate.errors import AblateError
from ablate.study import load_study


def main(study: str, nodes: int, cpus: int, gpus: int) -> int:
    try:
        gang = load_study(Path(study)).gang
    except AblateError as error:
        print(error, file=sys.stderr)
        return 2
    shape = Shape(gang.workers, gang.cpus_per_worker, gang.gpus_per_worker, gang.strategy)
    machines = {f"node {i}": {"CPU": float(cpus), "GPU": float(gpus)} for i in range(nodes)}
    shortage = explain_shortage(shape, machines)
    if not shortage:
        return 0
    a_node = math.ceil(gang.workers / nodes)
    advice = f"--cpus-per-task={math.ceil(a_node * gang.cpus_per_worker)}"
    if gang.gpus_per_worker:
        advice += f" --gpus-per-node={a_node * gang.gpus_per_worker}"
    print(f"{shortage}.\nSubmit with {advice} (or more), or with more --nodes.", file=sys.stderr)
    return 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
