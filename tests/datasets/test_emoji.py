"""The emoji dataset: what it holds, that its bytes are fixed, and that damage is mended."""

from __future__ import annotations

from pathlib import Path

import pytest

from ablate.datasets.emoji import EmojiPaths, prepare_emoji
from ablate.datasets.shards import index_shards


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> EmojiPaths:
    return prepare_emoji(tmp_path_factory.mktemp("data") / "emoji")


def test_it_holds_the_pairs_and_classes_it_states(emoji: EmojiPaths) -> None:
    """Four vendors give 5824 pairs in 8 shards, and 617 classes have two held-out pictures each."""
    index = index_shards(emoji.train_data, cache=None)
    assert index.num_samples == emoji.train_num_samples == 5824
    assert len(index.shards) == 8 and index.faults == ()
    folders = [path for path in Path(emoji.imagenet_val).iterdir() if path.is_dir()]
    assert len(folders) == emoji.num_classes == 617
    assert all(len(list(folder.glob("*.jpg"))) == 2 for folder in folders)
    assert emoji.chance == pytest.approx(0.0016, abs=5e-5)
