"""YAML as people write it: what each spelling means, and what is refused with its line."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ablate.errors import StudyError
from ablate.records.yaml_text import parse_yaml


def read(text: str) -> Any:
    return parse_yaml(f"a: {text}\n", "s.yaml")[0]["a"]


def refusal(text: str) -> str:
    with pytest.raises(StudyError) as caught:
        parse_yaml(text, "s.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("010", 10),
        ("08", 8),
        ("-007", -7),
        ("0o17", 15),
        ("0x1F", 31),
        ("1e-3", 0.001),
        ("+1E+2", 100.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("1:30", "1:30"),
        ("190:20:30.15", "190:20:30.15"),
        ("2026-11-30", "2026-11-30"),
        ("2026-11-30 10:00:00", "2026-11-30 10:00:00"),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("no", "no"),
        ("ON", "ON"),
        ("TRUE", True),
        ("~", None),
        ("NULL", None),
        ("'null'", "null"),
        ("=", "="),
        ("-.INF", float("-inf")),
        (".Inf", float("inf")),
        ("!!str 010", "010"),
        ("!!float 3", 3.0),
    ],
)
def test_a_scalar_is_what_yaml_1_2_says(written: str, value: object) -> None:
    """The core schema: no octal by a leading zero, no base 60, no dates (pyyaml 107, BiblioPixel
    753), no booleans but true and false."""
    found = read(written)
    assert found == value and type(found) is type(value)


def test_a_number_that_is_none_is_read_as_such() -> None:
    """Each spelling of not-a-number is one."""
    assert all(read(text) != read(text) for text in (".nan", ".NaN", ".NAN"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("b:\n  1: x\n  1.0: y\n", "s.yaml:3: b.1.0: the key stands here a second time"),
        ("b:\n  0x10: x\n  16: y\n", "s.yaml:3: b.16: the key stands here a second time"),
        ("b: {true: x, TRUE: y}\n", "the key stands here a second time"),
        ("b: {null: x, ~: y}\n", "the key stands here a second time"),
        ("b: {a: x, 'a': y}\n", "the key stands here a second time"),
        ('b: {"\\u00e9": x, "e\\u0301": y}\n', "spelt '\\xe9'"),
        ("b:\n  ? [x, y]\n  : 1\n", "s.yaml:2: b: a key must be plain text, not a list"),
        ("b: {{ lr }}\n", "s.yaml:1: b: a key must be plain text"),
        ("b: {{ lr }}\n", "looks like a template that was not filled in"),
        ("b: [1, {{ x }}]\n", "looks like a template that was not filled in"),
        ("b: 1\n{% if x %}\nc: 2\n", "s.yaml:2: {% if x %} looks like a template"),
        ("b:\n  c: !!python/object/apply:os.system [x]\n", "s.yaml:2: the tag !!python/object"),
        ("b: !!timestamp 2026-01-01\n", "the tag !!timestamp is not read"),
        ("b: !!set {a, b}\n", "the tag !!set is not read"),
        ("b: !lr 3\n", "the tag !lr is not read"),
        ("b: 1\nc: !!int three\n", "s.yaml:2: 'three' is no int"),
        ("b: !!float x\n", "'x' is no float"),
        ("b: !!bool maybe\n", "'maybe' is no bool"),
        ("b: !!null x\n", "'x' is no null"),
        (f"b: {'9' * 5000}\n", "a number of 5000 digits is no int"),
        ("b: {<<: 3}\n", "<< merges a mapping"),
        ("b: {<<: [3]}\n", "<< merges a mapping"),
        ('b: "\\ud83d"\n', "half a character"),
        ("b: *nowhere\n", "s.yaml:1: not valid YAML: found undefined alias"),
        ("b: &b [*b]\n", "nested too deeply"),
        ("[" * 500, "nested too deeply"),
        ("a: 1\nb:\u00a02\nc: 3\n", "s.yaml:2: not valid YAML: the line holds a character"),
        ("a: 1\nb:\u00a02\nc: 3\n", "no-break space (U+00A0)"),
        ("a: 1\nb: \0\n", "s.yaml:2: not valid YAML: the character U+0000"),
        ("a: 1\n---\nb: 2\n", "s.yaml:2: a second document begins here"),
        ("a:\n\tb: 1\n", "s.yaml:2: not valid YAML"),
        ("a:\n\tb: 1\n", "indent with blanks"),
        ("", "s.yaml:1: the file holds nothing"),
        ("# only this\n", "the file holds nothing"),
        ("- a\n", "this is a list"),
        ("text\n", "this is plain text"),
    ],
)
def test_what_no_study_may_hold_is_refused_with_its_line(text: str, words: str) -> None:
    """Keys that are one however they are spelt (yacs 17, seml 37, fairchem 658), keys that are no
    text, tags, templates that were not filled in (hydra 2599): each with its line."""
    assert words in refusal(text)


def test_keys_stay_as_they_are_spelt() -> None:
    """A level that is called on, 1, 1e-3 or null keeps that name."""
    content, spots = parse_yaml("on: 1\n1: 2\n1e-3: 3\nnull: 4\n", "s.yaml")
    assert content == {"on": 1, "1": 2, "1e-3": 3, "null": 4}
    assert spots["1e-3",].line == 3 and spots["null",].written == "4"


def test_what_is_merged_yields_to_what_is_written() -> None:
    """A merged mapping comes first, of several the first counts, own values win."""
    text = "x: &x {a: 1, b: 1}\ny: &y {b: 2, c: 2}\nz: {<<: [*x, *y], a: 3}\n"
    assert parse_yaml(text, "s.yaml")[0]["z"] == {"a": 3, "b": 1, "c": 2}


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)


@settings(max_examples=40)
@given(st.dictionaries(st.text(max_size=8), plain))
def test_what_is_written_in_json_comes_back(content: dict[str, Any]) -> None:
    """JSON is YAML 1.2: every tree of plain values is read as it was meant."""
    keys = [unicodedata.normalize("NFC", key) for key in content]
    text = json.dumps(content)
    try:
        found = parse_yaml(text, "s.yaml")[0]
    except StudyError as error:
        assert "second time" in str(error) or len(set(keys)) < len(keys) or "deeply" in str(error)
    else:
        assert found == content


pieces = st.sampled_from(
    ["a", "1", "1.0", ":", ": ", "- ", "? ", "{", "}", "[", "]", ",", "{{ x }}", "&x ", "*x",
     "<<: ", "!!int ", "!!map ", "!y ", "'", '"', "|", ">", "#", "\n", "\n  ", "\t", "---\n",
     "...\n", "%YAML 1.1\n", "~", "\u00a0", "\u2028", "\ufeff", "@", "`"]
)  # fmt: skip


@given(st.lists(pieces, max_size=30).map("".join))
def test_anything_like_yaml_is_read_or_refused_with_a_line(text: str) -> None:
    """However marks are thrown together: content, or a StudyError with the line; never a crash."""
    try:
        content, spots = parse_yaml(text, "s.yaml")
    except StudyError as error:
        assert str(error).startswith("s.yaml:")
    else:
        assert yaml.compose(text) is not None and {place[0] for place in spots} >= set(content)
