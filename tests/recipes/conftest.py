"""Data and caches that the tests of this folder share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from picture_data import list_few
from small_trials import make_data

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small data set; caches of it go to a folder of their own."""
    os.environ["ABLATE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return make_data(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="session")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole set with captions, and lists of a few of its clips."""
    from ablate.training.data.emoji_video import prepare_emoji_video

    os.environ.setdefault("ABLATE_CACHE", str(tmp_path_factory.mktemp("cache")))
    root = prepare_emoji_video(tmp_path_factory.mktemp("clips") / "emoji-video").folder
    list_few(root)
    return root


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Stopping and going on takes each recipe a minute: of openclip and of a command in the suite,
    of the others on demand, where test_resume_of_recipes holds them to more."""
    for item in items:
        stops = item.name.startswith("test_a_stopped_run_goes_on")
        if stops and item.path.parent == HERE and item.path.name != "test_contract.py":
            item.add_marker(pytest.mark.exhaustive)
