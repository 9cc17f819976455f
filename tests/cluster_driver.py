"""A controller to be killed: ``cluster_driver.py local|ray FOLDER ENTRY`` starts a gang, sleeps.

Ctrl-C stops the gang with a long grace, and its exit codes are said.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

from ablate.cluster.contract import Attempt, Cluster, Shape
from ablate.cluster.local import LocalCluster


def main(kind: str, folder: str, entry: str) -> None:
    # Tests that were started in the background would hand down that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cluster: Cluster
    if kind == "local":
        cluster = LocalCluster(num_cpus=2)
    else:
        from ablate.cluster.ray_cluster import RayCluster

        cluster = RayCluster(num_cpus=2, preload=())
    cluster.start(
        Attempt(
            trial_id="t",
            number=1,
            folder=Path(folder),
            shape=Shape(workers=2),
            entry=entry,
            env={"PYTHONPATH": str(Path(__file__).parent)},
        )
    )
    (placed,) = cluster.wait(120)
    print(json.dumps(placed.pids), flush=True)
    try:
        while True:
            time.sleep(60)
    except KeyboardInterrupt:
        cluster.stop("t", grace_s=60)
        (ended,) = cluster.wait(120)
        print(json.dumps(ended.exit_codes), flush=True)
        cluster.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
