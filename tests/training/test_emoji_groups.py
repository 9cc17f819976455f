"""The emoji by Unicode's groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from ablate.errors import DataError
from ablate.training.data.emoji_groups import prepare_emoji_groups
from ablate.training.data.image_source import open_labelled, pair_labels


@pytest.mark.exhaustive
def test_the_emoji_are_prepared_once(tmp_path: Path) -> None:
    """All drawings of four vendors to train on; every held-out group occurs among them; another
    call finds them, and a folder of something else is refused."""
    found = prepare_emoji_groups(tmp_path / "emoji")
    assert (found.train, found.val) == (5824, 1234)
    train, val = (open_labelled(str(found.folder / split)) for split in ("train", "val"))
    assert len(train.folders) == 9 and val.folders == found.classes
    assert len(pair_labels(val, train)) == 1234
    assert prepare_emoji_groups(tmp_path / "emoji") == found
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="move it away"):
        prepare_emoji_groups(tmp_path / "other")
