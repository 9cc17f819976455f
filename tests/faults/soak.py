"""Drills by the hour: ``python tests/faults/soak.py --minutes 30 --seed 1``.

With ``--minutes`` drills are drawn by chance until the time is over; with ``--repeats 20`` every
drill runs so often, round by round (with both, until the time is over); ``--only NAME ...`` leaves
the others out. Every run ends with the invariant checker. A run that fails is told at once with its
seed, and its folder is kept; the exit code is the number of failures.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", MLFLOW_DISABLE_TELEMETRY="true")

from drills import DRILLS, STEPS, Run, Stage, mixed  # noqa: E402
from small_trials import make_data  # noqa: E402
from test_drain import (  # noqa: E402
    drill_all_nodes,
    drill_beside_checkpoint,
    drill_head,
    drill_one_node,
    drill_own_node_gone,
)
from test_drills_clock import LIBRARY, drill_clock  # noqa: E402
from test_drills_controller import drill_controller  # noqa: E402
from test_drills_storage import drill_full_disk  # noqa: E402
from test_drills_tracking import (  # noqa: E402
    drill_locked_databases,
    drill_tracking_away,
    drill_tracking_trouble,
    mlflow_server,
)

from ablate.cluster.local import LocalCluster  # noqa: E402

Drill = Callable[[Stage, int], list[float]]
"""Gives the seconds from each fault to training again."""


def down(downtime_s: float) -> Drill:
    """The controller is killed, in training or before it could record an end, and is away."""

    def controller_down(stage: Stage, seed: int) -> list[float]:
        folder, finished = new_folder(stage), seed % 2 == 1
        return drill_controller(stage, folder, seed, downtime_s=downtime_s, finished=finished)

    controller_down.__name__ = f"controller_down_{downtime_s:.0f}s"
    return controller_down


def tracking_away_60s(stage: Stage, seed: int) -> list[float]:
    """The tracking server goes away at a random step, for a minute."""
    folder = new_folder(stage)
    with mlflow_server(folder) as port:
        drill_tracking_away(stage, port, folder, seed, away_s=60.0)
    return []


def tracking_trouble(stage: Stage, seed: int) -> list[float]:
    """The tracking server is away, broken and slow, in any order."""
    folder, order = new_folder(stage), ["shut", "500", "slow"]
    random.Random(seed).shuffle(order)
    with mlflow_server(folder) as port:
        drill_tracking_trouble(stage, port, folder, tuple(order))
    return []


def locked_databases(stage: Stage, seed: int) -> list[float]:
    """Another program holds the views' databases from a random step on."""
    drill_locked_databases(stage, new_folder(stage), random.Random(seed).randrange(1, STEPS))
    return []


def full_disk(stage: Stage, seed: int) -> list[float]:
    """The disk is full before the first checkpoint."""
    drill_full_disk(stage, new_folder(stage), seed % 6)
    return []


def leaping_clock(stage: Stage, seed: int) -> list[float]:
    """The time of day leaps under a whole launch."""
    return drill_clock(stage, new_folder(stage), seed)


def leaving(name: str, drill: Callable[..., float], **how: int) -> Drill:
    """Nodes that are taken away: the seconds until they, or the launch, had ended."""

    def run(stage: Stage, seed: int) -> list[float]:
        return [drill(stage, new_folder(stage), seed, **how)]

    run.__name__ = name
    return run


def new_folder(stage: Stage) -> Path:
    return Path(tempfile.mkdtemp(prefix="drill-", dir=stage.folder))


def recovered(drill: Callable[[Stage, int], Run]) -> Drill:
    """The seconds until training again of each fault of a drill."""

    def run(stage: Stage, seed: int) -> list[float]:
        return [again for again in drill(stage, seed).recoveries_s() if again == again]

    run.__name__ = drill.__name__  # type: ignore[attr-defined]
    return run


ALL: tuple[Drill, ...] = (
    *(recovered(drill) for drill in DRILLS),
    *(down(downtime_s) for downtime_s in (0.0, 20.0, 60.0)),
    tracking_away_60s,
    tracking_trouble,
    locked_databases,
    leaving("told_30s", drill_one_node, notice_s=30),
    leaving("told_5s", drill_one_node, notice_s=5),
    leaving("told_all_nodes", drill_all_nodes),
    leaving("told_beside_checkpoint", drill_beside_checkpoint),
    leaving("told_head", drill_head),
    leaving("own_node_gone", drill_own_node_gone),
    *((full_disk,) if os.geteuid() == 0 else ()),  # mounts one
    *((leaping_clock,) if LIBRARY else ()),
)


def schedule(
    drills: Sequence[Drill], minutes: float, repeats: int | None, seed: int
) -> Iterator[tuple[Drill, int]]:
    chance = random.Random(seed)
    # Half of the runs are mixes themselves.
    weights = [len(drills) if drill.__name__ == mixed.__name__ else 1 for drill in drills]
    rounds = itertools.count() if repeats is None else range(repeats)
    end = time.monotonic() + 60 * minutes
    for number in rounds:
        for drill in drills:
            if time.monotonic() > end:
                return
            if repeats is None:
                yield chance.choices(drills, weights)[0], chance.randrange(1_000_000)
            else:
                yield drill, seed + number


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=[drill.__name__ for drill in ALL])
    options = parser.parse_args()
    if options.repeats is None and options.minutes == math.inf:
        parser.error("how long? Give --minutes, --repeats or both")
    drills = [drill for drill in ALL if drill.__name__ in (options.only or [drill.__name__])]
    folder = Path(tempfile.mkdtemp(prefix="ablate-soak-"))
    os.environ["ABLATE_CACHE"] = str(folder / "cache")
    rows: dict[str, list[list[float]]] = {drill.__name__: [] for drill in drills}
    failures = 0
    began = time.monotonic()
    with LocalCluster(num_cpus=2, preload=("ablate.recipes.openclip:PRELOAD",)) as cluster:
        stage = Stage(folder / "drills", make_data(folder / "data"), cluster)
        stage.folder.mkdir()
        for drill, seed in schedule(drills, options.minutes, options.repeats, options.seed):
            try:
                rows[drill.__name__].append(drill(stage, seed))
            except Exception:
                failures += 1
                print(f"\nFAILED {drill.__name__} seed {seed}: {traceback.format_exc()}")
                stage.stop_everything()
            print(".", end="", flush=True)
    print(f"\n{time.monotonic() - began:.0f} s, seed {options.seed}, {failures} failures")
    print(f"{'drill':<24}{'runs':>5}{'faults':>8}{'again after, median':>21}{'worst':>8}")
    for name, runs in rows.items():
        times = sorted(again for run in runs for again in run)
        middle = f"{times[len(times) // 2]:.1f} s" if times else ""
        worst = f"{times[-1]:.1f} s" if times else ""
        print(f"{name:<24}{len(runs):>5}{len(times):>8}{middle:>21}{worst:>8}")
    if failures:
        print(f"kept: {folder}")
    else:
        shutil.rmtree(folder)
    return failures


if __name__ == "__main__":
    sys.exit(main())
