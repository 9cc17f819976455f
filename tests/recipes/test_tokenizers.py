"""Each model trains on the token numbers of its own tokenizer, and its record says which."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_trials import add_models, config

from ablate.errors import DataError
from ablate.recipes import openclip
from ablate.recipes.openclip.encode import CaptionTokenizer, make_tokenizer
from ablate.trial.recipe import absolute

WORDS = ("a", "photo", "of", "the", "here", "red", "green", "blue", "square", "disc", "heron")
TEXT = {"context_length": 16, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
VISION = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}


def write_tokenizer(folder: Path, words: list[str]) -> Path:
    """A Hugging Face tokenizer of whole words, numbered in this order."""
    transformers = pytest.importorskip("transformers", reason="models with such tokenizers are few")
    tokenizers = pytest.importorskip("tokenizers")
    numbers = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[SEP]", *words])}
    words_alone = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="[UNK]"))
    words_alone.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words_alone, pad_token="[PAD]", unk_token="[UNK]", sep_token="[SEP]"
    ).save_pretrained(folder)
    return folder


def open_tokenizer(folder: Path, **options: Any) -> CaptionTokenizer:
    from open_clip.tokenizer import HFTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # transformers leaves files open
        return CaptionTokenizer(HFTokenizer(str(folder), **{"context_length": 16, **options}))


def add_model(folder: Path, name: str, tokenizer: Path) -> None:
    """Make a small model of that tokenizer known to open_clip."""
    import open_clip

    described = {
        "embed_dim": 32,
        "vision_cfg": VISION,
        "text_cfg": {
            **TEXT,
            "hf_tokenizer_name": str(tokenizer),
            "pool_type": "last",
            "no_causal_mask": True,
        },
    }
    (folder / f"{name}.json").write_text(json.dumps(described))
    open_clip.add_model_config(folder / f"{name}.json")


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # transformers leaves files open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_two_models_of_one_machine_keep_their_own_tokens(tmp_path: Path, data: Path) -> None:
    """Of two Hugging Face tokenizers of one context length, each model gets its own numbers, for
    captions and prompts, whichever was trained first; the records name them apart."""
    facts = {}
    for name, words in (("first", WORDS), ("second", WORDS[::-1])):
        add_model(tmp_path, f"tiny-{name}", write_tokenizer(tmp_path / name, list(words)))
        chosen = absolute(config(model=f"tiny-{name}"), root=data)
        task = openclip.build(chosen, rank=0, world_size=1, device=torch.device("cpu"))
        tokenizer = make_tokenizer(chosen)
        captions = [openclip.data.open_train_index(chosen).read(i)[1] for i in range(96)]
        (_, tokens), _ = task.data.samples.batch(np.arange(96), np.zeros(96, np.uint64))
        assert torch.equal(tokens, tokenizer(captions))
        zero_shot: Any = task.evaluations[0]
        names, templates = openclip.zero_shot_classes(str(data / "val"))
        assert templates is not None
        prompts = [template.format(name) for name in names for template in templates]
        assert torch.equal(torch.from_numpy(np.array(zero_shot.tokens)).long(), tokenizer(prompts))
        facts[name] = (task.facts["tokenizer"], task.data.samples.fingerprint)
    assert len({*facts["first"], *facts["second"]}) == 4


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@settings(max_examples=10)
@given(st.permutations(WORDS), st.permutations(WORDS))
def test_a_fingerprint_is_of_the_content(
    tmp_path_factory: pytest.TempPathFactory, one: list[str], other: list[str]
) -> None:
    """Equal vocabularies have one fingerprint, whatever their folder and whatever they tokenised
    before; another order of two words that no probe holds is another."""
    folder = tmp_path_factory.mktemp("words")
    first = open_tokenizer(write_tokenizer(folder / "a", one))
    first(["a red heron"])
    again = CaptionTokenizer(first._tokenizer)
    second = open_tokenizer(write_tokenizer(folder / "b", other))
    assert again.fingerprint == first.fingerprint
    assert (first.fingerprint == second.fingerprint) == (one == other)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "options", [{"clean": "canonicalize"}, {"strip_sep_token": True}, {"context_length": 8}]
)
def test_options_are_part_of_a_fingerprint(tmp_path: Path, options: dict[str, Any]) -> None:
    """Cleaning, separators and length decide the numbers as the vocabulary does."""
    folder = write_tokenizer(tmp_path / "words", list(WORDS))
    assert open_tokenizer(folder).fingerprint != open_tokenizer(folder, **options).fingerprint


def test_open_clips_own_tokenizer_has_one_fingerprint() -> None:
    """Models that share it share cached tokens; another length or cleaning does not."""
    from open_clip.tokenizer import SimpleTokenizer

    add_models()
    own = make_tokenizer(config(model="tiny-test-rn")).fingerprint
    assert own == make_tokenizer(config(model="tiny-test-vit")).fingerprint
    others = [SimpleTokenizer(context_length=16, clean="canonicalize"), SimpleTokenizer()]
    assert own not in [CaptionTokenizer(other).fingerprint for other in others]


def test_a_tokenizer_that_draws_is_refused() -> None:
    """Its tokens could be neither kept nor drawn again after a resume."""
    from open_clip.tokenizer import SimpleTokenizer

    with pytest.raises(DataError, match="draws at random which words.*Leave reduction_mask out"):
        CaptionTokenizer(SimpleTokenizer(reduction_mask="random"))


@pytest.mark.parametrize(
    ("changes", "facts", "says"),
    [
        ({"model": "ViT-B-16-SigLIP"}, {}, "trained on"),
        ({"model": "ViT-B-16-SigLIP"}, {"tokenizer": "12ab", "reading": 2}, None),
        ({"model": "RN50"}, {}, None),
        ({"evaluations": [{"kind": "knn", "train_path": "train"}]}, {}, "paired the classes"),
        ({"evaluations": [{"kind": "knn", "train_path": "train"}]}, {"reading": 2}, None),
        ({"evaluations": [{"kind": "linear"}]}, {}, None),
        ({"fast_resize": True}, {"reading": 2}, "another order than Pillow"),
        ({"fast_resize": True}, {"reading": 3}, None),
    ],
)
def test_records_of_earlier_versions_are_known(
    changes: dict[str, Any], facts: dict[str, Any], says: str | None
) -> None:
    """A record that may carry a number of a fault that was mended says so; others do not."""
    content = config(**changes).model_dump(mode="json")
    found = list(openclip.known_faults(content, facts))
    assert len(found) == (says is not None)
    assert all(says in line and "Run it again" in line for line in found)
