"""`ablate train` and `ablate evaluate` as a script reads them: a setting is trained without a
study, and what came of it is measured again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from small_trials import fields, make_data

from tests.cli.conftest import Said


def test_a_setting_trained_alone_is_measured_again_to_the_same_numbers(
    tmp_path: Path, ablate: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both print JSON alone on standard output; a second `train` of the same setting says the
    same, and another seed has no place in the first one's folder."""
    monkeypatch.setenv("ABLATE_CACHE", str(tmp_path / "cache"))
    make_data(tmp_path / "data")
    baseline = fields(epochs=1, warmup=0)
    setting = {"recipe": "openclip", "baseline": baseline, "seeds": [0]}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(setting))
    line = ("train", "s.yaml", "--root", "data", "--out", "one", "--json")
    said = ablate(*line)
    assert said.code == 0, said.err
    ended = json.loads(said.out)
    assert (ended["status"], ended["step"], ended["reason"]) == ("completed", 6, "6 steps")

    measured = json.loads(ablate("evaluate", "one", "--json").out)
    assert measured["imagenet_top1"] == ended["final"]["imagenet_top1"]

    other = ablate(*line, "--seed", "1")
    assert other.code == 2 and other.out == "" and "another setting or seed" in other.err
