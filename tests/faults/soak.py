"""Drills by the hour: ``python tests/faults/soak.py --minutes 30 --seed 1``.

With ``--repeats 20`` every drill runs so often; with ``--minutes`` drills are drawn by chance until
the time is over. Every run ends with the invariant checker. A run that fails is told with its seed
and its folder is kept; the exit code is the number of failures.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", MLFLOW_DISABLE_TELEMETRY="true")

from drills import DRILLS, Stage, mixed  # noqa: E402
from small_trials import make_data  # noqa: E402
from test_drills_controller import drill_controller  # noqa: E402

from ablate.cluster import LocalCluster  # noqa: E402

DOWNTIMES_S = (0.0, 20.0, 60.0)


def killed_controller(stage: Stage, seed: int) -> list[float]:
    """The controller is down for 0, 20 or 60 s."""
    folder = stage.folder / f"controller-{seed}"
    folder.mkdir()
    downtime_s = DOWNTIMES_S[seed // 2 % len(DOWNTIMES_S)]
    return drill_controller(stage, folder, seed, downtime_s=downtime_s, finished=seed % 2 == 1)


def recovered(drill: Callable[..., object]) -> Callable[[Stage, int], list[float]]:
    """The seconds until training again of each fault of a drill."""

    def run(stage: Stage, seed: int) -> list[float]:
        found = drill(stage, seed)
        return [again for again in found.recoveries_s() if again == again]  # type: ignore[attr-defined]

    run.__name__ = drill.__name__  # type: ignore[attr-defined]
    return run


ALL = (*(recovered(drill) for drill in DRILLS), killed_controller)


def schedule(
    minutes: float | None, repeats: int, seed: int
) -> Iterator[tuple[Callable[[Stage, int], list[float]], int]]:
    if minutes is None:
        yield from ((drill, seed + number) for drill in ALL for number in range(repeats))
        return
    chance = random.Random(seed)
    end = time.monotonic() + 60 * minutes
    # Half of the runs are mixes themselves.
    weights = [len(ALL) if drill.__name__ == mixed.__name__ else 1 for drill in ALL]
    while time.monotonic() < end:
        yield chance.choices(ALL, weights)[0], chance.randrange(1_000_000)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ablate-soak-"))
    os.environ["ABLATE_CACHE"] = str(folder / "cache")
    rows: dict[str, list[list[float]]] = {drill.__name__: [] for drill in ALL}
    failures: list[str] = []
    began = time.monotonic()
    with LocalCluster(num_cpus=2, preload=("ablate.training.worker:PRELOAD",)) as cluster:
        stage = Stage(folder / "drills", make_data(folder / "data"), cluster)
        stage.folder.mkdir()
        for drill, seed in schedule(options.minutes, options.repeats, options.seed):
            try:
                rows[drill.__name__].append(drill(stage, seed))
            except Exception:
                failures.append(f"{drill.__name__} seed {seed}: {traceback.format_exc()}")
                stage.stop_everything()
            print(".", end="", flush=True)
    print(f"\n{time.monotonic() - began:.0f} s, seed {options.seed}")
    print(f"{'drill':<24}{'runs':>5}{'faults':>8}{'again after, median':>21}{'worst':>8}")
    for name, runs in rows.items():
        times = sorted(again for run in runs for again in run)
        middle = f"{times[len(times) // 2]:.1f} s" if times else ""
        worst = f"{times[-1]:.1f} s" if times else ""
        print(f"{name:<24}{len(runs):>5}{len(times):>8}{middle:>21}{worst:>8}")
    for failure in failures:
        print(f"\nFAILED {failure}")
    if failures:
        print(f"kept: {folder}")
    else:
        shutil.rmtree(folder)
    return len(failures)


if __name__ == "__main__":
    sys.exit(main())
