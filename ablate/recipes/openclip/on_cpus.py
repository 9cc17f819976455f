"""open_clip_train.main in several processes on CPUs.

open_clip_train 3.3.0 names the device in DDP's device_ids, which torch refuses for a CPU, so that
it cannot train in more than one process there. This program leaves device_ids out and hands over
to open_clip_train.main; nothing else is touched. On GPUs train.sh starts upstream itself.
"""

import runpy
from typing import Any

import torch


class OnCpus(torch.nn.parallel.DistributedDataParallel):
    def __init__(self, module: torch.nn.Module, device_ids: Any = None, **options: Any) -> None:
        super().__init__(module, **options)


torch.nn.parallel.DistributedDataParallel = OnCpus  # type: ignore[assignment, misc]

if __name__ == "__main__":
    runpy.run_module("open_clip_train.main", run_name="__main__", alter_sys=True)
