"""The command line: what it says to someone who makes a mistake, and what it prints for scripts."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_referee import with_prune

from ablate import cli


@dataclass(frozen=True, slots=True)
class Said:
    """How a command ended, and its two streams."""

    code: int
    out: str
    err: str


@pytest.fixture
def ablate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Runs the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["ablate", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
            sys.exit(0)
        said = capsys.readouterr()
        code = caught.value.code
        return Said(code if isinstance(code, int) else 1, said.out, said.err)

    return call


@pytest.mark.parametrize("verb", ["check", "plan"])
def test_a_rung_within_a_warmup_is_refused_by_check_and_plan(ablate, tmp_path, verb) -> None:
    """Both say the same, with the line."""
    levels = ("beta2: [0.999, 0.98]", "warmup: [2, 4]\n  batch_size: [64, 80]")
    (tmp_path / "s.yaml").write_text(with_prune("{rungs: [0.8, 0.5]}", levels))
    said = ablate(verb, "s.yaml")
    assert said.code == 2 and said.out == ""
    assert "s.yaml:14: design.prune.rungs[1]: rung 0.5 is too early" in said.err
    (tmp_path / "s.yaml").write_text(with_prune("{rungs: [0.8, 0.6]}", levels))
    said = ablate(verb, "s.yaml")
    assert said.code == 0 and "1 in 10 goes to its end" in " ".join(said.out.split())
