"""The model: transformers' ViTMAE with the initial weights of models_mae.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ablate.recipes.mae.config import SIZES, Config

if TYPE_CHECKING:
    import torch

    from ablate.training.data.augment import ToInput
    from ablate.training.evaluations.reconstruction import Reconstructed

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""As main_pretrain.py has them."""
CLASS_TOKEN = "vit.embeddings.cls_token"


def describe_model(config: Config) -> Any:
    """transformers' configuration of this model."""
    from transformers import ViTMAEConfig

    patch, width, depth, heads, inner, layers, inner_heads = SIZES[config.model]
    return ViTMAEConfig(
        image_size=config.input_size,
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        decoder_hidden_size=inner,
        decoder_num_hidden_layers=layers,
        decoder_num_attention_heads=inner_heads,
        decoder_intermediate_size=4 * inner,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-6,
        mask_ratio=config.mask_ratio,
        norm_pix_loss=config.norm_pix_loss,
    )


def create_model(config: Config, device: torch.device) -> torch.nn.Module:
    """The model with its initial weights, which the seed decides, in train mode."""
    import torch
    from transformers import ViTMAEForPreTraining

    from ablate.training.data.augment import seed_globals

    seed_globals(config.seed)
    with torch.device(device):
        model: torch.nn.Module = ViTMAEForPreTraining(describe_model(config))
    if config.init == "mae" and device.type != "meta":
        initialise(model)
    return model.train()


def initialise(model: Any) -> None:
    """Weights of models_mae.py, in place: fixed sine-cosine positions, tokens of deviation 0.02,
    Xavier's uniform in every linear layer.

    transformers 5.24.0 constructs the model with positions and tokens of zero: of nested modules
    it initialises the inner ones first, and the outer one then finds its work done. Its queries,
    keys and values are apart where the peer's are one layer, so their bound is of that layer:
    sqrt(6 / (d + 3 d)).
    """
    import torch

    std = float(model.config.initializer_range)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                together = 3 if name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj") else 1
                bound = math.sqrt(6 / (module.in_features + together * module.out_features))
                module.weight.uniform_(-bound, bound)
                if module.bias is not None:
                    module.bias.zero_()
        patches = model.vit.embeddings.patch_embeddings.projection.weight
        torch.nn.init.xavier_uniform_(patches.view(len(patches), -1))
        model.vit.embeddings.patch_embeddings.projection.bias.zero_()
        for positions in (
            model.vit.embeddings.position_embeddings,
            model.decoder.decoder_pos_embed,
        ):
            positions.copy_(positions_of(positions.shape[1] - 1, positions.shape[2]))
        model.vit.embeddings.cls_token.normal_(std=std)
        model.decoder.mask_token.normal_(std=std)


def positions_of(patches: int, width: int) -> torch.Tensor:
    """Sine-cosine positions of a square of patches, 1 x (1 + patches) x width, a row of zeros for
    the class token; columns come before rows, as in the peer's and in published weights."""
    import torch
    from transformers.models.vit_mae.modeling_vit_mae import (
        build_2d_sinusoidal_position_embedding,
    )

    side = math.isqrt(patches)
    found = build_2d_sinusoidal_position_embedding(side, side, width, cls_token=True)
    half = width // 2
    return torch.cat([found[:, half:], found[:, :half]], dim=1)[None]


@contextmanager
def unmasked(model: Any) -> Iterator[None]:
    """The model with an encoder that sees every patch."""
    embeddings = model.vit.embeddings
    before = embeddings.config.mask_ratio
    embeddings.config.mask_ratio = 0.0
    try:
        yield
    finally:
        embeddings.config.mask_ratio = before


def encode(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Features of norm 1: the mean of the encoder's patch tokens, without a mask; N x width."""
    import torch

    patches = model.vit.embeddings.patch_embeddings.num_patches
    in_order = torch.arange(patches, device=pixels.device, dtype=torch.float32)
    with unmasked(model):
        tokens = model.vit(pixels, noise=in_order.expand(len(pixels), -1)).last_hidden_state
    return torch.nn.functional.normalize(tokens[:, 1:].mean(dim=1).float(), dim=1)


def make_input(device: torch.device) -> ToInput:
    """Bytes to what the model takes."""
    from ablate.training.data.augment import ToInput

    return ToInput(MEAN, STD, device=device)


def targets_of(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What is to be predicted for each patch, N x patches x numbers (forward_loss)."""
    found: torch.Tensor = model.patchify(pixels.float())
    if model.config.norm_pix_loss:
        mean, variance = found.mean(dim=-1, keepdim=True), found.var(dim=-1, keepdim=True)
        found = (found - mean) / (variance + 1.0e-6) ** 0.5
    return found


def reconstruct(model: Any, pixels: torch.Tensor, noise: torch.Tensor) -> Reconstructed:
    """What the model makes of images of which `noise` (N x patches) hides the largest."""
    import torch

    from ablate.training.evaluations.reconstruction import Reconstructed

    output = model(pixels, noise=noise.to(pixels.device))
    target, predicted = targets_of(model, pixels), output.logits.float()
    plain = model.patchify(pixels.float())
    shown = predicted
    if model.config.norm_pix_loss:  # the mean and deviation that the loss took out
        deviation = (plain.var(dim=-1, keepdim=True) + 1.0e-6) ** 0.5
        shown = predicted * deviation + plain.mean(dim=-1, keepdim=True)
    mask = output.mask.bool()
    hidden = torch.where(mask[..., None], torch.zeros_like(plain), plain)
    painted = torch.where(mask[..., None], shown, plain)
    return Reconstructed(
        loss=(predicted - target).square().mean(dim=-1),
        nothing=target.square().mean(dim=-1),
        mask=mask,
        pictures=tuple(_to_bytes(model.unpatchify(each)) for each in (plain, hidden, painted)),
    )


def _to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """N x 3 x S x S as the model takes them, to N x S x S x 3 bytes."""
    import torch

    mean, std = (torch.tensor(each, device=pixels.device).view(1, 3, 1, 1) for each in (MEAN, STD))
    plain = (pixels * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
    return plain.permute(0, 2, 3, 1).cpu()


def loss_of_nothing(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Loss of a prediction of zero for every patch, a scalar: what learning must beat.

    With norm_pix_loss 1 for each patch that is not flat and 0 for a flat one.
    """
    return targets_of(model, pixels).square().mean()
