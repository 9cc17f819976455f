"""A controller for drills: ``drill_driver.py ADDRESS NODES FOLDER STEPS``.

Attempts one trial of two ranks on two nodes until it ends in order, as the study loop does, and
says every event as a line of JSON on standard output.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import ray

from ablate.cluster.contract import Attempt, Shape
from ablate.cluster.ray_cluster import RayCluster

GANG = Shape(workers=2, strategy="STRICT_SPREAD")


def main(address: str, nodes: str, folder: str, steps: str) -> None:
    deadline = time.monotonic() + 60
    with RayCluster(address, preload=("torch", "torch.distributed")) as cluster:
        while sum(node["Alive"] for node in ray.nodes()) < int(nodes):
            assert time.monotonic() < deadline, "the nodes did not come"
            time.sleep(0.1)
        number = 0
        while True:
            number += 1
            cluster.start(
                Attempt(
                    trial_id="t",
                    number=number,
                    folder=Path(folder),
                    shape=GANG,
                    entry="drill_entries:train",
                    env={"PYTHONPATH": str(Path(__file__).parent), "STEPS": steps},
                )
            )
            while True:
                events = cluster.wait(1.0)
                for event in events:
                    print(json.dumps(asdict(event)), flush=True)
                if events and events[-1].kind != "placed":
                    break
            if events[-1].exit_codes == (0, 0):
                return


if __name__ == "__main__":
    main(*sys.argv[1:])
