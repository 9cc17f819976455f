"""A controller to be killed: ``cluster_driver.py local|ray FOLDER ENTRY`` starts a gang, sleeps."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from ablate.cluster import Attempt, Cluster, Gang, LocalCluster


def main(kind: str, folder: str, entry: str) -> None:
    cluster: Cluster
    if kind == "local":
        cluster = LocalCluster(num_cpus=2)
    else:
        from ablate.ray_cluster import RayCluster

        cluster = RayCluster(num_cpus=2, preload=())
    cluster.start(
        Attempt(
            trial_id="t",
            number=1,
            folder=Path(folder),
            gang=Gang(workers=2),
            entry=entry,
            env={"PYTHONPATH": str(Path(__file__).parent)},
        )
    )
    (placed,) = cluster.wait(120)
    print(json.dumps(placed.pids), flush=True)
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main(*sys.argv[1:])
