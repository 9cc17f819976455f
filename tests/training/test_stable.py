"""Clipping by unit, updates clipped by their size, and the temperature's start and bound."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_trials import config

from ablate.recipes import openclip
from ablate.recipes.openclip.learner import Clip
from ablate.recipes.openclip.model import create_model
from ablate.recipes.openclip.step import make_optimizer
from ablate.training.optim import load_named_state, named_state
from ablate.training.stable import UNIT_EPS, StableAdamW, ZClip, clip_units

SETTINGS = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.2}


def parameter(*shape: int, seed: int = 0) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter(torch.randn(shape, generator=generator))


def test_updates_are_clipped_as_the_algorithm_says() -> None:
    """Twenty steps whose gradient grows a hundredfold: the numbers of algorithm 2 of arXiv
    2304.13013, written out; AdamW alone goes elsewhere."""
    p, plain = parameter(6, 4), parameter(6, 4)
    optimizer = StableAdamW([p], **SETTINGS)
    other = torch.optim.AdamW([plain], **SETTINGS)
    weight, mean, second = (
        p.detach().double(),
        torch.zeros(6, 4).double(),
        torch.zeros(6, 4).double(),
    )
    largest = 0.0
    for step in range(1, 21):
        gradient = parameter(6, 4, seed=step).detach() * (100.0 if step > 15 else 1.0)
        p.grad, plain.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        other.step()
        g = gradient.double()
        mean, second = 0.9 * mean + 0.1 * g, 0.99 * second + 0.01 * g * g
        u = second / (1 - 0.99**step)
        rms = math.sqrt(float((g * g / u.clamp_min(1e-16)).mean()))
        largest = max(largest, rms)
        rate = 0.1 / max(1.0, rms)
        weight = weight - rate * 0.2 * weight
        weight = weight - rate * (mean / (1 - 0.9**step)) / (u.sqrt() + 1e-8)
    assert largest > 2
    torch.testing.assert_close(p.detach().double(), weight, rtol=1e-4, atol=1e-5)
    assert (p - plain).abs().max() > 0.05


def test_a_step_that_is_not_too_long_is_adamws_to_the_last_bit() -> None:
    """Gradients that shrink: no RMS is above 1, and nothing differs; a skipped step moves
    nothing."""
    p, plain = parameter(5, 3), parameter(5, 3)
    ours, theirs = StableAdamW([p], **SETTINGS), torch.optim.AdamW([plain], **SETTINGS)
    for step in range(1, 9):
        gradient = parameter(5, 3, seed=1).detach() * 0.8**step
        p.grad, plain.grad = gradient.clone(), gradient.clone()
        ours.step()
        theirs.step()
        if step == 1:  # g / sqrt(u) is 1 but for rounding
            with torch.no_grad():
                torch.testing.assert_close(p, plain)
                p.copy_(plain)
        assert torch.equal(p, plain)


def test_it_goes_on_bit_equal_from_the_state_that_a_checkpoint_keeps() -> None:
    """Ten steps in one go, and ten with the optimizer made anew from its state by name after the
    fifth: the same weights and moments to the last bit."""
    models = [torch.nn.Linear(4, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [StableAdamW(model.parameters(), **SETTINGS) for model in models]
    for step in range(10):
        if step == 5:
            tensors, numbers = named_state(models[1], optimizers[1])
            optimizers[1] = StableAdamW(models[1].parameters(), **SETTINGS)
            load_named_state(models[1], optimizers[1], tensors, numbers)
        for model, optimizer in zip(models, optimizers, strict=True):
            for p in model.parameters():
                p.grad = parameter(*p.shape, seed=step).detach() * (50.0 if step > 6 else 1.0)
            clip_units(model.parameters(), most=0.5)
            optimizer.step()
    (one, _), (two, _) = (named_state(m, o) for m, o in zip(models, optimizers, strict=True))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


@given(
    seed=st.integers(0, 1000),
    scale=st.floats(1e-3, 1e3),
    most=st.sampled_from([0.01, 0.1, 1.0]),
    shape=st.sampled_from([(4, 3), (4, 3, 2, 2), (7,)]),
)
def test_no_unit_has_a_larger_gradient_than_its_weight_allows(
    seed: int, scale: float, most: float, shape: tuple[int, ...]
) -> None:
    """Each unit's gradient keeps its direction and is `most` of the weight's norm at the longest;
    shorter ones stay as they are, bit for bit."""
    p = parameter(*shape, seed=seed)
    before = parameter(*shape, seed=seed + 1).detach() * scale
    p.grad = before.clone()
    clip_units([p], most=most)
    rows = (1, -1) if len(shape) == 1 else (shape[0], -1)
    weights, was, now = (t.detach().reshape(rows) for t in (p, before, p.grad))
    limits = most * weights.norm(dim=1).clamp_min(UNIT_EPS)
    for limit, old, new in zip(limits, was, now, strict=True):
        if old.norm() <= limit:
            assert torch.equal(old, new)
        else:
            torch.testing.assert_close(new, old * (limit / old.norm()), rtol=1e-4, atol=1e-7)


def written_out(norms: list[float], most: float) -> list[float]:
    """What ZClip leaves of each norm, by the paper's formulas in plain numbers."""
    first, kept = norms[: ZClip.FIRST], list(norms[: ZClip.FIRST])
    mean = sum(first) / len(first)
    variance = sum((norm - mean) ** 2 for norm in first) / len(first)
    for norm in norms[ZClip.FIRST :]:
        z = (norm - mean) / math.sqrt(variance)
        kept.append(mean + most**2 / z * math.sqrt(variance) if z > most else norm)
        mean = ZClip.DECAY * mean + (1 - ZClip.DECAY) * kept[-1]
        variance = ZClip.DECAY * variance + (1 - ZClip.DECAY) * (kept[-1] - mean) ** 2
    return kept


def test_a_norm_that_stands_out_of_its_past_comes_down() -> None:
    """Sixty norms with spikes: what is left of each by the paper's formulas; others, those that are
    not finite, and the first steps keep their bits; after a checkpoint it goes on alike."""
    generator = torch.Generator().manual_seed(3)
    norms = (2 + 0.3 * torch.randn(60, generator=generator)).tolist()
    norms[30], norms[45] = 40.0, 9.0
    p, clip = parameter(8), ZClip(2.5, torch.device("cpu"))
    direction = parameter(8, seed=1).detach()
    direction /= direction.norm()
    expected, state = written_out(norms, 2.5), None
    for step, (norm, kept) in enumerate(zip(norms, expected, strict=True)):
        if step == 40:  # a learner's state, and an overflow that a scaler skips
            state = clip.past.clone()
            p.grad = torch.full((8,), math.inf)
            clip([p], torch.tensor(math.inf))
            clip = ZClip(2.5, torch.device("cpu"))
            clip.past = state
        p.grad = direction * norm
        before = p.grad.clone()
        clip([p], p.grad.norm())
        assert float(p.grad.norm()) == pytest.approx(kept, rel=2e-3)
        assert torch.equal(p.grad, before) == (kept == norm)
    assert expected[30] < 4 and expected[45] < 4 and state is not None


def test_settings_of_timms_optimizers_reach_them() -> None:
    """By their names there; one that the optimizer does not have is refused with what was given."""
    model = torch.nn.Linear(3, 2)
    fields = {"opt": "timm/adafactorbv", "lr": 1e-3, "beta1": None, "beta2": None}
    made, _ = make_optimizer(config(**fields, opt_kwargs={"clipping_threshold": 0.7}), model)
    assert {group["clipping_threshold"] for group in made.param_groups} == {0.7}
    with pytest.raises(ValueError, match="clip_threshold"):
        make_optimizer(config(**fields, opt_kwargs={"clip_threshold": 0.7}), model)


def test_the_temperature_begins_and_ends_where_it_is_told() -> None:
    """logit_scale starts at its value, softmax or sigmoid, and a step never leaves it above the
    bound; the optimizer is the one that is named."""
    for extra in ({}, {"siglip": True}):
        made = config(logit_scale_init=20.0, logit_scale_max=25.0, clip_updates=True, **extra)
        model, *_ = create_model(made, torch.device("cpu"))
        assert math.exp(model.logit_scale.item()) == pytest.approx(20.0)
        learner = Clip(
            made, model, lambda step: 0.1, rank=0, world_size=1, device=torch.device("cpu"),
            to_input=None,
        )  # fmt: skip
        with torch.no_grad():
            model.logit_scale.fill_(math.log(90.0))
        assert float(learner.settle()["logit_scale"]) == pytest.approx(25.0)
        assert isinstance(make_optimizer(made, model)[0], StableAdamW)
    usual, *_ = create_model(config(), torch.device("cpu"))
    assert math.exp(usual.logit_scale.item()) == pytest.approx(1 / 0.07)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"grad_clip_norm": 1.0, "grad_clip_units": 0.01}, "clip the same gradient"),
        (
            {"clip_updates": True, "opt": "timm/lamb", "lr": 1e-3, "fused": False},
            "is for opt: adamw",
        ),
        ({"grad_clip_units": 0.01, "grad_clip_z": 2.5}, "clip the same gradient"),
        ({"opt_kwargs": {"caution": True}}, "are for opt: timm"),
        ({"logit_scale_init": 50.0, "logit_scale_max": 40.0}, "is above logit_scale_max"),
    ],
)
def test_settings_that_do_nothing_together_are_refused(fields: dict, says: str) -> None:
    """Each with the reason."""
    with pytest.raises(ValueError, match=says):
        openclip.Config(**fields)


@pytest.mark.parametrize(
    "field",
    [{"grad_clip_units": 0.01}, {"grad_clip_z": 2.5}, {"clip_updates": True},
     {"logit_scale_init": 10.0}, {"logit_scale_max": 50.0}],
)  # fmt: skip
def test_the_peers_line_cannot_say_them(field: dict) -> None:
    """The line for those who leave us is refused with the field that it has no flag for."""
    with pytest.raises(ValueError, match=f"{next(iter(field))} .* has no equal"):
        openclip.command(config(**field), workers=1)
