"""Runs of open_clip_train.main 3.3.0 itself, on the batches that our loop sees.

The peer's main() parses our exported command, makes its own model, optimizer, scheduler, scaler
and loss, and trains with its own train_one_epoch. Replaced are, as the tests' names say, its data
pipeline (seeded by process id and time) by our batches, the hard-wired ImageNet names by those of
the data, and on CPUs DDP as an exported train.sh replaces it. The loss module is wrapped to note
each value. The whole peer, with nothing replaced, is run by test_end_to_end.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import small_trials
import torch
from small_trials import log_of, run, write_trial

RESULT = "peer-{rank}.json"

STEPS = 52

SMALL: dict[str, Any] = {
    "model": "tiny-test-rn",
    "train_num_samples": 26 * 16,
    "epochs": 2,
    "zeroshot_frequency": 0,
}
"""2 epochs of 26 steps of 16 samples."""


def cases(table: Mapping[str, dict[str, Any]], in_the_suite: Collection[str]) -> list[Any]:
    """The configurations of a table as parameters; those not in the suite run on demand."""
    assert set(in_the_suite) <= set(table)
    on_demand = pytest.mark.exhaustive
    return [
        pytest.param(fields, id=name, marks=() if name in in_the_suite else on_demand)
        for name, fields in table.items()
    ]


TOLERANCE = 1e-6
"""Relative, for every precision: ours are the peer's operations in its order, on one machine."""


def follow(
    folder: Path,
    data: Path,
    workers: int,
    changes: dict[str, Any],
    *,
    gpus: int = 0,
    tolerance: float = TOLERANCE,
) -> None:
    """Train with both, and compare the loss and logit scale of every step, and the weights."""
    accum_freq = changes.get("accum_freq", 1)
    fields = {**SMALL, "batch_size": 16 // workers // accum_freq, **changes}
    trial = write_trial(folder / "ours", data, gang=workers, gpus=gpus, **fields)
    run_peer(folder / "peer", data, workers=workers, fields=fields, gpus=gpus)
    assert run(trial.folder, workers=workers) == [0] * workers, log_of(trial)
    rows = trial.trace()

    ranks = [
        json.loads((folder / "peer" / RESULT.format(rank=rank)).read_text())
        for rank in range(workers)
    ]
    # With accumulation the loss is called once for each micro-batch; the last one is the step's.
    last = slice(accum_freq - 1, None, accum_freq)
    losses = np.mean([rank["losses"][last] for rank in ranks], axis=0)
    scales = ranks[0]["scales"][last]
    assert len(rows) == len(losses) == STEPS
    assert [row["loss"] for row in rows] == pytest.approx(losses.tolist(), rel=tolerance)
    # The peer's scale is the one before the step, ours the one after it; with pure_* the peer also
    # takes the exponential in 16 bits.
    bits = {"pure_bf16": 2**-8, "pure_fp16": 2**-10}.get(fields.get("precision", ""), tolerance)
    assert [row["logit_scale"] for row in rows[:-1]] == pytest.approx(scales[1:], rel=bits)

    theirs = torch.load(
        folder / "peer" / "logs" / "peer" / "checkpoints" / f"epoch_{fields['epochs']}.pt",
        map_location="cpu",
        weights_only=True,
    )["state_dict"]
    newest = sorted((trial.folder / "checkpoints").glob("step-*"))[-1]
    ours = safetensors.torch.load_file(newest / "model.safetensors")
    for name, value in ours.items():
        expected = theirs[("module." if workers > 1 else "") + name]
        difference = (value.double() - expected.double()).norm()
        assert difference <= tolerance * expected.double().norm() + 1e-12, name


def run_peer(
    folder: Path, data: Path, *, workers: int, fields: dict[str, Any], gpus: int = 0
) -> None:
    """Train with the peer on CPUs, or each rank on a GPU of its own.

    Leaves peer-<rank>.json (losses, scales) and its checkpoint.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(small_trials.PRELOADED)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    port = str(listening.getsockname()[1])
    listening.close()
    processes = []
    for rank in range(workers):
        env = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(workers),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "ABLATE_CACHE": os.environ["ABLATE_CACHE"],
            "HF_HUB_OFFLINE": "1",
        }
        process = context.Process(target=_train, args=(folder, data, env, fields, gpus))
        process.start()
        processes.append(process)
    codes = small_trials.Ranks(tuple(processes)).wait()
    logs = "\n".join(path.read_text() for path in folder.glob("peer-log-*"))
    assert codes == [0] * workers, logs


def _train(
    folder: Path, data: Path, env: dict[str, str], fields: dict[str, Any], gpus: int
) -> None:
    os.environ.update(env)
    rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
    folder.mkdir(parents=True, exist_ok=True)
    log = open(folder / f"peer-log-{rank}", "w", buffering=1)  # noqa: SIM115
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    try:
        _main(folder, data, rank, world_size, fields, gpus)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def _main(
    folder: Path, data: Path, rank: int, world_size: int, fields: dict[str, Any], gpus: int
) -> None:
    from open_clip_train import main as peer
    from open_clip_train import zero_shot

    from ablate.recipes import openclip
    from ablate.trial.recipe import absolute

    torch.set_num_threads(1)
    openclip.model.register_models()
    small_trials.add_models()
    chosen = absolute(small_trials.config(**fields), root=data)
    arguments = _line(chosen, world_size, folder=folder, root=data)
    arguments += [
        "--device",
        "cuda" if gpus else "cpu",
        "--logs",
        str(folder / "logs"),
        "--name",
        "peer",
    ]
    arguments += ["--log-every-n-steps", "100000", "--save-frequency", "0"]

    losses: list[float] = []
    scales: list[float] = []
    create_loss = peer.create_loss

    def noting_loss(args: Any) -> Any:
        loss = create_loss(args)

        def noted(*given: Any, **named: Any) -> Any:
            values = loss(*given, **named)
            losses.append(float(sum(values.values())))
            scales.append(float(named["logit_scale"]))
            return values

        return noted

    def our_batches(args: Any, transforms: Any, epoch: int = 0, tokenizer: Any = None) -> Any:
        return {
            "train": _OurBatches(chosen, rank, world_size, torch.device(args.device)),
            "imagenet-val": peer_data.get_imagenet(args, transforms, "val"),
        }

    from open_clip_train import data as peer_data

    names, templates = openclip.zero_shot_classes(chosen.imagenet_val)
    assert templates is not None
    peer.create_loss = noting_loss
    peer.get_data = our_batches
    if not gpus:
        from ablate.recipes.openclip import on_cpus

        assert torch.nn.parallel.DistributedDataParallel is on_cpus.OnCpus
    zero_shot.IMAGENET_CLASSNAMES = names
    zero_shot.OPENAI_IMAGENET_TEMPLATES = templates
    assert peer.main(arguments) is None
    content = {"losses": losses, "scales": scales}
    (folder / RESULT.format(rank=rank)).write_text(json.dumps(content))


def _line(chosen: Any, workers: int, *, folder: Path, root: Path) -> list[str]:
    """The peer's arguments: our command, or where no flag says it, the exported line with the model
    file that it ships."""
    from ablate.recipes import openclip
    from ablate.trial.upstream import Beside

    try:
        command = openclip.command(chosen, workers=workers)
    except ValueError:
        line = openclip.upstream(chosen, workers=workers, root=root)
        for name, text in line.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return [
            f"{word.prefix}{folder / word.path}" if isinstance(word, Beside) else word
            for word in line.arguments
        ]
    return command[command.index("open_clip_train.main") + 1 :]


class _OurBatches:
    """Our micro-batches in the shape of the peer's DataInfo."""

    def __init__(self, chosen: Any, rank: int, world_size: int, device: Any) -> None:
        from ablate.recipes import openclip
        from ablate.training.data.augment import ToInput
        from ablate.training.data.batches import Batches

        task = openclip.build(chosen, rank=rank, world_size=world_size, device=device)
        self._batches = Batches(
            task.data.samples,
            num_samples=task.length.num_samples,
            batch_size=task.length.batch_size,
            accum_freq=task.length.accum_freq,
            rank=rank,
            world_size=world_size,
            seed=task.seed,
        )
        from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, get_input_dtype

        self._to_input = ToInput(
            OPENAI_DATASET_MEAN,
            OPENAI_DATASET_STD,
            device=device,
            dtype=get_input_dtype(chosen.precision) or torch.float32,
        )
        per_epoch = openclip.num_steps(
            chosen, workers=world_size, num_samples=task.length.num_samples
        )
        self._per_epoch = per_epoch // chosen.epochs * chosen.accum_freq
        self._epoch = 0
        self.dataloader = self
        self.num_batches = self._per_epoch
        self.num_samples = task.length.num_samples
        self.shared_epoch = SimpleNamespace()

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Any:
        for number in range(self._per_epoch):
            images, texts = self._batches[self._epoch * self._per_epoch + number].tensors
            yield self._to_input(images.to(self._to_input.mean.device)), texts
