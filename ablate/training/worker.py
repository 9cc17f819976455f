"""Entry of one rank of a trial: ``python -m ablate.training.worker TRIAL_FOLDER``.

It reads trial.json and the environment (see ``distributed``), trains, and leaves its records in
the trial's folder. ABLATE_TRIAL may name the folder instead of the argument; ABLATE_ATTEMPT the
number of the attempt, else the next free one is taken; ABLATE_CHECKPOINTS a place in an object
store (s3://bucket/prefix) that checkpoints are copied to, and found in; ABLATE_SHARE how many of
the trial's workers each rank stands for. The same entry runs under our clusters, ``torchrun`` and
``srun``, or alone.

Exit status: 0 when result.json is written (completed, diverged, infeasible or a data fault), 75
when it was stopped by SIGTERM after a checkpoint, 74 when the disk is full, anything else is a
crash.
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import logging
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ablate import recipes, records
from ablate.errors import DataError, LoadError, SpaceError
from ablate.stores import CHECKPOINTS
from ablate.trial import EXIT_NO_SPACE, EXIT_STOPPED, SHARE

PRELOAD = (
    "torch",
    "torch.distributed",
    "torch.nn.parallel",
    "torch.distributed.optim",
    "torch.distributed.fsdp",
    "torch._dynamo",
    "torch.utils.data",
    "torchvision.transforms",
    "numpy.ma",
    "PIL.JpegImagePlugin",
    "safetensors.torch",
    "open_clip",
    "ablate.markers",
    "ablate.recipes.openclip",
    "ablate.datasets.shards",
    "ablate.training.augment",
    "ablate.training.data",
    "ablate.training.distributed",
    "ablate.training.evaluate",
    "ablate.training.health",
    "ablate.training.inspect",
    "ablate.training.loop",
    "ablate.training.optim",
    "ablate.training.remote",
)
"""Modules that a warm parent imports, so that a forked worker starts at once."""

log = logging.getLogger("ablate")


def main(argv: list[str] | None = None) -> int:
    """Run one rank; the exit status."""
    stop = _StopFlag()
    folder = _trial_folder(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s rank {os.environ.get('RANK', '0')} %(name)s: %(message)s",
        stream=sys.stderr,
        force=True,
    )
    logging.getLogger().setLevel(logging.WARNING)
    log.setLevel(logging.INFO)
    faulthandler.enable()
    try:
        return _run(folder, stop)
    except Exception as error:
        if not _is_out_of_space(error):
            raise
        log.exception("no space left")
        return EXIT_NO_SPACE


class _StopFlag:
    """Set by SIGTERM; the loop asks for it once a step."""

    def __init__(self) -> None:
        self.set = False
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        self.set = True

    def __call__(self) -> bool:
        return self.set


def _trial_folder(arguments: list[str]) -> Path:
    given = arguments[0] if arguments else os.environ.get("ABLATE_TRIAL")
    if not given:
        raise SystemExit(
            "which trial? Give its folder: python -m ablate.training.worker TRIAL_FOLDER "
            "(or set ABLATE_TRIAL)"
        )
    folder = Path(given).resolve()
    if not (folder / "trial.json").is_file():
        raise SystemExit(f"{folder} holds no trial.json; give the folder of a trial")
    return folder


def _run(folder: Path, stop: _StopFlag) -> int:
    from ablate.training import distributed, loop, optim, remote
    from ablate.training.inspect import trial_record

    where = os.environ.get(CHECKPOINTS)
    began = time.perf_counter()
    trial = records.read_json(folder / "trial.json")
    wanted = trial["gang"]
    gpus = int(wanted.get("gpus_per_worker", 0))
    gang = distributed.join(gpus_per_worker=gpus)
    workers = int(wanted["workers"])
    if gang.world_size * int(os.environ.get(SHARE, "1")) != workers:
        raise SystemExit(
            f"trial.json asks for {workers} workers, and WORLD_SIZE is "
            f"{gang.world_size}. Start that many, e.g. torchrun --nproc_per_node "
            f"{workers} -m ablate.training.worker {folder}"
        )
    _set_up_torch(gang, cpus=float(wanted.get("cpus_per_worker") or 0))
    attempt = distributed.broadcast(_attempt_number(folder) if gang.first else None, gang)
    writer = records.AttemptWriter(folder, attempt) if gang.first else None

    recipe = recipes.load(trial["recipe"])
    config = recipe.Config(**trial["config"])
    root = Path(trial["root"])
    placed = recipes.absolute(config, recipe.PATH_FIELDS, root=root)
    try:
        if gang.world_size < workers:
            placed = recipe.share_out(
                placed,
                workers=workers,
                ranks=gang.world_size,
                num_samples=recipe.num_samples(config, root=root),
            )
        task = recipe.build(placed, rank=gang.rank, world_size=gang.world_size, device=gang.device)
    except (DataError, LoadError) as error:  # every rank meets the same
        log.exception("the trial cannot be built")
        if writer is not None:
            kind = "data fault" if isinstance(error, DataError) else "weights"
            writer.result({"status": "failed", "reason": f"{kind}: {error}"})
        return 0
    if gang.first and task.parameter_groups:
        log.info("%s", optim.sentence(task.parameter_groups))
    try:
        objective = loop.Objective(trial["objective"]["metric"], trial["objective"]["direction"])
        monitor = (
            _monitor(trial, task, gang, chance=recipe.chance(config, root=root))
            if gang.first
            else None
        )
        ending = loop.train(
            task,
            gang,
            trial_id=trial["id"],
            checkpoints=folder / "checkpoints",
            objective=objective,
            stop_asked=stop,
            config=config.model_dump(mode="json"),
            may_differ=recipe.NOT_IDENTITY,
            workers=workers,
            writer=writer,
            monitor=monitor,
            remote=remote.Remote(where) if gang.first and where else None,
        )
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        # Any rank may be the one; the others lose their peer, and the result stands.
        log.exception("out of memory")
        writer = writer or records.AttemptWriter(folder, attempt)
        writer.result({"status": "infeasible", "reason": _memory_advice(task, error)})
        return 0
    except DataError as error:
        log.exception("the data cannot be used")
        writer = writer or records.AttemptWriter(folder, attempt)
        writer.result({"status": "failed", "reason": f"data fault: {error}"})
        return 0

    distributed.barrier(gang)
    distributed.leave()
    if ending.status == "stopped":
        log.info("stopped at step %d of %d", ending.progress.step, ending.steps_total)
        return EXIT_STOPPED
    if writer is not None:
        assert monitor is not None
        if ending.status in ("completed", "diverged"):
            for event in monitor.finish():
                writer.event(event.to_dict())
        wall_s = time.perf_counter() - began
        writer.result(_result(ending, monitor, task, gang, wall_s=wall_s))
        writer.close()
        if ending.status in ("completed", "diverged"):
            step = ending.progress.step
            learned = trial_record(
                recipe, placed, task.model, task.optimizer, step=step, device=gang.device
            )
            writer.learning(learned)
            log.info("%s: %s", learned["verdict"], "; ".join(learned["reasons"]))
        log.info("%s: %s", ending.status, ending.reason)
    return 0


def _is_out_of_space(error: Exception) -> bool:
    # safetensors tells the operating system's error in words alone.
    return isinstance(error, SpaceError) or any(
        os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)
    )


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    # The allocator of the CPU has no exception of its own.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def _memory_advice(task: Any, error: Exception) -> str:
    """What did not fit, and the batch size to try; the global batch stays as it is."""
    given = f"batch_size {task.batch_size} with accum_freq {task.accum_freq} does not fit in memory"
    if task.batch_size % 2 == 0:
        given += (
            f"; try batch_size {task.batch_size // 2} with accum_freq {task.accum_freq * 2}: the "
            "loss then sees the same global batch, BatchNorm one of half the size"
        )
    elif task.batch_size > 1:
        given += f"; try batch_size {task.batch_size // 2}"
    return f"{given}. {str(error).splitlines()[0]}"


def _set_up_torch(gang: Any, *, cpus: float) -> None:
    """Threads for this rank's share of the machine, and arithmetic that repeats itself."""
    import torch

    available = len(os.sched_getaffinity(0))
    threads = int(cpus) or available // gang.local_world_size
    torch.set_num_threads(max(1, min(threads, available)))
    if gang.device.type == "cpu":
        _keep_freed_memory()
    if gang.device.type == "cuda":
        # TF32 as the peer; unlike the peer no autotuning, whose choice of kernels may change.
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed, up to 2 GiB, for the next step.

    Each step allocates the same activations and gradients. glibc gives large blocks back to the
    kernel, which hands out zeroed pages anew: a tenth of a small model's step. Changes no number.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc alone has it
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest that it takes
        mallopt(_M_TRIM_THRESHOLD, (2 << 30) - 1)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3), from glibc's malloc.h."""


def _attempt_number(folder: Path) -> int:
    given = os.environ.get("ABLATE_ATTEMPT")
    if given:
        return int(given)
    return max(records.TrialRecord(folder).attempts(), default=0) + 1


def _monitor(trial: dict[str, Any], task: Any, gang: Any, *, chance: float) -> Any:
    from ablate.markers import Context, Monitor, Thresholds
    from ablate.training.data import steps_per_epoch

    per_epoch = steps_per_epoch(
        task.num_samples,
        batch_size=task.batch_size,
        accum_freq=task.accum_freq,
        world_size=gang.world_size,
    )
    context = Context(
        global_batch=task.global_batch,
        warmup=task.warmup,
        steps_total=per_epoch * task.epochs,
        chance_top1=chance or None,
        feature_dim=task.feature_dim,
    )
    return Monitor(Thresholds(trial.get("markers") or {}), context)


def _result(ending: Any, monitor: Any, task: Any, gang: Any, *, wall_s: float) -> dict[str, Any]:
    import torch

    verdict = monitor.verdict()
    progress = ending.progress
    memory = None
    if gang.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(gang.device) / 2**30
    return {
        "status": ending.status,
        "reason": verdict.message if ending.status == "diverged" else ending.reason,
        "step": progress.step,
        "steps_total": ending.steps_total,
        "final": progress.final or {},
        "best": progress.best or {},
        "verdict": verdict.name,
        "flags": list(verdict.flags),
        "stop": asdict(verdict.stop) if verdict.stop else None,
        "markers": verdict.to_dict(),
        "context": asdict(monitor.context),
        "wall_s": wall_s,
        "train_s": progress.train_s,
        "eval_s": progress.eval_s,
        "skipped_steps": progress.skipped,
        "data_faults": progress.faults,
        "peak_memory_gib": memory,
        "num_parameters": sum(p.numel() for p in task.model.parameters()),
        "parameter_groups": dict(task.parameter_groups),
        "facts": {
            "threads": torch.get_num_threads(),
            "device": str(gang.device),
            "torch": torch.__version__,
            "data": task.samples.fingerprint,
            **task.facts,
        },
    }


if __name__ == "__main__":
    sys.exit(main())
