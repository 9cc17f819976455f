"""Runs attempts one after the other on a Ray that is there: ``ADDRESS FOLDER COUNT``.

Prints when it began and when each was placed, as seconds of the time of day.
"""

import sys
import time
from pathlib import Path

from ablate.cluster.contract import Attempt, Shape
from ablate.cluster.ray_cluster import RayCluster

address, folder, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
env = {"PYTHONPATH": str(Path(__file__).parents[1])}
with RayCluster(address, turn_s=2.0) as cluster:
    print(time.time(), flush=True)
    for number in range(count):
        trial = folder / str(number)
        trial.mkdir(parents=True)
        entry = "cluster_entries:record_interval"
        cluster.start(Attempt(str(number), 1, trial, Shape(workers=1), entry, env))
    left = count
    while left:
        for event in cluster.wait(1.0):
            left -= event.kind != "placed"
            if event.kind == "placed":
                print(event.time, flush=True)
