"""Decay rules, gradient norms, and optimizer state by name."""

from __future__ import annotations

import open_clip
import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from ablate.training import optim, sketches


@pytest.fixture(scope="module")
def rn50() -> nn.Module:
    """The real RN50, without memory for its weights."""
    with torch.device("meta"):
        return open_clip.create_model("RN50", device="meta")


@pytest.mark.parametrize("rule", ["open_clip", "open_clip_next", "timm"])
def test_rn50_is_grouped_as_it_must_be(rn50: nn.Module, rule: optim.Rule) -> None:
    """Each BatchNorm gain and bias, each bias and logit_scale is undecayed; no tensor is lost."""
    undecayed, decayed = optim.group_parameters(rn50, rule=rule, weight_decay=0.2)
    free = {name for name, _ in undecayed.parameters}
    bound = {name for name, _ in decayed.parameters}
    assert not free & bound
    assert free | bound == {name for name, _ in rn50.named_parameters()}
    assert "logit_scale" in free
    for path, module in rn50.named_modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            assert {f"{path}.weight", f"{path}.bias"} <= free
    assert all(name in free for name, p in rn50.named_parameters() if name.endswith("bias"))
    assert {"visual.conv1.weight", "text_projection", "token_embedding.weight"} <= bound
    assert undecayed.weight_decay == 0.0 and decayed.weight_decay == 0.2


def test_the_rules_differ_where_they_are_known_to(rn50: nn.Module) -> None:
    """open_clip's next rule stops decaying declared positional embeddings; timm's does not."""
    bound = {}
    for rule in ("open_clip", "open_clip_next", "timm"):
        _, decayed = optim.group_parameters(rn50, rule=rule, weight_decay=0.1)
        bound[rule] = {name for name, _ in decayed.parameters}
    assert bound["open_clip"] == bound["timm"]
    assert bound["open_clip"] - bound["open_clip_next"] == {"positional_embedding"}


def test_open_clips_rule_gives_the_peers_counts(rn50: nn.Module) -> None:
    """111 decayed and 213 undecayed tensors, counted in open_clip_train 3.3.0's own expression."""

    def exclude(n: str, p: nn.Parameter) -> bool:
        return p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n

    theirs = [n for n, p in rn50.named_parameters() if exclude(n, p)]
    undecayed, decayed = optim.group_parameters(rn50, rule="open_clip", weight_decay=0.2)
    assert [name for name, _ in undecayed.parameters] == theirs
    described = optim.describe((undecayed, decayed))
    assert described["no_decay"]["tensors"] == 213 and described["decay"]["tensors"] == 111
    assert described["decay"]["parameters"] > 100e6
    assert sketches.sentence(described) == (
        f"parameter groups {described['hash']}: "
        "no_decay (weight decay 0): 213 tensors of 141,313 numbers; "
        "decay (weight decay 0.2): 111 tensors of 101,865,824 numbers"
    )


def test_the_hash_tells_groupings_apart(rn50: nn.Module) -> None:
    """The same grouping has the same hash, another one another."""
    hashes = [
        optim.describe(optim.group_parameters(rn50, rule=rule, weight_decay=0.2))["hash"]
        for rule in ("open_clip", "timm", "open_clip_next")
    ]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("rule", ["open_clip", "open_clip_next", "timm"])
@pytest.mark.parametrize("model", ["ViT-B-32", "RN50-quickgelu", "coca_ViT-B-32", "convnext_base"])
def test_every_parameter_is_in_one_group(model: str, rule: optim.Rule) -> None:
    """Whatever the architecture, nothing is lost, nothing is twice, and AdamW takes the groups."""
    with torch.device("meta"):
        net = open_clip.create_model(model, device="meta")
    groups = optim.group_parameters(net, rule=rule, weight_decay=0.2)
    names = [name for group in groups for name, _ in group.parameters]
    assert len(names) == len(set(names))
    assert set(names) == {name for name, p in net.named_parameters() if p.requires_grad}
    torch.optim.AdamW([group.for_optimizer() for group in groups])


def test_frozen_parameters_are_in_no_group() -> None:
    """What is not trained is not handed to the optimizer."""
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    groups = optim.group_parameters(model, rule="open_clip", weight_decay=0.2)
    assert [[name for name, _ in group.parameters] for group in groups] == [[], ["weight"]]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("visual.layer1.0.conv2.weight", "visual.layer1.0"),
        ("visual.conv1.weight", "visual.conv1"),
        ("transformer.resblocks.11.attn.in_proj_weight", "transformer.resblocks.11"),
        ("visual.attnpool.c_proj.weight", "visual.attnpool"),
        ("logit_scale", "logit_scale"),
    ],
)
def test_parameters_belong_to_blocks(name: str, group: str) -> None:
    """Blocks of towers make groups, other layers their own."""
    assert optim.module_group(name) == group


def test_gradient_norms_are_torchs() -> None:
    """The global norm is torch's to the bit; the groups' squares add up to it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3), nn.Linear(3, 3))
    model[2](model[1](model[0](torch.randn(4, 5)))).square().sum().backward()
    norms = optim.GradientNorms(model)
    total = norms.measure()
    groups = norms.by_group()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert torch.equal(total, torch.nn.utils.get_total_norm(gradients))
    assert tuple(groups) == ("grad_norm/0", "grad_norm/2", "grad_norm/3")
    assert groups["grad_norm/3"] == 0  # the last layer was not used
    assert torch.allclose(torch.stack(list(groups.values())).square().sum(), total.square())


def trained(model: nn.Module, *, steps: int, **options: float) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    return optimizer


def test_optimizer_state_goes_by_name_and_leaves_settings_alone() -> None:
    """State comes back to the parameter of its name; betas and decay stay as configured."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    tensors, numbers = optim.named_state(model, trained(model, steps=3))
    turned = torch.optim.AdamW(reversed(list(model.parameters())), lr=0.1, betas=(0.5, 0.6))
    optim.load_named_state(model, turned, tensors, numbers)
    assert turned.param_groups[0]["betas"] == (0.5, 0.6)
    for name, p in model.named_parameters():
        assert torch.equal(turned.state[p]["exp_avg"], tensors[f"{name}/exp_avg"])
        assert turned.state[p]["step"] == 3


def test_foreign_optimizer_state_is_refused() -> None:
    """State of a parameter that is not there, or of another shape, is an error."""
    model = nn.Linear(4, 2)
    tensors, numbers = optim.named_state(model, trained(model, steps=1))
    other = nn.Linear(5, 2)
    with pytest.raises(ValueError, match="weight/exp_avg: shape"):
        optim.load_named_state(other, torch.optim.AdamW(other.parameters()), tensors, numbers)
    named = nn.ModuleDict({"head": nn.Linear(4, 2)})
    with pytest.raises(ValueError, match="no trainable parameter"):
        optim.load_named_state(named, torch.optim.AdamW(named.parameters()), tensors, numbers)


def test_updates_are_measured_as_defined() -> None:
    """rms, update ratio and epsilon share against their formulas, by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.98), eps=1e-3)
    meter = optim.UpdateMeter(model, optimizer, watched=["1.*"])
    assert meter.rms() == {}  # before the first step there is no second moment
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        before = [p.detach().clone() for p in model[0].parameters()]
        meter.start()
        optimizer.step()
    weight = model[1].weight
    second = optimizer.state[weight]["exp_avg_sq"] / (1 - 0.98**3)
    rms = meter.rms()
    assert set(rms) == {"rms/1.weight", "rms/1.bias"}
    assert weight.grad is not None
    expected = (weight.grad.square() / second.clamp_min(1e-6)).mean().sqrt()
    assert float(rms["rms/1.weight"]) == pytest.approx(float(expected))
    found = meter.finish()
    after = [p.detach() for p in model[0].parameters()]
    moved = sum((p - old).square().sum() for p, old in zip(after, before, strict=True))
    norm = sum(old.square().sum() for old in before)
    assert float(found["update_ratio/0"]) == pytest.approx(float((moved / norm) ** 0.5))
    assert found["eps_share"] == 0
    optimizer.param_groups[0]["eps"] = 1e6
    meter.start()
    assert meter.finish()["eps_share"] == 1


def test_zero_gradients_are_counted_in_a_row() -> None:
    """A gradient of zero counts up, any other starts again; NaN is no zero."""
    zeros = optim.ZeroGradients(nn.Linear(3, 2))
    for norms in ([0.0, 1.0], [0.0, 0.0], [2.0, 0.0]):
        zeros.update(torch.tensor(norms))
    assert zeros.counts.tolist() == [0, 2]
    zeros.update(torch.tensor([0.0, float("nan")]))
    assert zeros.counts.tolist() == [1, 0]


def test_plain_sgd_has_no_second_moments() -> None:
    """What an optimizer does not have is absent, not zero."""
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    meter = optim.UpdateMeter(model, optimizer, watched=["*"])
    model(torch.ones(2, 4)).sum().backward()
    meter.start()
    optimizer.step()
    assert meter.rms() == {}
    assert set(meter.finish()) == {"update_ratio/weight", "update_ratio/bias"}


def test_adafactor_has_no_moment_of_adams_kind() -> None:
    """Its squares have decays of their own: they are left out, and training goes on."""
    model = nn.Linear(4, 2)
    optimizer = create_optimizer_v2(model, "adafactorbv", lr=0.1)
    meter = optim.UpdateMeter(model, optimizer, watched=["*"])
    model(torch.ones(2, 4)).sum().backward()
    meter.start()
    optimizer.step()
    assert meter.rms() == {}
    assert set(meter.finish()) == {"update_ratio/weight", "update_ratio/bias"}
