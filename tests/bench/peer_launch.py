"""Ray Tune over Ray Train V2, as its guide has it: a trial is a driver that runs a TorchTrainer.

``peer_launch.py FOLDER TRIALS``; each trial notes its times as launch_entries.py does.
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # or Ray leaves one in the home folder
os.environ["PYTHONPATH"] = str(Path(__file__).parent)

import ray  # noqa: E402
from ray import tune  # noqa: E402
from ray.train import RunConfig, ScalingConfig  # noqa: E402
from ray.train.torch import TorchTrainer, prepare_model  # noqa: E402

WORKERS = 2


def train(config: dict[str, Any]) -> None:
    import torch
    from launch_entries import note, step_once

    first_step = step_once(prepare_model(torch.nn.Linear(8, 8)))
    if ray.train.get_context().get_world_rank() == 0:
        note(Path(config["folder"]), str(config["trial"]), first_step)


def drive(config: dict[str, Any]) -> None:
    TorchTrainer(
        train,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=WORKERS, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name=f"t{config['trial']}", storage_path=f"{config['folder']}/store"),
    ).fit()


def main(folder: str, trials: str) -> None:
    ray.init(
        num_cpus=WORKERS + 1,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 * 2**20,
        _temp_dir=f"{folder}/r",
    )
    tune.Tuner(
        tune.with_resources(drive, {"CPU": 1}),
        param_space={"folder": folder, "trial": tune.grid_search(list(range(int(trials))))},
        tune_config=tune.TuneConfig(max_concurrent_trials=1),
        run_config=tune.RunConfig(name="peer", storage_path=f"{folder}/store", verbose=0),
    ).fit()
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
