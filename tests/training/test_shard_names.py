"""Shard patterns against the braceexpand library, which open_clip_train uses."""

from __future__ import annotations

from pathlib import Path

import pytest
from braceexpand import braceexpand
from hypothesis import given
from hypothesis import strategies as st

from ablate.errors import DataError
from ablate.training.data.shard_names import MAX_SHARDS, expand_shards

WORDS = st.text("abc019-_/", max_size=4)
NUMBERS = st.from_regex(r"-?0{0,2}(1[0-2]|[0-9])", fullmatch=True)
STEPS = st.sampled_from(["", "..1", "..2", "..3", "..-2"])
RANGES = st.builds(lambda a, b, step: f"{{{a}..{b}{step}}}", NUMBERS, NUMBERS, STEPS)
LETTERS = st.builds(lambda a, b: f"{{{a}..{b}}}", *[st.sampled_from("abcxyz")] * 2)
PATTERNS = st.recursive(
    st.one_of(WORDS, RANGES, LETTERS),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: "{" + ",".join(parts) + "}"),
        inner.map(lambda part: f"{{{part}}}"),
    ),
    max_leaves=3,
)


@given(PATTERNS)
def test_patterns_expand_as_for_the_peer(pattern: str) -> None:
    """Lists, ranges (padded, stepped, downwards, letters) and nesting give braceexpand's names."""
    assert expand_shards(f"x{pattern}.tar") == list(braceexpand(f"x{pattern}.tar"))


def test_lists_and_roots(tmp_path: Path) -> None:
    """`::` joins patterns in order, and relative paths are taken from the root."""
    found = expand_shards("cc3m-{00..02}.tar::/abs/{x,y}.tar", root=tmp_path)
    names = [str(tmp_path / f"cc3m-0{number}.tar") for number in range(3)]
    assert found == [*names, "/abs/x.tar", "/abs/y.tar"]


@pytest.mark.parametrize(
    "pattern", ["pipe:cat /data/{0..3}.tar", " PIPE:rm -rf x", "a.tar::pipe:true", "{pipe:id,b}"]
)
def test_pipes_are_refused(pattern: str) -> None:
    """A shard name that webdataset would run as a shell command is refused, wherever it hides."""
    with pytest.raises(DataError, match="shell command.*copy the shards"):
        expand_shards(pattern)


@pytest.mark.parametrize("scheme", ["s3", "gs", "https", "hdfs", "file"])
def test_other_schemes_are_refused_by_name(scheme: str) -> None:
    """What is not a local path is refused with its scheme and what to give instead."""
    with pytest.raises(DataError, match=f"not from {scheme}:; give a plain path"):
        expand_shards(f"{scheme}://bucket/{{0..9}}.tar")


def test_slips_are_refused() -> None:
    """An empty part and a range of ten million names are refused before anything is opened."""
    with pytest.raises(DataError, match="empty part"):
        expand_shards("a.tar::")
    with pytest.raises(DataError, match=f"more than {MAX_SHARDS:,}"):
        expand_shards("{0000..9999999}.tar")


def test_a_local_name_may_hold_a_colon() -> None:
    """The way out that the message offers works."""
    assert expand_shards("./v1:train.tar") == ["./v1:train.tar"]
