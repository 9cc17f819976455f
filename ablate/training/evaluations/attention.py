"""Largest attention logits, layer by layer: where they grow, softmax saturates and training breaks.

Measured now and then on a few samples, by hooks that recompute queries and keys from a layer's
input. Known layers are torch's MultiheadAttention, the same with normalised queries and keys (any
module with ``in_proj_weight``, ``ln_q``, ``ln_k`` and ``num_heads``) and CLIP's attention pool (any
with ``q_proj``, ``k_proj``, ``num_heads`` and ``positional_embedding``); others are left out.
Shapes: B samples, L tokens, D features, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def attention_logits(model: nn.Module, run: Callable[[], Any]) -> dict[str, torch.Tensor]:
    """``attention_logits/<layer>``: the largest |q k| / sqrt(D / H) while `run` uses `model`.

    Positions that a mask forbids do not count.
    """
    found: dict[str, torch.Tensor] = {}
    handles = []
    try:
        for name, module in model.named_modules():
            if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
                handles.append(
                    module.register_forward_pre_hook(_multihead(name, found), with_kwargs=True)
                )
            elif all(hasattr(module, part) for part in _NORMALISED):
                handles.append(
                    module.register_forward_pre_hook(_normalised(name, found), with_kwargs=True)
                )
            elif all(hasattr(module, part) for part in _POOL):
                handles.append(module.register_forward_pre_hook(_pool(name, found)))
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


_NORMALISED = ("in_proj_weight", "in_proj_bias", "ln_q", "ln_k", "num_heads")
_POOL = ("q_proj", "k_proj", "num_heads", "positional_embedding")


def _largest(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """q, k: B x H x L x D/H."""
    logits = (q.float() @ k.float().transpose(-1, -2)) / q.shape[-1] ** 0.5
    if mask is not None:
        forbidden = mask if mask.dtype == torch.bool else mask == -torch.inf
        logits = logits.masked_fill(forbidden, 0.0)
    largest: torch.Tensor = logits.abs().amax()
    return largest


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    # B x L x D -> B x H x L x D/H
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2)


def _multihead(name: str, found: dict[str, torch.Tensor]) -> Any:
    def hook(module: nn.MultiheadAttention, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        query, key = args[0], args[1]
        if not module.batch_first:
            query, key = query.transpose(0, 1), key.transpose(0, 1)
        weight, bias = module.in_proj_weight, module.in_proj_bias
        width = module.embed_dim
        q = F.linear(query, weight[:width], None if bias is None else bias[:width])
        k = F.linear(
            key, weight[width : 2 * width], None if bias is None else bias[width : 2 * width]
        )
        mask = named.get("attn_mask")
        found[f"attention_logits/{name}"] = _largest(
            _heads(q, module.num_heads), _heads(k, module.num_heads), mask
        )

    return hook


def _normalised(name: str, found: dict[str, torch.Tensor]) -> Any:
    def hook(module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        q, k, _ = F.linear(args[0], module.in_proj_weight, module.in_proj_bias).chunk(3, dim=-1)
        found[f"attention_logits/{name}"] = _largest(
            module.ln_q(_heads(q, module.num_heads)),
            module.ln_k(_heads(k, module.num_heads)),
            named.get("attn_mask"),
        )

    return hook


def _pool(name: str, found: dict[str, torch.Tensor]) -> Any:
    def hook(module: Any, args: tuple[Any, ...]) -> None:
        x = args[0].flatten(2).transpose(1, 2)  # B x C x h x w -> B x hw x C
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)
        x = x + module.positional_embedding.to(x.dtype)
        q, k = module.q_proj(x[:, :1]), module.k_proj(x)  # only the mean's query is used
        found[f"attention_logits/{name}"] = _largest(
            _heads(q, module.num_heads), _heads(k, module.num_heads), None
        )

    return hook
