"""Settings that make a trial faster: each acts, and moves the numbers no further than it says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from small_trials import config, run, write_trial

from ablate.recipes import openclip
from ablate.trial.recipe import absolute


def losses(
    folder: Path, data: Path, env: Mapping[str, str] | None = None, **changes: Any
) -> list[float]:
    """Losses of one epoch of six steps."""
    trial = write_trial(folder, data, epochs=1, zeroshot_frequency=0, **changes)
    assert run(trial.folder, **(env or {})) == [0], (folder / "log-0.txt").read_text()
    return [row["loss"] for row in trial.trace()]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, data: Path) -> list[float]:
    return losses(tmp_path_factory.mktemp("plain") / "trial", data)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"prefetch": 1, "pin_memory": False, "workers": 1}, 0.0),
        ({"fused": True}, 1e-5),
        ({"channels_last": True}, 0.02),
        ({"fast_resize": True, "cache_gib": 0}, 0.03),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_fast_setting_moves_the_losses_no_further_than_it_says(
    tmp_path: Path, data: Path, plain: list[float], changes: dict[str, Any], tolerance: float
) -> None:
    """The first of six steps at a large learning rate is equal to 1e-4, the others follow."""
    found = losses(tmp_path / "trial", data, **changes)
    assert found[0] == pytest.approx(plain[0], rel=min(tolerance, 1e-4), abs=0)
    assert found == pytest.approx(plain, rel=tolerance, abs=0)


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_a_compiled_model_trains_as_the_eager_one(tmp_path: Path, data: Path) -> None:
    """Inductor's kernels, compiled here from nothing: the losses differ in their last digits."""
    eager = losses(tmp_path / "eager", data, model="tiny-test-vit")
    changes = {"model": "tiny-test-vit", "torchcompile": True}
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "kernels")}
    found = losses(tmp_path / "compiled", data, env=env, **changes)
    assert list((tmp_path / "kernels").rglob("*.so")), "nothing was compiled"
    assert found == pytest.approx(eager, rel=1e-4, abs=0)


def test_channels_last_is_the_layout_of_convolutions(data: Path) -> None:
    """The setting reaches the weights."""
    chosen = config(channels_last=True, imagenet_val=None)
    placed = absolute(chosen, root=data)
    task = openclip.build(placed, rank=0, world_size=1, device=torch.device("cpu"))
    weight = task.learner.model.get_parameter("visual.conv2.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


def test_small_decoding_leaves_room_for_the_smallest_crop() -> None:
    """A crop of a quarter of the area has half the side: the image must be twice the input."""
    assert openclip.data.least_size(config(aug_cfg={"scale": [0.25, 1.0]}), 224) == (448, 448)
    assert openclip.data.least_size(config(), (32, 64)) == (34, 68)


def test_settings_that_would_do_nothing_are_refused() -> None:
    """As everywhere: what is written acts, or is an error."""
    for changes in (
        {"fast_resize": True, "aug_cfg": {"use_timm": True}},
        {"cuda_graphs": True},
    ):
        with pytest.raises(ValidationError, match="does nothing with"):
            config(**changes)


def test_cuda_graphs_are_refused_where_they_cannot_work() -> None:
    """Without a GPU at plan, with the reason; with accumulation already in the study's file. Fewer
    ranks than the trial asks for accumulate, and do without."""
    chosen = config(torchcompile=True, cuda_graphs=True)
    with pytest.raises(ValueError, match="cuda_graphs needs GPUs"):
        openclip.check(chosen, workers=1, gpus=0)
    assert openclip.check(chosen, workers=1, gpus=1) == []
    fewer = openclip.share_out(
        config(torchcompile=True, cuda_graphs=True, train_num_samples=96),
        workers=2,
        ranks=1,
        root=Path(),
    )
    assert (fewer.accum_freq, fewer.torchcompile, fewer.cuda_graphs) == (2, True, False)
    with pytest.raises(ValidationError, match="accum_freq needs them all"):
        config(torchcompile=True, cuda_graphs=True, accum_freq=2)


def test_the_exported_command_compiles_without_cuda_graphs() -> None:
    """The peer has --torchcompile and no graphs, which change no number."""
    line = openclip.command(config(torchcompile=True, cuda_graphs=True), workers=1)
    assert line == openclip.command(config(torchcompile=True), workers=1)
    assert "--torchcompile" in line


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pinned memory")
def test_batches_for_a_gpu_wait_in_pinned_memory(data: Path) -> None:
    """With pin_memory the loader's tensors are page-locked, without they are not."""
    from ablate.training.data.batches import Batches, load

    chosen = absolute(config(imagenet_val=None), root=data)
    task = openclip.build(chosen, rank=0, world_size=1, device=torch.device("cuda"))
    source = Batches(
        task.data.samples, num_samples=96, batch_size=16, accum_freq=1, rank=0, world_size=1, seed=0
    )
    for pinned in (True, False):
        batch = next(load(source, start=0, stop=1, workers=0, prefetch=1, pin_memory=pinned))
        assert [tensor.is_pinned() for tensor in batch.tensors] == [pinned] * 2
