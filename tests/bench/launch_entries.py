"""The smallest training there is: two ranks, DDP around one linear layer, one optimizer step."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


def step_once(model: Any) -> float:
    """One optimizer step; the time it ended."""
    import torch

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(4, 8)).sum().backward()
    optimizer.step()
    return time.time()


def note(folder: Path, trial: str, first_step: float) -> None:
    """One line per trial: its first step, and now, its end."""
    with open(folder / "times.jsonl", "a") as file:
        file.write(json.dumps({"trial": trial, "first_step": first_step, "end": time.time()}))
        file.write("\n")


def train() -> int:
    import torch

    from ablate.training.ranks import join, leave

    gang = join(gpus_per_worker=0)
    first_step = step_once(torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8)))
    leave()
    if gang.first:
        trial = Path(os.environ["ABLATE_TRIAL"])
        note(trial.parent, f"{trial.name}/{os.environ['ABLATE_ATTEMPT']}", first_step)
    return 0
