"""What may be a name, and what may not: of studies, factors, levels and their folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scripted_studies import prepare, run

from ablate.errors import RecordError, StudyError
from ablate.records.folder import StudyRecord
from ablate.records.names import find_fault
from ablate.report.report import write_report
from ablate.runner.plan.plan import plan
from ablate.study import load_study, parse_study

HEAD = """\
recipe: openclip
baseline: {model: RN50, train_data: data/t.tar, imagenet_val: data/val, beta2: 0.98, warmup: 4}
seeds: [0, 1]
"""


def refusal(factors: str, head: str = HEAD) -> str:
    with pytest.raises(StudyError) as caught:
        parse_study(f"{head}factors:\n{factors}", path="s.yaml", root="/r")
    return str(caught.value)


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        ("  f: {baseline: {warmup: 9}, b: {warmup: 10}}\n", "it sets warmup 9"),
        ("  f: {Baseline: {warmup: 9}, b: {warmup: 10}}\n", "give it another name"),
        ("  warmup: {'4': {warmup: 9}, b: {warmup: 10}}\n", "level '4' of warmup has the base"),
        ("  baseline: {a: {}, b: {warmup: 9}}\n", "s.yaml:5: factors.baseline: the baseline is"),
        ("  '': {a: {}, b: {warmup: 9}}\n", "a name must not be empty"),
        ("  f: {a: {}, '': {warmup: 9}}\n", "a name must not be empty"),
        (
            "  f:\n    a: {}\n    ' b': {warmup: 9}\n",
            "s.yaml:7: factors.f. b: the name ' b' begins",
        ),
        ('  f: {a: {}, "b\\e[31m": {warmup: 9}}\n', "control character (U+001B)"),
        ('  f: {a: {}, "b\\n": {warmup: 9}}\n', "control character (U+000A)"),
        ('  f: {a: {}, "\\u202eb": {warmup: 9}}\n', "right-to-left override (U+202E)"),
        ('  f: {a: {}, "b\\u200b": {warmup: 9}}\n', "zero width space (U+200B)"),
        ('  f: {a: {}, "b\\u00a0c": {warmup: 9}}\n', "no-break space (U+00A0)"),
        ('  f: {a: {}, "b\\u2028": {warmup: 9}}\n', "line separator (U+2028)"),
        ('  f: {a: {}, "e\\u0301": {warmup: 9}}\n', "write 'é'"),
        ("  f: {a: {}, l\u0430st: {warmup: 9}}\n", "(cyrillic small letter a, U+0430)"),
        ("  f: {a: {}, l\u0430st: {warmup: 9}}\n", "which looks like 'a'; write 'last'"),
        ("  \u039fpt: {a: {}, b: {warmup: 9}}\n", "(greek capital letter omicron, U+039F)"),
        ("  f: {a: {}, \uff4c\uff52: {warmup: 9}}\n", "which looks like 'l'; write 'lr'"),
        ("  f: {\u0430: {}, a: {warmup: 9}}\n", "the key stands here a second time (above it is"),
        ("  w\u0430rmup: [4, 9]\n", "write 'warmup'"),
        (f"  f: {{a: {{}}, {'b' * 101}: {{warmup: 9}}}}\n", "101 characters; write at most 100"),
        ('  wd: [0.1, "0.2\\t"]\n', "give it a name of its own: {NAME: {wd: ...}, ...}"),
    ],
)
def test_a_name_that_misleads_is_refused_with_its_line(factors: str, words: str) -> None:
    """Empty, blank at an end, invisible, turned around, too long, or the baseline's and not the
    baseline (wandb 4016 and 6249, ray 65286, optuna-dashboard 1073)."""
    said = refusal(factors)
    assert words in said and said.startswith("s.yaml:")
    assert all(character.isprintable() or character == "\n" for character in said)


@pytest.mark.parametrize(
    "name",
    ["нет", "сор", "λ_max", "μP", "β₂ ↑", "naïve", "学习", "10⁴", "ℝ³", "Δloss", "x=½", "größer"],
)
def test_a_name_in_whichever_alphabet_is_one(name: str) -> None:
    """A word that does not mix alphabets, or mixes letters that look like none of ours, stays."""
    assert find_fault(name) == ""


def test_a_letter_of_another_alphabet_is_named_where_a_word_is_not_known() -> None:
    """`mоdel` and `аmp` look right: what is wrong with them is said."""
    text = (
        HEAD.replace("model: RN50", "model: RN50, precisi\u043en: fp32")
        + "factors: {wd: [0.1, 0.2]}\n"
    )
    with pytest.raises(StudyError, match=r"it holds '\u043e' \(cyrillic small letter o, U\+043E\)"):
        parse_study(text, path="s.yaml", root="/r")
    assert "U+0430" in refusal("  precision: [fp32, \u0430mp]\n")


def test_the_baseline_may_be_called_so() -> None:
    """A level that leaves the baseline unchanged may have its name."""
    text = HEAD + "factors: {f: {baseline: {}, same: {warmup: 9}}}\n"
    study = parse_study(text, path="s.yaml", root="/r")
    assert study.factor("f").baseline == "baseline"


@given(st.text(max_size=120))
def test_an_accepted_name_is_one_line_that_can_be_seen(name: str) -> None:
    """What is accepted prints as it is, survives stripping, and is not too long."""
    assume(not find_fault(name))
    assert name.isprintable() and name == name.strip() and 0 < len(name) <= 100


@pytest.mark.parametrize(
    "file", ["学习.yaml", "öde studie (1).yaml", "-x.yaml", "a b.yaml", "x" * 65 + ".yaml"]
)
def test_a_file_name_that_is_no_study_name_asks_for_one(tmp_path: Path, file: str) -> None:
    """Nothing is made up from a file's name, so two files never end in one folder (ray 1463)."""
    text = HEAD + "factors: {warmup: [9]}\n"
    (tmp_path / file).write_text(text)
    with pytest.raises(StudyError, match=r"is no name of a study.*e\.g\. name: [A-Za-z0-9]"):
        load_study(tmp_path / file)
    (tmp_path / file).write_text("name: mine\n" + text)
    assert load_study(tmp_path / file).name == "mine"


@pytest.mark.parametrize("name", ["mlflow.db", "MLartifacts", "trained", "'..'", "a/b", "'x\\n'"])
def test_a_study_keeps_to_a_folder_of_its_own(name: str) -> None:
    """No name leaves the folder of all studies, or takes what lies beside them."""
    said = refusal("  warmup: [9]\n", f"name: {name}\n{HEAD}")
    assert "s.yaml:1: name: " in said


def test_a_number_as_name_is_to_be_quoted() -> None:
    """What was written is shown, and how to write it."""
    assert "not 0123; put it in quotes: '0123'" in refusal("  warmup: [9]\n", f"name: 0123\n{HEAD}")


def test_a_level_that_reads_like_several_is_quoted() -> None:
    """A change to one factor never reads as a change to two."""
    text = HEAD + "factors: {f: {a: {}, 'b, g=c': {warmup: 9}}, g: {a: {}, c: {wd: 0.1}}}\n"
    study = parse_study(text, path="s.yaml", root="/r")
    cell = study.cell({"f": "b, g=c"})
    assert study.change_name(dict(cell.levels)) == "f='b, g=c'"
    assert cell.name == "f='b, g=c', g=a"


STUDY = """\
name: shared
recipe: openclip
baseline: {model: tiny-rn-a, train_data: t.tar, imagenet_val: val, precision: fp32, warmup: 5}
seeds: [0, 1]
"""


def test_two_studies_never_share_a_folder(tmp_path: Path) -> None:
    """Another file with other trials is refused by plan and launch, and the first report stays; the
    file itself may be edited, and moved while a trial is the same (ray 49477)."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    first = prepare(one, [], STUDY + "factors: {warmup: [1]}\n")
    _, record, _ = run(first, one)
    answer = write_report(first, record).markdown.read_text()
    other = STUDY.replace("warmup: 5", "warmup: 7") + "factors: {beta2: [0.9]}\n"
    second = prepare(two, [], other)
    with pytest.raises(RecordError, match=r"belongs to another study, that of .*one/s\.yaml"):
        plan(second, record)
    (two / "runs").symlink_to(one / "runs")
    with pytest.raises(RecordError, match="a name of its own"):
        run(second, two)
    assert (record.study() or {})["text"] == first.source.text
    assert write_report(first, record).markdown.read_text() == answer
    edited = parse_study(other, path="s.yaml", root=one)
    assert plan(edited, record).to_run
    moved = parse_study(STUDY + "factors: {beta2: [0.9]}\n", path="s.yaml", root=two)
    assert len(plan(moved, StudyRecord(record.folder)).to_run) == 2, "the baseline has been run"
