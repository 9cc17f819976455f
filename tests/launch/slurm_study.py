"""Stands where `ablate` is looked for on the nodes of the Slurm test.

It joins the Ray that slurm.sh brought up and runs one gang with a rank on each node; then it exits
with 7, or with WAIT=1 it waits for Ctrl-C and exits with 130.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

from ablate.cluster.contract import Attempt, Shape
from ablate.cluster.ray_cluster import RayCluster


def main() -> int:
    folder = Path(os.environ["SEEN"])
    if os.environ.get("WAIT"):
        # The test signals as soon as the file is there.
        signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
        (folder / "waiting").touch()
        while True:
            signal.pause()
    address = sys.argv[sys.argv.index("--address") + 1]
    gang = Shape(workers=2, cpus_per_worker=2, strategy="STRICT_SPREAD")
    env = {"PYTHONPATH": str(Path(__file__).parents[1])}
    with RayCluster(address, preload=()) as cluster:
        cluster.start(
            Attempt("t", 1, folder / "trial", gang, "cluster_entries:write_environment", env)
        )
        events = []
        while not events or events[-1].kind == "placed":
            events += cluster.wait(60)
    seen = {"argv": sys.argv[1:], "end": asdict(events[-1])}
    (folder / "seen.part").write_text(json.dumps(seen))
    (folder / "seen.part").rename(folder / "seen.json")
    return 7


if __name__ == "__main__":
    sys.exit(main())
