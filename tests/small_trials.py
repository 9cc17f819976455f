"""Small real trials for tests: a data set of drawn shapes, trial folders, and warm gangs.

The data set has 96 training pairs in three shards and 4 classes of 3 evaluation images; an epoch
of a tiny-rn-a trial takes about a second. Gangs are forked from a warm server, so a rank starts in
a tenth of a second.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ablate.recipes.openclip import PRELOAD
from ablate.records.folder import TrialRecord
from ablate.trial.identity import identify
from ablate.trial.recipe import Role, fields_of, load

CLASSES = ("red square", "green square", "blue disc", "yellow disc")
_COLOURS = ((220, 30, 30), (30, 200, 30), (30, 30, 220), (230, 220, 20))
NUM_SHARDS = 3
SHARD_SAMPLES = 32
DEADLINE_S = 240.0
MODELS = Path(__file__).parent / "models"
PRELOADED = [*PRELOAD, "open_clip_train.main", "small_trials"]


def draw(kind: int, rng: np.random.Generator, *, side: int = 40) -> bytes:
    """A JPEG of one of CLASSES on a grey ground, somewhere in the picture."""
    pixels = np.full((side, side, 3), rng.integers(90, 160), np.uint8)
    y, x = np.mgrid[:side, :side]
    cy, cx = rng.integers(12, side - 12, size=2)
    r = rng.integers(7, 12)
    inside = (abs(y - cy) < r) & (abs(x - cx) < r)
    if kind >= 2:
        inside = (y - cy) ** 2 + (x - cx) ** 2 < r * r
    pixels[inside] = _COLOURS[kind]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=92)
    return file.getvalue()


def write_pairs(path: Path, pairs: Iterable[tuple[bytes, str]]) -> None:
    """A WebDataset shard of (image file, caption)."""
    with tarfile.open(path, "w") as tar:
        for number, (image, caption) in enumerate(pairs):
            for ending, content in (("jpg", image), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{path.stem}{number:05d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def make_data(folder: Path) -> Path:
    """train/{00000..00002}.tar and val/<class>/<n>.jpg under `folder`."""
    rng = np.random.default_rng(7)
    (folder / "train").mkdir(parents=True)
    for shard in range(NUM_SHARDS):
        pairs = []
        for _ in range(SHARD_SAMPLES):
            kind = int(rng.integers(len(CLASSES)))
            form = ("a {}", "photo of a {}", "the {} here")[int(rng.integers(3))]
            pairs.append((draw(kind, rng), form.format(CLASSES[kind])))
        write_pairs(folder / "train" / f"{shard:05d}.tar", pairs)
    draw_classes(folder / "val", CLASSES, rng)
    return folder


def draw_classes(
    folder: Path, names: Sequence[str], rng: np.random.Generator | None = None
) -> Path:
    """A folder of three images for each class, with its names and templates."""
    rng = rng or np.random.default_rng(7)
    for kind, name in enumerate(names):
        place = folder / f"{kind}_{name.replace(' ', '_')}"
        place.mkdir(parents=True)
        for number in range(3):
            (place / f"{number}.jpg").write_bytes(draw(kind % len(CLASSES), rng))
    (folder / "classnames.json").write_text(json.dumps(list(names)))
    (folder / "templates.json").write_text(json.dumps(["a {}", "{} on grey"]))
    return folder


def fields(**changes: Any) -> dict[str, Any]:
    """Fields of a run of 2 epochs of 6 steps on the small data (paths relative to its folder).

    What only rounds otherwise is off, one by one: a test turns on what it is about.
    """
    return {
        "model": "tiny-rn-a",
        "precision": "fp32",
        "fused": False,
        "channels_last": False,
        "fast_resize": False,
        "batch_size": 16,
        "lr": 1e-3,
        "beta2": 0.98,
        "eps": 1e-6,
        "warmup": 4,
        "epochs": 2,
        "workers": 0,
        "train_data": "train/{00000..00002}.tar",
        "imagenet_val": "val",
        "zeroshot_frequency": 1,
        **changes,
    }


def config(**changes: Any) -> Any:
    return load("openclip").Config(**fields(**changes))


def write_trial(
    folder: Path,
    data: Path,
    *,
    gang: int = 1,
    gpus: int = 0,
    markers: Mapping[str, Any] | None = None,
    **changes: Any,
) -> TrialRecord:
    """A trial folder with its trial.json."""
    free = fields_of(load("openclip").Config, Role.FREE)
    content = config(**changes).model_dump(mode="json")
    folder.mkdir(parents=True)
    trial = {
        "format": 1,
        "id": identify("openclip", content, workers=gang, not_identity=free),
        "study": "test",
        "levels": {},
        "seed": content["seed"],
        "recipe": "openclip",
        "config": content,
        "gang": {"workers": gang, "gpus_per_worker": gpus, "cpus_per_worker": 1},
        "objective": {"metric": "imagenet_top1", "direction": "maximize", "margin": 0.005},
        "markers": dict(markers or {}),
        "root": str(data),
    }
    (folder / "trial.json").write_text(json.dumps(trial))
    return TrialRecord(folder)


@dataclass(frozen=True, slots=True)
class Ranks:
    """The running ranks of one attempt."""

    processes: tuple[ForkServerProcess, ...]
    deadline_s: float = DEADLINE_S

    def wait(self) -> list[int | None]:
        """Exit codes; negative numbers are signals."""
        deadline = time.monotonic() + self.deadline_s
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    def wait_for_a_death(self) -> list[int | None]:
        """Wait until the first rank ends, SIGKILL the others at once; exit codes."""
        sentinels = [process.sentinel for process in self.processes]
        assert multiprocessing.connection.wait(sentinels, timeout=self.deadline_s)
        self.kill()
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """SIGKILL whatever is left."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()

    def signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            assert process.pid is not None
            os.kill(process.pid, number)


def start(
    folder: Path,
    *,
    workers: int = 1,
    prepare: Callable[[], None] | None = None,
    deadline_s: float = DEADLINE_S,
    **env: str,
) -> Ranks:
    """Start all ranks of a trial, each a process forked from the warm server.

    `prepare` is called in each of them before it begins; a module's own function, or a partial.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    port = str(listening.getsockname()[1])
    listening.close()
    common = {"WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(workers):
        own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), **_settings(), **env}
        process = context.Process(target=_run_rank, args=(str(folder), own, prepare))
        process.start()
        processes.append(process)
    return Ranks(tuple(processes), deadline_s)


def run(
    folder: Path,
    *,
    workers: int = 1,
    prepare: Callable[[], None] | None = None,
    deadline_s: float = DEADLINE_S,
    **env: str,
) -> list[int | None]:
    """Run all ranks of a trial to their end; exit codes."""
    ranks = start(folder, workers=workers, prepare=prepare, deadline_s=deadline_s, **env)
    return ranks.wait()


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of `condition`, asked a hundred times a second."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"waited {DEADLINE_S:.0f} s in vain for {what}")


def log_of(trial: TrialRecord) -> str:
    """All that the ranks of a trial printed."""
    return "\n".join(path.read_text() for path in sorted(trial.folder.glob("log-*.txt")))


def _settings() -> dict[str, str]:
    return {"ABLATE_CACHE": os.environ["ABLATE_CACHE"], "HF_HUB_OFFLINE": "1"}


def add_models() -> None:
    """Make the models of tests/models known to open_clip: a step takes milliseconds."""
    import open_clip

    open_clip.add_model_config(MODELS)


def _run_rank(folder: str, env: Mapping[str, str], prepare: Callable[[], None] | None) -> None:
    os.environ.update(env)
    log = open(Path(folder) / f"log-{env['RANK']}.txt", "a", buffering=1)  # noqa: SIM115
    os.dup2(log.fileno(), 2)
    from ablate.trial import worker

    code = 1
    try:
        add_models()
        if prepare is not None:
            prepare()
        code = worker.main([folder])
    except SystemExit as ending:
        print(ending, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
