"""data_order: stream, the peer's own pipeline: what it gives, what it refuses, what it admits."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import io
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_trials
import torch
from PIL import Image
from small_trials import config

from ablate.errors import DataError
from ablate.recipes import openclip
from ablate.training.data.shards import index_shards
from ablate.trial.recipe import Role, fields_of

pytest.importorskip("webdataset")

# webdataset 0.2.86 leaves shards open until the garbage is collected.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(autouse=True)
def closed_shards() -> Iterator[None]:
    yield
    gc.collect()


def stream(data: Path, start: int, stop: int, **changes: Any) -> Iterator[Any]:
    """The stream's batches; an image is told by the sum of its pixels, a caption by its length."""
    pattern = str(data / "train" / "{00000..00002}.tar")
    chosen = config(data_order="stream", **{**changes, "train_data": pattern})

    def sum_of_pixels(image: Image.Image) -> torch.Tensor:
        return torch.tensor(int(np.asarray(image, np.int64).sum()))

    def length(text: str) -> torch.Tensor:
        return torch.tensor([len(text)])

    index = index_shards(pattern, cache=None)
    return openclip.data.make_stream(chosen, index, 96, sum_of_pixels, length, world_size=1)(
        start, stop
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_gives_every_sample_once(data: Path, workers: int) -> None:
    """Six batches of 16 are the 96 samples; the next epoch has them in another order."""
    index = index_shards(str(data / "train" / "{00000..00002}.tar"), cache=None)
    pairs = [index.read(number) for number in range(96)]
    expected = sorted(
        int(np.asarray(Image.open(io.BytesIO(image)).convert("RGB"), np.int64).sum())
        for image, _ in pairs
    )
    batches = [images for (images, _), _, _ in stream(data, 0, 12, workers=workers)]
    assert len(batches) == 12
    first, second = (torch.cat(batches[e : e + 6]).tolist() for e in (0, 6))
    assert sorted(first) == sorted(second) == expected
    assert first != second


def test_a_resumed_stream_gives_the_batches_that_are_left(data: Path) -> None:
    """From micro-batch 8 of 12 on there are four, of whole size."""
    batches = list(stream(data, 8, 12))
    assert [len(images) for (images, _), _, _ in batches] == [16] * 4


@pytest.mark.parametrize("order", ["stream", "indexed"])
def test_a_plan_refuses_commands_and_addresses(order: str) -> None:
    """Shards are local files, in either order."""
    for pattern in ("pipe:cat a.tar", "https://example.org/a.tar", "a.tar::s3://bucket/b.tar"):
        placed = config(data_order=order, train_data=pattern)
        with pytest.raises(DataError, match="local or mounted folder"):
            openclip.check(placed, workers=1, gpus=0)


def test_a_stream_opens_nothing_but_local_files(data: Path) -> None:
    """Also when webdataset itself is asked for something else."""
    next(stream(data, 0, 1))
    gopen = importlib.import_module("webdataset.gopen").gopen
    for url in ("pipe:echo hello", "http://127.0.0.1:9/a.tar", "unknown://a.tar"):
        with pytest.raises(ValueError, match="no gopen handler"):
            gopen(url)


def test_loaders_that_would_wait_for_ever_are_refused(data: Path) -> None:
    """3 shards of 32 for 4 loading processes, or batches of 64 from one shard each."""
    with pytest.raises(DataError, match="get 0 samples, fewer than batch_size 16"):
        stream(data, 0, 1, workers=4)
    with pytest.raises(DataError, match="get 32 samples, fewer than batch_size 64"):
        stream(data, 0, 1, workers=3, batch_size=64)


def test_the_plan_says_what_a_stream_is() -> None:
    """A warning with it, none without."""
    chosen = config(data_order="stream")
    found = openclip.check(chosen, workers=1, gpus=0)
    assert any("not reproducible" in warning for warning in found)
    plain = openclip.check(config(), workers=1, gpus=0)
    assert not any("reproducible" in warning for warning in plain)


def alive(ranks: small_trials.Ranks) -> bool:
    return all(process.is_alive() for process in ranks.processes)


def test_a_streamed_trial_resumes_and_admits_what_it_is(tmp_path: Path, data: Path) -> None:
    """Two ranks with a loader each, stopped in the first epoch: every step is made, none twice."""
    folder = tmp_path / "trial"
    trial = small_trials.write_trial(
        folder, data, gang=2, data_order="stream", workers=1, batch_size=8
    )
    ranks = small_trials.start(folder, workers=2)
    small_trials.wait_for(lambda: len(trial.trace()) >= 2 or not alive(ranks), "the second step")
    ranks.signal(signal.SIGTERM)
    assert ranks.wait() == [75, 75]
    stopped = trial.trace()[-1]["step"]
    assert small_trials.run(folder, workers=2) == [0, 0]
    assert [row["step"] for row in trial.trace()] == list(range(1, 13))
    result = trial.result(2)
    assert result is not None and result["status"] == "completed"
    assert result["facts"]["data_order"].startswith("streamed, not reproducible")
    log = (folder / "log-0.txt").read_text()
    assert f"resumed at step {stopped} of 12" in log
    assert "data order: streamed, not reproducible" in log


def test_the_order_is_part_of_a_trials_identity() -> None:
    """Cells that differ in data_order are different trials; indexed is the default."""
    assert "data_order" not in fields_of(openclip.Config, Role.FREE)
    assert config().data_order == "indexed"
