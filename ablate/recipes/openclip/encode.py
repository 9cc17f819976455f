"""Captions to token numbers, and features of images and texts, as open_clip computes them."""

from __future__ import annotations

import hashlib
import json
import tempfile
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate.errors import DataError

if TYPE_CHECKING:
    import torch

    from ablate.recipes.openclip.config import Config


class CaptionTokenizer:
    """open_clip's tokenizer of a model, which knows what decides its numbers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.hugging_face = hasattr(tokenizer, "tokenizer")
        """Whether its vocabulary is one of Hugging Face's, not open_clip's own."""
        self.fingerprint = _fingerprint(tokenizer, hugging_face=self.hugging_face)

    def __call__(self, texts: str | list[str], /) -> torch.Tensor:
        tokens: torch.Tensor = self._tokenizer(texts)
        return tokens


def make_tokenizer(config: Config) -> CaptionTokenizer:
    """The tokenizer of the configuration's model.

    Raises:
        DataError: it draws at random, so its tokens could be neither kept nor repeated.
    """
    import open_clip

    described = json.dumps(open_clip.get_model_config(config.model), sort_keys=True, default=str)
    return _make(config.model, config.force_context_length, described)


# A trial asks again at its end, and reading the vocabulary takes half a second. What the model is
# `described` as belongs to the question: another may have its name.
@lru_cache(maxsize=1)
def _make(model: str, context_length: int | None, described: str) -> CaptionTokenizer:
    import open_clip

    return CaptionTokenizer(open_clip.get_tokenizer(model, context_length=context_length))


def _fingerprint(tokenizer: Any, *, hugging_face: bool) -> str:
    """Digest of a tokenizer's content: vocabulary, rules, cleaning, length, versions of code."""
    import open_clip

    if getattr(tokenizer, "reduction_fn", None) is not None:
        raise DataError(
            "the model's tokenizer has a reduction_mask: it draws at random which words of a long "
            "caption are left out, so no run could be repeated. Leave reduction_mask out of "
            "tokenizer_kwargs"
        )
    clean = getattr(tokenizer, "clean_fn", None)
    parts = [
        type(tokenizer).__name__,
        open_clip.__version__,
        tokenizer.context_length,
        getattr(clean, "__name__", repr(clean)),
    ]
    if hugging_face:
        parts += [getattr(tokenizer, name, None) for name in ("tokenizer_mode", "strip_sep_token")]
        parts += [version("transformers"), version("tokenizers"), _saved(tokenizer.tokenizer)]
    else:
        parts += [
            sorted(tokenizer.encoder.items()),
            sorted(tokenizer.bpe_ranks.items()),
            (tokenizer.pat.pattern, tokenizer.pat.flags),
        ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


_OF_THE_CALL = frozenset({"padding", "truncation"})
"""Entries of tokenizer.json that are those of the last call."""
_OF_THE_PLACE = frozenset({"name_or_path", "is_local", "local_files_only"})
"""Entries of tokenizer_config.json that say where the files came from."""


def _saved(tokenizer: Any) -> dict[str, Any]:
    """Everything that a Hugging Face tokenizer saves of itself, by file."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="ablate-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.suffix == ".json":
                content = json.loads(path.read_text(encoding="utf-8"))
                left_out = _OF_THE_CALL if name == "tokenizer.json" else _OF_THE_PLACE
                kept = {key: item for key, item in content.items() if key not in left_out}
                found[name] = json.dumps(kept, sort_keys=True)
            elif path.is_file():
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


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
