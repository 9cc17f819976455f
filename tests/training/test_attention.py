"""Attention logits, recomputed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ablate.recipes import openclip
from ablate.training.evaluations.attention import attention_logits


def test_logits_of_a_layer_are_those_of_its_softmax() -> None:
    """The largest logit equals the largest of log-softmax's inputs, under the causal mask."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    nn.init.normal_(layer.in_proj_bias)
    x = torch.randn(3, 5, 8)
    mask = torch.full((5, 5), -torch.inf).triu(1)
    (found,) = attention_logits(layer, lambda: layer(x, x, x, attn_mask=mask)).values()
    q, k, _ = (x @ layer.in_proj_weight.T + layer.in_proj_bias).chunk(3, dim=-1)
    largest = 0.0
    for head in (slice(0, 4), slice(4, 8)):
        logits = q[..., head] @ k[..., head].transpose(1, 2) / 2
        largest = max(largest, float(logits.detach().tril().abs().max()))
    assert float(found) == pytest.approx(largest, rel=1e-6)


def test_normalised_logits_are_seen_as_they_are_and_have_a_bound() -> None:
    """Queries and keys a thousand times as long leave logits that LayerNorm of D/H numbers allows:
    at most its square root; without it they grow a millionfold."""
    from open_clip.transformer import Attention

    torch.manual_seed(0)
    x = torch.randn(3, 5, 32)
    mask = torch.full((5, 5), -torch.inf).triu(1)

    def largest(layer: Attention) -> float:
        (found,) = attention_logits(layer, lambda: layer(x, attn_mask=mask)).values()
        return float(found)

    for normalised, growth in ((True, 1.0), (False, 1e6)):
        layer = Attention(32, 2, qk_norm=normalised)
        before = largest(layer)
        with torch.no_grad():
            layer.in_proj_weight.mul_(1000)
        assert largest(layer) == pytest.approx(growth * before, rel=1e-3)
        assert not normalised or before <= math.sqrt(32 / 2)


def test_every_attention_of_the_model_is_seen() -> None:
    """Text blocks and the attention pool of RN50's family; nothing of the model is changed."""
    import open_clip

    openclip.model.register_models()
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-rn-a").eval()
    images, texts = torch.randn(2, 3, 32, 32), torch.ones(2, 16, dtype=torch.long)
    with torch.no_grad():
        before = model.encode_image(images)
    found = attention_logits(model, lambda: model(images, texts))
    assert set(found) == {
        "attention_logits/visual.attnpool",
        "attention_logits/transformer.resblocks.0.attn",
        "attention_logits/transformer.resblocks.1.attn",
    }
    with torch.no_grad():
        model.visual.attnpool.q_proj.weight.mul_(10)
        model.visual.attnpool.q_proj.bias.mul_(10)
        grown = attention_logits(model, lambda: model(images, texts))
        model.visual.attnpool.q_proj.weight.div_(10)
        model.visual.attnpool.q_proj.bias.div_(10)
        assert torch.allclose(model.encode_image(images), before)
    name = "attention_logits/visual.attnpool"
    assert float(grown[name]) == pytest.approx(10 * float(found[name]), rel=1e-4)
    assert not any(module._forward_pre_hooks for module in model.modules())
