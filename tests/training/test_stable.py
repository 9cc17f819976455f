"""What keeps training stable: clipping by unit, updates clipped by their size, normalised queries
and keys, an average of the weights, and the temperature's start and bound."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from interruptions import measured
from small_trials import add_models, config, log_of, run, write_trial

from ablate.recipes import openclip
from ablate.recipes.openclip.learner import Clip
from ablate.recipes.openclip.model import create_model, sketch_model
from ablate.recipes.openclip.step import make_optimizer
from ablate.report.evaluate import Asked, evaluate
from ablate.training.inspection.inspect import inspect_paths
from ablate.training.optim import load_named_state, named_state
from ablate.training.stable import UNIT_EPS, StableAdamW, ZClip, clip_units
from ablate.trial.upstream import Beside

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
        ({"qk_norm": True, "grad_checkpointing": True}, "remove grad_checkpointing or qk_norm"),
        ({"ema_decay": 0.99, "precision": "pure_bf16"}, "take amp_bf16 or amp"),
    ],
)
def test_settings_that_do_nothing_together_are_refused(fields: dict, says: str) -> None:
    """Each with the reason."""
    with pytest.raises(ValueError, match=says):
        openclip.Config(**fields)


@pytest.mark.parametrize(
    "field",
    [{"grad_clip_units": 0.01}, {"grad_clip_z": 2.5}, {"clip_updates": True},
     {"ema_decay": 0.999}, {"logit_scale_max": 50.0}],
)  # fmt: skip
def test_the_peers_line_cannot_say_them(field: dict) -> None:
    """The line for those who leave us is refused with the field that it has no flag for."""
    with pytest.raises(ValueError, match=f"{next(iter(field))} .* has no equal"):
        openclip.command(config(**field), workers=1)


def test_what_stands_in_a_model_file_alone_leaves_with_one() -> None:
    """QK-norm and the first temperature: no line without a file says them; the exported one takes
    a description that open_clip makes the trial's model of. With siglip the peer has its own."""
    named = {"model": "RN50", "qk_norm": True, "logit_scale_init": 20.0, "force_image_size": 64}
    chosen = config(**named, train_num_samples=96)
    with pytest.raises(ValueError, match="no flag for qk_norm and logit_scale_init, but reads"):
        openclip.command(chosen, workers=1)
    line = openclip.upstream(chosen, workers=1, root=Path("."))
    described = json.loads(line.files["architecture/open_clip_config.json"])["model_cfg"]
    assert described["text_cfg"]["qk_norm"] is True and described["vision_cfg"]["image_size"] == 64
    assert described["init_logit_scale"] == pytest.approx(math.log(20.0))
    assert line.arguments[:2] == ("--model", Beside("local-dir:", "architecture"))
    plain = config(model="RN50", train_num_samples=96)
    assert openclip.upstream(plain, workers=1, root=Path(".")).files == {}
    with pytest.raises(ValueError, match="starts --siglip at 10"):
        sigmoid = config(siglip=True, logit_scale_init=20.0, train_num_samples=96)
        openclip.upstream(sigmoid, workers=1, root=Path("."))


def test_queries_and_keys_are_normalised_where_there_is_a_transformer() -> None:
    """Both towers of a ViT, the text tower alone of a ResNet, which check says; where neither is
    open_clip's own the setting is refused."""
    add_models()
    for model, count in (("tiny-test-vit", 3), ("tiny-rn-a", 2)):
        made, *_ = create_model(config(model=model, qk_norm=True), torch.device("cpu"))
        names = [name for name, _ in made.named_parameters()]
        assert sum(name.endswith("attn.ln_q.weight") for name in names) == count
        sketched = sketch_model(config(model=model, qk_norm=True)).named_parameters()
        assert names == [name for name, _ in sketched]
    said = openclip.check(config(model="tiny-rn-a", qk_norm=True), workers=1, gpus=0)
    assert any("the image tower of tiny-rn-a is no transformer" in line for line in said)
    said = openclip.check(config(model="ViT-B-32", qk_norm=True), workers=1, gpus=0)
    assert not any("qk_norm" in line for line in said)
    said = openclip.check(config(model="roberta-ViT-B-32", qk_norm=True), workers=1, gpus=0)
    assert any("the text tower of roberta-ViT-B-32" in line for line in said)
    with pytest.raises(ValueError, match="neither of its towers"):
        openclip.check(config(model="nllb-clip-base-siglip", qk_norm=True), workers=1, gpus=0)


def test_the_average_follows_its_formula_and_is_what_is_measured(
    tmp_path: Path, data: Path
) -> None:
    """After every step it is decay x itself + (1 - decay) x the weights, BatchNorm's statistics
    included; evaluations, the checkpoint's model.safetensors, `evaluate`, `inspect` and the record
    of learning take it, and the loss is that of a run without."""
    add_models()
    plain = write_trial(tmp_path / "plain", data, model="tiny-test-rn")
    averaged = write_trial(tmp_path / "averaged", data, model="tiny-test-rn", ema_decay=0.75)
    for trial in (plain, averaged):
        assert run(trial.folder) == [0], log_of(trial)
    losses = [[row["loss"] for row in trial.trace()] for trial in (plain, averaged)]
    assert losses[0] == losses[1] and len(losses[0]) == 12
    assert measured(plain.evaluations()) != measured(averaged.evaluations())

    newest = [sorted(trial.folder.glob("checkpoints/step-*"))[-1] for trial in (plain, averaged)]
    load = safetensors.torch.load_file
    weights, raw = load(newest[0] / "model.safetensors"), load(newest[1] / "raw.safetensors")
    assert all(torch.equal(weights[name], raw[name]) for name in weights)
    mean = load(newest[1] / "model.safetensors")
    assert not torch.equal(mean["visual.bn1.running_var"], weights["visual.bn1.running_var"])

    again = evaluate(str(averaged.folder), Asked())
    assert again["imagenet_top1"] == averaged.evaluations()[-1]["imagenet_top1"]
    seen = inspect_paths(averaged.folder, None).to_dict()
    learnt = averaged.learned() or {}
    assert learnt["modules"] == seen["modules"] and learnt["gains"] == seen["gains"]


def test_an_average_moves_as_far_as_its_step_lets_it() -> None:
    """Twelve moves of the weights by hand: the decay is 1 - t^(-2/3), and never above the one that
    is asked for; whole numbers are copied."""
    made = config(model="tiny-rn-a", ema_decay=0.75)
    model, *_ = create_model(made, torch.device("cpu"))
    learner = Clip(
        made, model, lambda step: 0.1, rank=0, world_size=1, device=torch.device("cpu"),
        to_input=None,
    )  # fmt: skip
    name, counter = "visual.bn1.running_var", "visual.bn1.num_batches_tracked"
    expected = None
    for step in range(12):
        learner.rates(step)
        with torch.no_grad():
            model.state_dict()[name].fill_(float(step * step))
            model.state_dict()[counter].fill_(step)
        learner.settle()
        decay = min(0.75, 1 - (step + 1) ** (-2 / 3))
        value = float(step * step)
        expected = value if expected is None else decay * expected + (1 - decay) * value
        assert learner.averaged is not None
        state = learner.averaged.state_dict()
        assert float(state[name][0]) == pytest.approx(expected, rel=1e-5)
        assert int(state[counter]) == step
