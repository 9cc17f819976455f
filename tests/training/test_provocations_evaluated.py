"""Provoked: what evaluations, features and data tell (M12, M13, M15, M16)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from provocations import EVALUATED, batch_norms, provoke, samples
from small_trials import CLASSES, draw, make_data, write_pairs

from ablate.training.data.shards import index_shards
from ablate.training.task import Task

pytestmark = pytest.mark.slow


def shifted_from(first: int) -> object:
    """A camera that is set anew: from a training step on all inputs are three times as strong."""
    seen = 0

    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> object:
        nonlocal seen
        seen += module.training and torch.is_grad_enabled()
        return (args[0] * 3 + 1, *args[1:]) if seen >= first else None

    def apply(task: Task) -> Task:
        task.learner.model.visual.register_forward_pre_hook(hook)  # type: ignore[union-attr]
        return task

    return apply


def slow_statistics(norm: torch.nn.BatchNorm2d) -> None:
    norm.momentum = 0.01


@pytest.mark.exhaustive
@pytest.mark.parametrize("provoked", [True, False])
def test_statistics_that_cannot_follow_drift(tmp_path: Path, emoji: Path, provoked: bool) -> None:
    """M12: pure_bf16, momentum .01 and inputs that change: running statistics stay behind, and
    the evaluation with fresh ones is there to tell whose fault it is. Without, nothing is told."""
    changes = [batch_norms(slow_statistics), shifted_from(20)] if provoked else []
    precision = "pure_bf16" if provoked else "fp32"
    done = provoke(tmp_path / "t", emoji, *changes, steps=50, precision=precision, **EVALUATED)
    drifts = done.told("batch_norm", "drift")
    (row,) = done.record.evaluations()
    assert done.ending == ("completed", "STABLE", None)
    assert len(drifts) == provoked and ("recalibrated_top1" in row) == provoked
    if provoked:
        assert drifts[0]["flag"] == "BN_DRIFT" and row["bn_drift_median"] > 0.5
        assert done.suspect == "BatchNorm's running statistics"


@pytest.mark.exhaustive
def test_images_that_are_all_alike_collapse(tmp_path: Path, emoji: Path) -> None:
    """M13, M6: grey images: the image tower's features are one point from the first step on; it
    is named first, and the run ends at chance level."""
    change = samples(lambda images, texts: (torch.full_like(images, 128), texts))
    done = provoke(tmp_path / "t", emoji, change, steps=160)
    assert done.ending == ("completed", "DIVERGED", None)
    first = done.told("feature_collapse")[0]
    assert first["evidence"]["quantity"] == "image_feature_std" and first["first_step"] == 1
    assert done.suspect == "images or captions that are all alike"


@pytest.mark.exhaustive
def test_a_temperature_of_a_thousandth_is_no_collapse(tmp_path: Path, emoji: Path) -> None:
    """M13 as it is: logits x 1000 (open_clip's bound of 100 taken off): the features draw together
    to 4 % of the even spread and the loss falls: the run learns and is not condemned."""

    def freeze(task: Task) -> Task:
        scale = task.learner.model.logit_scale
        assert isinstance(scale, torch.nn.Parameter)
        scale.data.fill_(float(np.log(1000.0)))
        task.learner.settle = lambda: {"logit_scale": scale.detach().exp()}  # type: ignore[method-assign]
        return task

    done = provoke(tmp_path / "t", emoji, freeze, steps=160)
    rows = done.record.trace()
    assert max(row["text_feature_std"] for row in rows[-40:]) * np.sqrt(128) < 0.1
    assert np.mean([row["loss"] for row in rows[-20:]]) < np.log(32) - 0.2
    assert done.told("logit_scale", "saturated")
    assert done.ending == ("completed", "STABLE", None)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four drawn shapes, with 100 images to judge by."""
    folder = make_data(tmp_path_factory.mktemp("shapes") / "data")
    rng = np.random.default_rng(1)
    for kind, name in enumerate(CLASSES):
        place = folder / "val" / f"{kind}_{name.replace(' ', '_')}"
        for number in range(25):
            (place / f"{number}.jpg").write_bytes(draw(kind, rng))
    return folder


@pytest.mark.exhaustive
def test_frozen_statistics_are_junk_at_evaluations(tmp_path: Path, shapes: Path) -> None:
    """M15, M12: BatchNorm statistics lost at step 48 and never learnt again (momentum 0): training
    does not notice, zero-shot accuracy falls to chance twice, and the trial ends; with fresh
    statistics the accuracy is back, so that they are to blame, not the weights."""

    def lose(norm: torch.nn.BatchNorm2d) -> None:
        steps = 0

        def hook(module: torch.nn.Module, args: object) -> None:
            nonlocal steps
            steps += module.training and torch.is_grad_enabled()
            if steps == 48:
                norm.reset_running_stats()
                norm.momentum = 0.0

        norm.register_forward_pre_hook(hook)

    done = provoke(
        tmp_path / "t", shapes, batch_norms(lose), steps=6, epochs=14, batch_size=16,
        train_data="train/{00000..00002}.tar", **EVALUATED,
    )  # fmt: skip
    # So short a run is named, and never stopped.
    assert done.ending == ("completed", "DIVERGED", None)
    # What untrained statistics answer may leave chance for one evaluation: an event of its own.
    drops = done.told("accuracy_collapse")
    assert drops[0]["first_step"] == 48 and drops[-1]["verdict"] == "DIVERGED"
    (drift,) = [e for e in done.told("batch_norm") if e["last_step"] >= 48]
    assert drift["evidence"]["fault"] == "statistics"
    assert done.suspect == "BatchNorm's running statistics"


@pytest.mark.exhaustive
def test_damaged_images_are_counted(tmp_path: Path, emoji: Path) -> None:
    """M16: one JPEG in a hundred is cut off: its samples are replaced, and the share is told."""
    (tmp_path / "data" / "train").mkdir(parents=True)
    index = index_shards(str(emoji / "train" / "00000.tar"), cache=tmp_path / "index")
    pairs = [index.read(i) for i in range(index.num_samples)]
    damaged = [
        (image[:200] if i % 100 == 7 else image, text) for i, (image, text) in enumerate(pairs)
    ]
    write_pairs(tmp_path / "data" / "train" / "00000.tar", damaged)
    done = provoke(
        tmp_path / "t", tmp_path / "data", steps=46, train_data="train/00000.tar",
        max_fault_share=0.05,
    )  # fmt: skip
    (event,) = done.told("data_faults")
    assert event["evidence"]["rate"] == pytest.approx(0.01, abs=0.004)
    assert done.ending == ("completed", "STABLE", None)
    assert done.result["data_faults"] >= 10
    assert done.suspect == "unreadable samples"
