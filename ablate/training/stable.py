"""Steps that are kept from going too far: clipping by unit, and updates clipped by their size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

UNIT_EPS = 1e-3
"""Least norm that a unit's weight counts with (Brock et al. 2021)."""


def clip_units(
    parameters: Iterable[torch.nn.Parameter], norm: torch.Tensor | None = None, *, most: float
) -> None:
    """Scale each unit's gradient down to `most` times the norm of its weight, whatever the global
    `norm` is.

    A unit is an output row of a matrix or kernel, and a whole vector (adaptive gradient clipping,
    Brock et al. 2021, arXiv 2102.06171, by timm's function; here of every layer, the last too).
    """
    from timm.utils.agc import adaptive_clip_grad

    adaptive_clip_grad(parameters, clip_factor=most, eps=UNIT_EPS)


class ZClip:
    """Clips the gradient's norm where it stands out of its own past.

    A norm that is more than `most` standard deviations z above its running mean comes down to
    mean + most^2 / z deviations; mean and variance take it up as clipped (Kumar et al. 2025,
    arXiv 2504.02507, with its numbers: z 2.5, decay 0.97, the first 25 steps unclipped). The past
    is a state that a checkpoint must keep. Nothing waits for the device.
    """

    DECAY, FIRST = 0.97, 25

    def __init__(self, most: float, device: torch.device) -> None:
        self.most = most
        self.past = torch.zeros(3, device=device)
        """Steps seen, mean and variance of the norm."""

    @torch.no_grad()
    def __call__(self, parameters: Sequence[torch.nn.Parameter], norm: torch.Tensor) -> None:
        """Scale the gradients of a step whose global norm is `norm`."""
        seen, mean, variance = self.past.unbind()
        sd = variance.sqrt().clamp_min(1e-12)
        z = (norm - mean) / sd
        out = (seen >= self.FIRST) & (z > self.most)
        kept = torch.where(out, mean + self.most**2 / z * sd, norm)
        finite = torch.isfinite(norm)  # a scaler skips what is not
        share = torch.where(out & finite, kept / norm, torch.ones_like(norm))
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], share)
        self.past = torch.where(finite, self._after(kept, seen, mean, variance), self.past)

    def _after(self, norm: torch.Tensor, seen: torch.Tensor, *past: torch.Tensor) -> torch.Tensor:
        """The past with `norm`: plain moments of the first steps, then running ones."""
        mean, variance = past
        early = seen < self.FIRST
        weight = torch.where(early, 1 / (seen + 1), torch.full_like(seen, 1 - self.DECAY))
        moved = mean + weight * (norm - mean)
        spread = torch.where(early, (norm - mean) * (norm - moved), (norm - moved).square())
        return torch.stack([seen + 1, moved, variance + weight * (spread - variance)])


class StableAdamW(torch.optim.AdamW):
    """AdamW that divides a tensor's step by RMS(g / sqrt(u)) where that is above 1.

    u is the de-biased second moment after the update: where it lags behind the gradient the step
    would be too long (Wortsman et al. 2023, arXiv 2304.13013, algorithm 2). It keeps nothing that
    AdamW does not keep, and equals it bit for bit where no tensor's RMS is above 1.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        moving = [
            (p, group, p.clone())
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        loss = super().step(closure)
        for p, group, before in moving:
            state = self.state[p]
            second = state["exp_avg_sq"].float() / (1 - group["betas"][1] ** state["step"])
            square = p.grad.float().square().div_(second.clamp_min_(group["eps"] ** 2))
            # Not a number where a scaler skipped the step: nothing has moved.
            share = torch.nan_to_num(1 / square.mean().sqrt().clamp_min_(1.0), nan=1.0)
            p.copy_(torch.lerp(before.float(), p.float(), share))
        return loss
