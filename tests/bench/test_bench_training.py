"""Training and evaluation speed as ratios against the peer and a bare loop, in one run.

    pytest tests/bench/test_bench_training.py -m bench -s -k emoji

Same machine, model (tiny-rn-a), data, batch of 128, ranks and loader processes, one thread a rank.
The peer is open_clip_train.main 3.3.0 with its own data pipeline; ours is the worker as a cluster
starts it, forked from a process that has imported what it needs (as is the peer), with all its
measurements and markers; its checkpoint is written before the clock starts. Timed are the second
epoch and the second zero-shot evaluation. The runners take turns; printed is the median over the
rounds of the ratio within a round, of processor time (all processes of the slowest rank; other
programs disturb it least) and of wall time. ROUNDS in the environment sets the number of rounds.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import socket
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import small_trials
from looking import EVERY_STEP, UPDATES
from PIL import Image

from ablate.recipes.openclip.config import FAST

pytestmark = [pytest.mark.bench, pytest.mark.timeout(3000)]

ROUNDS = int(os.environ.get("ROUNDS", "3"))
STEPS = 20
FIELDS: dict[str, Any] = {
    "model": "tiny-rn-a", "precision": "fp32", "batch_size": 128, "lr": 1e-3, "beta2": 0.98,
    "eps": 1e-6, "warmup": 50, "epochs": 2, "workers": 0, "zeroshot_frequency": 1,
    "train_data": "train/{00000..00007}.tar", "imagenet_val": "val",
    "train_num_samples": STEPS * 128, **dict.fromkeys(FAST, True),
}  # fmt: skip
EXACT = {"speed": "exact", **dict.fromkeys(FAST, False)}
"""The peer's arithmetic. The default is ``fast``, which `small_trials` turns off field by field."""
Times = dict[str, float]


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 px pictures, most of them icons: reading takes about as long as the small model."""
    from ablate.training.data.emoji import prepare_emoji

    folder = tmp_path_factory.mktemp("emoji")
    os.environ["ABLATE_CACHE"] = str(folder / "cache")
    return prepare_emoji(folder / "data").folder


@pytest.fixture(scope="module")
def photos(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 x 300 px pictures with a photograph's spectrum, of 54 kB; the classes are the emojis'."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "train").mkdir()
    (folder / "val").symlink_to(emoji / "val")
    rng = np.random.default_rng(0)
    pictures = [_photo(rng) for _ in range(32)]
    for shard in range(8):
        pairs = [(pictures[i % 32], f"picture {i} of many") for i in range(STEPS * 16)]
        small_trials.write_pairs(folder / "train" / f"{shard:05d}.tar", pairs)
    return folder


def _photo(rng: np.random.Generator, height: int = 300, width: int = 400) -> bytes:
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    waves = rng.normal(size=(2, 3, *frequency.shape)) / frequency**1.1
    planes = np.fft.irfft2(waves[0] + 1j * waves[1], (height, width))
    grey, *colours = planes / planes.std(axis=(1, 2), keepdims=True)
    pixels = 120 + 45 * np.stack([grey + 0.3 * colours[0], grey, grey + 0.3 * colours[1]], axis=2)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def test_emoji(emoji: Path, tmp_path: Path) -> None:
    """Reading binds the peer: ours against it, and against a loop with batches in memory."""
    runners = {
        "peer": (_peer, {}), "bare": (_bare, {}), "ours": (_ours, {}), "exact": (_ours, EXACT),
        "reader": (_ours, {"workers": 1}),
    }  # fmt: skip
    found = _measure(runners, emoji, tmp_path)
    _print("training against the peer, default", found, "train", "peer", "ours")
    _print("the same, exact", found, "train", "peer", "exact")
    _print("training against a bare loop in memory", found, "train", "bare", "ours")
    _print(
        "the same with a process that reads (wall is what counts)", found, "train", "bare", "reader"
    )
    _print("second zero-shot evaluation, one rank", found, "eval", "peer", "ours")
    shares = [times["measuring cpu"] / times["train cpu"] for times in found["ours"]]
    print(f"measurements, markers, records: {statistics.median(shares):.2%} of a step (cpu)")


def test_photos(photos: Path, tmp_path: Path) -> None:
    """Decoding binds: with the cache, without it, and with fast decoding in its place."""
    uncached = {"cache_gib": 0}
    runners = {
        "peer": (_peer, {}), "ours": (_ours, {}), "exact": (_ours, EXACT),
        "uncached": (_ours, uncached), "fast_jpeg": (_ours, {**uncached, "fast_jpeg": True}),
    }  # fmt: skip
    found = _measure(runners, photos, tmp_path)
    _print("photos, default (decoded once)", found, "train", "peer", "ours")
    _print("photos, exact (decoded once)", found, "train", "peer", "exact")
    _print("photos, default, no cache", found, "train", "peer", "uncached")
    _print("photos, default, no cache, fast_jpeg", found, "train", "peer", "fast_jpeg")


def test_compute(emoji: Path, tmp_path: Path) -> None:
    """At 96 px the model takes nine times as long, reading about the same."""
    large = {"force_image_size": 96, "batch_size": 64, "train_num_samples": 64 * 10}
    runners = {
        "peer": (_peer, large), "ours": (_ours, large), "exact": (_ours, {**large, **EXACT})
    }  # fmt: skip
    found = _measure(runners, emoji, tmp_path)
    _print("computing binds, default", found, "train", "peer", "ours")
    _print("computing binds, exact", found, "train", "peer", "exact")


def test_ranks(emoji: Path, tmp_path: Path) -> None:
    """Two ranks: evaluation against the peer, whose first rank works alone, and scaling."""
    short = {"train_num_samples": 2 * 128 * 6}
    one = {"train_num_samples": 128 * 6}
    runners = {
        "peer on 2": (_peer, short, 2), "ours on 2": (_ours, short, 2), "ours on 1": (_ours, one)
    }  # fmt: skip
    found = _measure(runners, emoji, tmp_path)
    _print("second zero-shot evaluation, two ranks", found, "eval", "peer on 2", "ours on 2")
    _print("evaluation, one rank to two", found, "eval", "ours on 1", "ours on 2")
    _print("training against the peer, two ranks", found, "train", "peer on 2", "ours on 2")
    _print("time of a step, one rank to two", found, "train", "ours on 1", "ours on 2")


def _measure(
    runners: dict[str, tuple[Any, ...]], data: Path, folder: Path
) -> dict[str, list[Times]]:
    """Times of every runner in every round."""
    found: dict[str, list[Times]] = {name: [] for name in runners}
    for number in range(ROUNDS):
        for name, (runner, fields, *ranks) in runners.items():
            place = folder / f"{name}-{number}"
            times = _run(runner, place, data, {**FIELDS, **fields}, *ranks)
            found[name].append(times)
            print(name, {key: round(value, 2) for key, value in times.items()}, flush=True)
    return found


def _print(what: str, found: dict[str, list[Times]], part: str, base: str, ours: str) -> None:
    ratios = []
    for clock in ("cpu", "wall"):
        key = f"{part} {clock}"
        rounds = zip(found[base], found[ours], strict=True)
        each = [theirs[key] / mine[key] for theirs, mine in rounds]
        ratios.append(f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f}) {clock}")
    print(f"{what}: {', '.join(ratios)}", flush=True)


def _run(
    runner: Callable[..., None], folder: Path, data: Path, fields: dict[str, Any], ranks: int = 1
) -> Times:
    """Times of a gang, each rank a process of its own: of the slowest rank."""
    folder.mkdir(parents=True)
    if runner is _ours:
        small_trials.write_trial(folder / "trial", data, gang=ranks, **fields)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    common = {
        "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "ABLATE_CACHE": os.environ["ABLATE_CACHE"], "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    warm = multiprocessing.get_context("forkserver")
    warm.set_forkserver_preload(small_trials.PRELOADED)
    processes = []
    for rank in range(ranks):
        env = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        given = (runner, folder, data, fields, ranks, env)
        processes.append(warm.Process(target=_run_rank, args=given))
        processes[-1].start()
    for process in processes:
        process.join(1000)
    codes = [process.exitcode for process in processes]
    assert codes == [0] * ranks, (folder / "log-0").read_text()[-3000:]
    each = [json.loads(path.read_text()) for path in folder.glob("times-*")]
    assert len(each) == ranks
    return {key: max(times[key] for times in each if key in times) for key in each[0]}


# ----------------------------------------------------------------------- inside of a rank


def _run_rank(
    runner: Callable[..., None],
    folder: Path,
    data: Path,
    fields: dict[str, Any],
    ranks: int,
    env: dict[str, str],
) -> None:
    os.environ.update(env)
    with open(folder / f"log-{env['RANK']}", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    warnings.simplefilter("ignore")
    small_trials.add_models()
    runner(str(folder), str(data), fields, ranks)


class _Clock:
    """Processor and wall seconds of the last stretch of each name."""

    def __init__(self) -> None:
        self.times: Times = {}
        self.start()

    def start(self) -> None:
        self.began = self.now()

    def now(self) -> tuple[float, float]:
        children = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
        cpu = time.process_time() + sum(child.user + child.system for child in children)
        return cpu, time.perf_counter()

    def stop(self, name: str) -> None:
        for clock, before, after in zip(("cpu", "wall"), self.began, self.now(), strict=True):
            self.times[f"{name} {clock}"] = after - before

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            self.start()
            value = function(*given, **named)
            self.stop(name)
            return value

        return run

    def write(self, folder: str) -> None:
        name = f"times-{os.environ['RANK']}"
        Path(folder, name).write_text(json.dumps(self.times))


def _ours(folder: str, data: str, fields: dict[str, Any], ranks: int) -> None:
    """The worker itself; an epoch lies between the end of what follows one and the next's end."""
    from ablate.training import loop
    from ablate.training.evaluations.zero_shot import ZeroShot
    from ablate.trial import worker

    epochs, evaluations = _Clock(), _Clock()
    end_epoch = loop.Run.end_epoch

    def timed(run: Any, epoch: int) -> Any:
        nonlocal spent
        epochs.stop("train")
        epochs.times["measuring cpu"] = spent
        ending = end_epoch(run, epoch)
        if run.checkpoints.writer is not None:
            run.checkpoints.writer.wait()  # else the first steps would pay for it, once an epoch
        spent = 0.0
        epochs.start()
        return ending

    loop.Run.end_epoch = timed  # type: ignore[method-assign]
    spent = 0.0

    def counted(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def run(*given: Any, **named: Any) -> Any:
            nonlocal spent
            began = time.thread_time()
            value = function(*given, **named)
            spent += time.thread_time() - began
            return value

        setattr(owner, name, run)

    for owner, name in (*EVERY_STEP, *UPDATES):
        counted(owner, name)
    ZeroShot.run = evaluations.around("eval", ZeroShot.run)  # type: ignore
    assert worker.main([str(Path(folder) / "trial")]) == 0
    epochs.times.update(evaluations.times)
    epochs.write(folder)


def _bare(folder: str, data: str, fields: dict[str, Any], ranks: int) -> None:
    """Forward, backward, step on batches that are already in memory as floats."""
    import torch

    from ablate.recipes import openclip
    from ablate.training.data.augment import ToInput
    from ablate.training.data.batches import Batches
    from ablate.training.ranks import keep_freed_memory
    from ablate.trial.recipe import absolute

    torch.set_num_threads(1)
    keep_freed_memory()
    cpu = torch.device("cpu")
    config = absolute(
        openclip.Config(**fields), root=Path(data)
    )  # fmt: skip
    task = openclip.build(config, rank=0, world_size=1, device=cpu)
    source = Batches(
        task.data.samples, num_samples=task.length.num_samples, batch_size=config.batch_size,
        accum_freq=1, rank=0, world_size=1, seed=0,
    )  # fmt: skip
    to_input = ToInput([0.5] * 3, [0.25] * 3, device=cpu)
    batches = [
        source[number].tensors for number in range(task.length.num_samples // config.batch_size)
    ]
    memory = [(to_input(images), texts) for images, texts in batches]
    from open_clip.loss import ClipLoss

    loss, clock = ClipLoss(), _Clock()

    def epoch() -> None:
        for images, texts in memory:
            task.learner.optimizer.zero_grad()
            loss(**task.learner.model(images, texts)).backward()
            task.learner.optimizer.step()

    for _ in range(2):
        clock.around("train", epoch)()
    clock.write(folder)


def _peer(folder: str, data: str, fields: dict[str, Any], ranks: int) -> None:
    """The peer's main; replaced are ImageNet's names, and DDP as on_cpus does."""
    import torch
    from open_clip_train import main as peer
    from open_clip_train import zero_shot

    from ablate.recipes import openclip
    from ablate.recipes.openclip import on_cpus
    from ablate.trial.recipe import absolute

    assert torch.nn.parallel.DistributedDataParallel is on_cpus.OnCpus
    torch.set_num_threads(1)
    openclip.model.register_models()
    names, templates = openclip.zero_shot_classes(str(Path(data) / "val"))
    zero_shot.IMAGENET_CLASSNAMES, zero_shot.OPENAI_IMAGENET_TEMPLATES = names, templates
    clock = _Clock()
    peer.train_one_epoch = clock.around("train", peer.train_one_epoch)
    evaluate = peer.evaluate

    def timed(model: Any, data: Any, epoch: int, *given: Any, **named: Any) -> Any:
        clock.start()
        value = evaluate(model, data, epoch, *given, **named)
        clock.stop("eval")
        return value

    peer.evaluate = timed
    config = absolute(openclip.Config(**fields), root=Path(data))
    command = openclip.command(config, workers=ranks)
    arguments = command[command.index("open_clip_train.main") + 1 :]
    arguments += ["--device", "cpu", "--logs", folder, "--save-frequency", "0"]
    arguments += ["--name", "peer"]
    peer.main(arguments)
    clock.write(folder)
