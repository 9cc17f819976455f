"""Provoked: broken numbers, spikes, divergence (M1 to M6), by the worker on tiny-rn-a and emoji."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from provocations import EVALUATED, faster, inputs_at, provoke, samples

pytestmark = pytest.mark.slow


def infinite_pixel(images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    images = images.clone()
    images[0, 0, 3, 3] = math.inf
    return images, texts


def mispaired(images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return images, texts.roll(1, 0)


@pytest.mark.exhaustive
def test_one_infinite_pixel_ends_the_run(tmp_path: Path, emoji: Path) -> None:
    """M1: the step it is in poisons the weights, and the third loss that is NaN ends the trial."""
    done = provoke(tmp_path / "t", emoji, inputs_at(lambda k: k == 20, infinite_pixel), steps=40)
    assert done.ending == ("diverged", "NUMERIC_FAIL", "non_finite")
    (event,) = done.events
    assert (event["first_step"], event["detected_at"]) == (20, 22)
    assert done.suspect == "an infinite or NaN input"


@pytest.mark.exhaustive
def test_an_evaluation_finds_what_is_poisoned(tmp_path: Path, emoji: Path) -> None:
    """M1, M12: one step before an evaluation, that finds weights and BatchNorm not finite."""
    change = inputs_at(lambda k: k == 8, infinite_pixel)
    done = provoke(tmp_path / "t", emoji, change, steps=8, epochs=2, **EVALUATED)
    assert done.ending[:2] == ("diverged", "NUMERIC_FAIL")
    assert done.result["stop"]["step"] == 8
    assert done.told("non_finite", "parameters") and done.told("batch_norm", "non_finite")


@pytest.mark.exhaustive
def test_a_skipped_step_still_poisons_batch_norm(tmp_path: Path, emoji: Path) -> None:
    """M12a: fp16's scaler skips the step with the pixel, so weights and training go on unharmed;
    the running statistics saw it, and the evaluation ends the trial."""
    change = inputs_at(lambda k: k == 4, infinite_pixel)
    done = provoke(
        tmp_path / "t", emoji, change, steps=8, epochs=2, precision="amp", fused=False,
        batch_size=8, **EVALUATED,
    )  # fmt: skip
    assert done.ending == ("diverged", "NUMERIC_FAIL", "batch_norm")
    rows = done.record.trace()
    assert [row["step"] for row in rows if not math.isfinite(row["loss"])] == [4]
    assert rows[3]["skipped_steps"] == rows[2]["skipped_steps"] + 1
    assert not done.told("non_finite", "parameters")
    assert done.suspect == "an infinite or NaN input"


def test_an_absurd_learning_rate_ends_the_run(tmp_path: Path, emoji: Path) -> None:
    """M1: lr 1000 is NaN within a few steps."""
    done = provoke(tmp_path / "t", emoji, steps=40, lr=1e3, warmup=0, grad_clip_norm=None)
    assert done.ending == ("diverged", "NUMERIC_FAIL", "non_finite")
    assert done.result["stop"]["step"] < 15
    assert done.suspect == "learning rate too high"


@pytest.mark.exhaustive
def test_two_mispaired_batches_are_a_spike(tmp_path: Path, few: Path) -> None:
    """M2, M4, M5: a model that knows its pairs gets two batches of wrong ones: the loss, the
    gradient's norm and its size against beta2 = .999's long memory all spike at that step."""
    done = provoke(
        tmp_path / "t", few, inputs_at(lambda k: k in (70, 71), mispaired), steps=90,
        train_data="train/00000.tar", beta2=0.999, grad_clip_norm=None,
    )  # fmt: skip
    assert done.ending == ("completed", "SPIKY", None)
    (loss,) = done.told("loss_spike")
    (norm,) = done.told("grad_norm_spike")
    assert (loss["first_step"], norm["first_step"]) == (70, 70)
    assert {event["first_step"] for event in done.told("rms_spike")} == {70}
    assert "rms/visual.conv1.weight" in {e["evidence"]["quantity"] for e in done.told("rms_spike")}
    assert done.suspect == "a stretch of bad data"


@pytest.mark.exhaustive
def test_lonely_mispaired_batches_are_a_rate_of_spikes(tmp_path: Path, few: Path) -> None:
    """M3: single bad batches far apart are no loss spike of two hits, but their rate is told."""
    done = provoke(
        tmp_path / "t", few, inputs_at(lambda k: k > 130 and k % 14 == 0, mispaired), steps=200,
        train_data="train/00000.tar", batch_size=16,
    )  # fmt: skip
    assert done.told("spike_score") and done.ending[::2] == ("completed", None)


@pytest.mark.exhaustive
def test_thirty_times_the_learning_rate_never_spikes(tmp_path: Path, emoji: Path) -> None:
    """M6: lr x 30 without warmup, beta2 .999: no spike, the model collapses in its first steps to
    logits that say nothing, and the run, of 320 steps, is ended at ln B after its hold of 200."""
    done = provoke(
        tmp_path / "t", emoji, steps=320, lr=0.03, warmup=0, beta2=0.999, grad_clip_norm=None
    )
    assert done.ending == ("diverged", "DIVERGED", "divergence")
    assert done.result["stop"]["step"] < 220
    (chance,) = done.told("divergence", "chance")
    assert chance["evidence"]["chance"] == pytest.approx(math.log(32))
    assert "loss_spike" not in done.markers
    assert done.suspect == "learning rate too high"


def test_a_thousand_times_the_learning_rate_diverges(tmp_path: Path, emoji: Path) -> None:
    """M6: lr x 1,000: the loss is at ln B within a few steps, and stays there: a run of 160 steps
    is named at its end."""
    done = provoke(tmp_path / "t", emoji, steps=160, lr=1.0, grad_clip_norm=None, warmup=0)
    assert done.ending == ("completed", "DIVERGED", None)
    assert done.told("divergence", "chance")
    assert done.suspect == "learning rate too high"


def test_shuffled_captions_are_chance_level(tmp_path: Path, emoji: Path) -> None:
    """M6: pairs that belong to nothing: the loss stays at ln B to the end."""
    shuffle = torch.Generator().manual_seed(0)
    change = samples(lambda images, texts: (images, texts[torch.randperm(32, generator=shuffle)]))
    done = provoke(tmp_path / "t", emoji, change, steps=160)
    assert done.ending == ("completed", "DIVERGED", None)
    assert done.suspect == "images and captions do not belong together"


@pytest.mark.exhaustive
def test_a_batch_of_one_sample_has_no_gradient(tmp_path: Path, emoji: Path) -> None:
    """M5 as it is: a batch that holds one pair B times has a loss of exactly ln B and, its rows
    being equal, no gradient at all: nothing spikes, and nothing is harmed."""

    def one(images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images[:1].expand_as(images), texts[:1].expand_as(texts)

    done = provoke(tmp_path / "t", emoji, inputs_at(lambda k: k in (60, 61), one), steps=80)
    rows = done.record.trace()
    assert rows[59]["loss"] == pytest.approx(math.log(32), abs=1e-4)
    assert rows[59]["grad_norm"] < 1e-3 * rows[58]["grad_norm"]
    assert done.ending == ("completed", "STABLE", None)


@pytest.mark.exhaustive
def test_batch_norm_hides_the_scale_of_its_input(tmp_path: Path, emoji: Path) -> None:
    """M4 as it is: inputs ten times as large from a step on change nothing in a network that
    normalises after its first layer: neither the loss nor any gradient or marker."""
    runs = [
        provoke(tmp_path / name, emoji, inputs_at(lambda k: k >= 40, change), steps=50, beta2=0.999)
        for name, change in (
            ("as it is", lambda images, texts: (images, texts)),
            ("tenfold", lambda images, texts: (images * 10, texts)),
        )
    ]
    plain, tenfold = (run.record.trace() for run in runs)
    name = "rms/visual.conv1.weight"
    assert tenfold[39]["loss"] == pytest.approx(plain[39]["loss"], rel=1e-2)
    assert tenfold[39][name] == pytest.approx(plain[39][name], rel=0.05)
    assert all(run.ending == ("completed", "STABLE", None) for run in runs)


@pytest.mark.exhaustive
def test_a_text_tower_that_learns_too_fast_is_heard(tmp_path: Path, emoji: Path) -> None:
    """M8: lr x 100 in the text tower without clipping: its attention logits pass a thousand, which
    is a label: even a run that is lost by its loss may go on if the study says so."""
    done = provoke(
        tmp_path / "t", emoji, faster("transformer.", 100), steps=200, grad_clip_norm=None,
        markers={"divergence": {"stop": False}},
    )  # fmt: skip
    layers = {event["evidence"]["quantity"] for event in done.told("attention_logits")}
    assert "attention_logits/transformer.resblocks.0.attn" in layers
    assert done.ending[::2] == ("completed", None)
