"""Faults of earlier versions that a finished record may carry, found by what it says of itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ablate.recipes.openclip.plan import model_config

READING = 3
"""Version of how data are read, in the facts of every result; a change of a number raises it."""


def known_faults(config: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong, or may be, with the numbers of a trial of this configuration.

    `facts` are those of its result. Nothing is said of a record of this version.
    """
    reading = facts.get("reading", 1)
    if reading < 3 and config.get("fast_resize"):
        yield (
            "fast_resize took the two passes of tall crops in another order than "
            "Pillow, so up to a third of their values differ, on hard edges by up to 30 of 255: "
            "such a trial cannot be compared with one without it. Run it again"
        )
    if reading >= 2:
        return
    if "tokenizer" not in facts and model_config(config["model"]).get("text_cfg", {}).get(
        "hf_tokenizer_name"
    ):
        yield (
            f"model {config['model']} has a Hugging Face tokenizer, and the record does not say "
            "which tokens it was trained on: earlier versions kept the tokens of all such "
            "tokenizers of one context length under one name, so it may have learnt from those of "
            "another model that ran on its machine before. Run it again"
        )
    for spec in config.get("evaluations", ()):
        if spec.get("kind") in ("knn", "linear") and spec.get("train_path") is not None:
            yield (
                f"evaluation {spec['kind']} paired the classes of path and train_path by their "
                "places: unless both have the same classes, its accuracy is wrong. Run it again"
            )
