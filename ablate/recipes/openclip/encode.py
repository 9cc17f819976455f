"""Features of images and texts, as open_clip computes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def name_tokenizer(tokenizer: Any) -> str:
    """What cached tokens depend on, beside the texts."""
    import open_clip

    vocabulary = getattr(tokenizer, "vocab_size", "")
    name = f"{type(tokenizer).__name__}-{tokenizer.context_length}-{vocabulary}"
    return f"{name}-open_clip-{open_clip.__version__}"


def encode_image(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Normalised features of images; shape (batch, dimensions)."""
    features: torch.Tensor = model.encode_image(images, normalize=True)
    return features


def encode_text(model: Any, texts: torch.Tensor) -> torch.Tensor:
    """Normalised features of tokenised texts; shape (batch, dimensions)."""
    features: torch.Tensor = model.encode_text(texts, normalize=True)
    return features


def encode_prompts(model: Any, texts: torch.Tensor) -> torch.Tensor:
    """As :func:`encode_text`, without computing the padding after the longest text.

    A causal text tower that pools at the end token never looks at what follows it; prompts have
    about ten tokens of 77. Equal up to rounding.
    """
    import open_clip
    import torch

    if (
        not isinstance(model, open_clip.CLIP)
        or model.attn_mask is None
        or model.text_pool_type != "argmax"
        or not isinstance(model.text_projection, torch.Tensor)
    ):
        return encode_text(model, texts)
    length = int(texts.argmax(dim=-1).max()) + 1
    texts = texts[:, :length]
    cast = model.transformer.get_cast_dtype()
    x = model.token_embedding(texts).to(cast) + model.positional_embedding[:length].to(cast)
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    ends = x[torch.arange(len(x), device=x.device), texts.argmax(dim=-1)]
    features = ends @ model.text_projection
    normalised: torch.Tensor = torch.nn.functional.normalize(features, dim=-1)
    return normalised
