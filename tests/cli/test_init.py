"""A study file from flags or answers, and the help that leads there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ablate.cli.app import app
from ablate.cli.examples import EXAMPLES, verbs_of
from ablate.study import load_study
from ablate.trial.recipe import find_ability, usable


def run(folder: Path, *words: str, answers: str = "", **env: str) -> str:
    """What a process of its own prints that sees a terminal; it ends well."""
    ours, theirs = os.openpty()
    os.write(ours, answers.encode())
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ablate.cli", *words],
            cwd=folder,
            stdin=theirs,
            capture_output=True,
            text=True,
            env={**os.environ, **env},
            timeout=120,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("gpus", ["0", "8"])
def test_a_study_from_flags_passes_check(ablate, tmp_path: Path, gpus: str) -> None:
    """Every question of the recipe at once: the file is valid, keeps what was given, says what
    each field means, and tells editors where its schema is."""
    words = ("init", "new/s.yaml", "--gpus", gpus, "--set", "batch_size=64", "--seeds", "2")
    said = ablate(*words, "--set", "train_data=cc/{00..11}.tar")
    missing = "/cc/00.tar and 11 others of 12 are not on this machine"
    unwrapped = "".join(said.out.split())  # a long path goes on in the next line
    assert said.code == 0 and "".join(missing.split()) in unwrapped
    text = (tmp_path / "new" / "s.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=ablate.schema.json")
    assert "# Peak learning rate" in text and "ablate launch new/s.yaml" in text
    study = load_study(tmp_path / "new" / "s.yaml")
    assert (study.baseline["batch_size"], study.seeds) == (64, (0, 1))
    assert study.gang.gpus_per_worker == min(int(gpus), 1)
    begin = find_ability("openclip", "beginning")
    assert begin is not None
    asked = begin(workers=max(int(gpus), 1), gpus=int(gpus)).questions
    assert len(study.factors) == len(asked)


def test_only_what_is_asked_is_varied(ablate, tmp_path: Path) -> None:
    """One --about is one factor; a second init does not overwrite the file."""
    assert ablate("init", "--about", "warmup").code == 0
    assert [factor.name for factor in load_study(tmp_path / "study.yaml").factors] == ["warmup"]
    said = ablate("init")
    assert said.code == 2 and "study.yaml exists; give another name" in said.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--about", "precison"], "did you mean 'precision'?"),
        (["--set", "bach_size=3"], "did you mean 'batch_size'?"),
        (["--set", "batch_size"], "write FIELD=VALUE"),
        (["--set", "batch_size=many"], "baseline.batch_size"),
        (["--recipe", "opnclip"], "'opnclip' is no recipe"),
    ],
)
def test_a_wrong_answer_writes_no_file(ablate, tmp_path: Path, words: list[str], says: str) -> None:
    """A name or value that there is not ends with the nearest one, before anything is written."""
    said = ablate("init", "s.yaml", *words)
    assert said.code == 2 and says in said.err and list(tmp_path.iterdir()) == []


def test_questions_are_asked_at_a_terminal(tmp_path: Path) -> None:
    """What no option says is asked for; an empty answer takes the proposal."""
    answers = "\n2\nRN101\n/d/{0..3}.tar\n\nbeta2 loss\n"
    run(tmp_path, "init", "s.yaml", answers=answers)
    study = load_study(tmp_path / "s.yaml")
    assert (study.recipe, study.gang.workers) == ("openclip", 2)
    assert study.baseline["model"] == "RN101" and study.baseline["train_data"] == "/d/{0..3}.tar"
    assert [factor.name for factor in study.factors] == ["beta2", "contrastive_loss"]


@pytest.mark.parametrize("recipe", sorted({*usable()} - {"elsewhere"}))  # it trains nothing
def test_every_recipe_of_ours_has_a_beginning(ablate, tmp_path: Path, recipe: str) -> None:
    """Whoever has no study yet gets a valid one for each recipe, with every question it has."""
    assert ablate("init", "s.yaml", "--recipe", recipe).code == 0
    study = load_study(tmp_path / "s.yaml")
    begin = find_ability(recipe, "beginning")(workers=1, gpus=0)
    asked = {factor for question in begin.questions.values() for factor in question.factors}
    assert study.recipe == recipe and {factor.name for factor in study.factors} == asked


def test_every_verb_shows_how_it_is_used() -> None:
    """The help of each verb ends with examples of that very verb, and no example is left over."""
    shown = {name: command.epilog or "" for name, command in verbs_of(app)}
    assert [name for name, text in shown.items() if f"  ablate {name.split()[0]}" not in text] == []
    assert set(EXAMPLES) <= set(shown)
    assert all(
        line.startswith(f"ablate {name.removesuffix(' replay')}")
        for name, lines in EXAMPLES.items()
        for line in lines
    )


def test_a_shell_completes_verbs(tmp_path: Path) -> None:
    """bash gets `plan` for `ablate pl`."""
    asked = {"_ABLATE_COMPLETE": "complete_bash", "COMP_WORDS": "ablate pl", "COMP_CWORD": "1"}
    assert run(tmp_path, **asked).split() == ["plan"]
