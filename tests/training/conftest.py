"""Data and caches that the tests of this folder share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from small_trials import make_data, write_pairs

from ablate.training.data.emoji import prepare_emoji
from ablate.training.data.emoji_video import prepare_emoji_video
from ablate.training.data.shards import index_shards


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small data set; caches of it go to a folder of their own."""
    os.environ["ABLATE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return make_data(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="session")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emoji data set."""
    os.environ.setdefault("ABLATE_CACHE", str(tmp_path_factory.mktemp("cache")))
    return prepare_emoji(tmp_path_factory.mktemp("data") / "emoji").folder


@pytest.fixture(scope="session")
def few(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 pairs of it, which a model knows by heart after 20 steps."""
    folder = tmp_path_factory.mktemp("few")
    (folder / "train").mkdir()
    index = index_shards(str(emoji / "train" / "{00000..00007}.tar"), cache=folder / "index")
    pairs = (index.read(i) for i in range(0, index.num_samples, 97))
    apart = {caption: (image, caption) for image, caption in pairs}  # equal ones never come apart
    write_pairs(folder / "train" / "00000.tar", list(apart.values())[:32])
    return folder


@pytest.fixture(scope="session")
def emoji_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emoji in motion."""
    os.environ.setdefault("ABLATE_CACHE", str(tmp_path_factory.mktemp("cache")))
    return prepare_emoji_video(tmp_path_factory.mktemp("data") / "emoji-video").folder
