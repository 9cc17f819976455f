"""The report: says the same everywhere, escapes what users wrote, and is the same every time."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from synthetic import QUICK, study_of, write_study

from ablate.analysis.analysis import analyze_results
from ablate.analysis.results import Objective, Result
from ablate.cli.display import render_summary
from ablate.markers.healthy import false_names
from ablate.records.files import read_json, write_json
from ablate.records.folder import StudyRecord
from ablate.report.best import recommend
from ablate.report.page import header_comment, read_page
from ablate.report.pictures.figures import curve_groups, path_picture
from ablate.report.pictures.picture import PALETTE
from ablate.report.questions import verdict_words
from ablate.report.report import Summary, SummaryRow, guard, latex_text, markdown_text, write_report
from ablate.report.scale import scale_of
from ablate.study.table import read_table

CORE = ("effects.csv", "trials.csv", "effects.tex", "verdicts.json")


@pytest.fixture(scope="module")
def report(quick, tmp_path_factory):
    study, record = quick
    return write_report(study, record, folder=tmp_path_factory.mktemp("report"))


class _Page(HTMLParser):
    """Every element with its attributes, and the text of each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_importing_the_analysis_loads_no_engine():
    """Reports are made on laptops: no torch, ray, mlflow or optuna is imported."""
    code = (
        "import sys, ablate.report.report, ablate.report.export\n"
        "print([m for m in ('torch', 'ray', 'mlflow', 'optuna') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_scores_that_were_measured_once_are_drawn_as_no_curve(tmp_path):
    """One evaluation at the end makes no curve: the losses stand alone, and no box is empty."""
    study = study_of(tmp_path)
    record = write_study(tmp_path, study)
    scale = scale_of(study, [])

    def drawn() -> set[str]:
        groups = curve_groups(read_table(study, record), scale)
        assert groups
        return {panel.name.split("-")[0] for group in groups for panel in group.panels}

    assert drawn() == {"score", "loss"}
    for path in record.folder.rglob("evals.jsonl"):
        path.write_text(path.read_text().splitlines(keepends=True)[-1])
    assert drawn() == {"loss"}


def test_the_planted_effects_are_what_the_report_says(report):
    """Planted differences are found with their sign, and nothing else is called a difference."""
    said = {(row.factor, row.level): row.role for row in report.summary.rows}
    assert said["warmup", "5"] == said["contrastive_loss", "local_only"] == "worse"
    assert said["lr", "0.02"] == "worse"
    assert said["augmentation", "strong"] == said["beta2", "0.98"] == "better"
    assert said["precision", "amp"] == said["precision", "fp32"] == "same"
    assert {said["warmup", "60"], said["contrastive_loss", "local_gather"]} <= {"open", "same"}


def test_differences_are_told_on_other_images_too(report):
    """Where every run has told which images it got right: an interval for other images, wider than
    that over seeds alone, for each comparison of two cells without a lost run."""
    verdicts = json.loads(report.verdicts_json.read_text())
    told = {(view["factor"], view["level"]): view for view in verdicts["images"]}
    assert ("augmentation", "strong") in told and ("warmup", "60") in told
    for c in verdicts["questions"]["baseline"]["contrasts"]:
        view = told.get((c["factor"], c["level"]))
        if view is not None and not c["diverged"][0]:
            low, high = view["found"]["ci"]
            assert high - low > 0.95 * (c["ci"][1] - c["ci"][0])
            assert view["found"]["images"] == 2000 and 0 <= view["found"]["image_share"] < 1
    assert "On other images of this kind" in report.html.read_text()


def test_what_was_expected_opens_the_report(tmp_path):
    """Expected against found, first of all, in every format: a side that was named and is shown,
    one that is shown the other way, and an equivalence."""
    lines = "hypothesis: {augmentation=strong: better, warmup=5: better, precision: equivalent}\n"
    study = study_of(tmp_path, QUICK + lines)
    paths = write_report(study, write_study(tmp_path / "run", study))
    told = json.loads(paths.verdicts_json.read_text())["expected"]
    assert [(line["expected"], line["found"]) for line in told] == [
        ("augmentation=strong better", "confirmed"),
        ("warmup=5 better", "contradicted"),
        ("precision=amp equivalent", "confirmed"),
        ("precision=fp32 equivalent", "confirmed"),
    ]
    assert paths.summary.headlines[0] == "augmentation=strong better: confirmed"
    for path, use in ((paths.html, 'id="use"'), (paths.markdown, "What to use")):
        text = path.read_text()
        assert 0 < text.find("xpected augmentation=strong") < text.find(use)


def test_every_format_holds_the_same_contrasts(report):
    """HTML, Markdown, CSV, JSON and LaTeX list the same comparisons with the same verdicts."""
    with open(report.effects_csv, newline="") as file:
        rows = list(csv.DictReader(file))
    verdicts = json.loads(report.verdicts_json.read_text())
    contrasts = verdicts["questions"]["baseline"]["contrasts"]
    assert [(r["factor"], r["level"], r["verdict"]) for r in rows] == [
        (c["factor"], c["level"], c["verdict"]) for c in contrasts
    ]
    for row, contrast in zip(rows, contrasts, strict=True):
        assert float(row["delta"]) == contrast["delta"]
        assert [int(row["diverged"]), int(row["runs"])] == contrast["diverged"]
    html, markdown, latex = (
        path.read_text() for path in (report.html, report.markdown, report.latex)
    )
    for row in report.summary.rows:
        assert row.delta in html and row.delta in markdown
        assert latex_text(row.level) in latex
    assert html.count('class="chip') == 2 * len(rows)


def test_fp32_is_named_for_what_the_machines_made_of_it(tmp_path):
    """A level of that name was TF32 where its runs say so, and the page has it among its facts."""
    text = QUICK.replace("seeds: [0, 1, 2, 3]", "seeds: [0]")
    study = study_of(tmp_path, text)
    record = write_study(tmp_path, study)
    assert "fp32 was" not in dict(read_page(read_table(study, record)).facts)
    for row in read_table(study, record).rows:
        trial = record.record(row.id)
        path = trial.folder / "attempts" / "1" / "result.json"
        arithmetic = "TF32" if ("precision", "fp32") in row.levels else "IEEE fp32"
        write_json(path, {**read_json(path), "facts": {"fp32": arithmetic}})
    page = write_report(study, record, folder=tmp_path / "report").html.read_text()
    assert dict(read_page(read_table(study, record)).facts)["fp32 was"] == "TF32"
    assert "fp32 was" in _Page(page).text


def test_sections_of_a_complete_report(report):
    """The answer comes first, the cost stands apart, and failed runs stay visible."""
    page = _Page(report.html.read_text())
    sections = [attrs["id"] for tag, attrs in page.elements if tag == "section"]
    assert sections == [
        "answer", "effects", "curves", "course", "instability", "next", "cells", "cost", "setup",
        "trials", "reproduce",
    ]  # fmt: skip
    assert "Which of the usual suspects moves zero-shot accuracy" in page.text
    assert page.text.count("diverged") > 5
    assert "ablate confirm" in page.text  # what to run next
    links = [attrs["href"] for tag, attrs in page.elements if tag == "a"]
    assert {link.removeprefix("#") for link in links} == set(sections)


def test_the_page_fetches_nothing_and_runs_nothing(report):
    """No script, no address of another host, and a policy that forbids both."""
    text = report.html.read_text()
    page = _Page(text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "img", "base", "form"}
    for tag, attrs in page.elements:
        for name, value in attrs.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src", "xlink:href"):
                assert value and value.startswith("#"), (tag, value)
    assert "http://" not in text and "https://" not in text and "@import" not in text
    policy = [attrs["content"] for tag, attrs in page.elements if "http-equiv" in attrs]
    assert policy and policy[0].startswith("default-src 'none'")


def test_ids_on_the_page_are_unique_and_references_resolve(report):
    """Pictures side by side do not share ids, and each reference finds its own."""
    text = report.html.read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)


def test_equal_results_give_equal_bytes(quick, report, tmp_path):
    """The same records twice, and records of a run with crashes, agree in all but the cost."""
    study, record = quick
    again = write_report(study, record, folder=tmp_path / "again")
    for name in (*CORE, "report.html", "report.md", "cost.csv"):
        assert (again.html.parent / name).read_bytes() == (
            report.html.parent / name
        ).read_bytes(), name
    assert [f.read_bytes() for f in again.figures] == [f.read_bytes() for f in report.figures]

    crashed = write_report(
        study, write_study(tmp_path / "crashed", study, crash_at=100, speed=300.0)
    )
    assert crashed.digest == report.digest
    for name in CORE:
        assert (crashed.html.parent / name).read_bytes() == (
            report.html.parent / name
        ).read_bytes(), name
    cost = re.compile(r'<section id="cost".*?</section>', re.DOTALL)
    texts = [cost.sub("", paths.html.read_text()) for paths in (report, crashed)]
    assert texts[0] == texts[1]
    assert report.cost_csv.read_bytes() != crashed.cost_csv.read_bytes()


def test_another_result_gives_another_digest(quick, report, tmp_path):
    """The digest moves when one number of one trial moves."""
    study, _ = quick
    changed = write_study(tmp_path, study, effects={("warmup", "60"): 0.004})
    assert write_report(study, changed).digest != report.digest


EVIL = """\
# Is <script>alert(1)</script> & "quoted" | *bold* safe?
recipe: openclip
baseline: {model: RN50, train_data: "d-{0000..0001}.tar", train_num_samples: 2560, imagenet_val: data/val, epochs: 12}
factors:
  "=cmd|'/c calc'!A1":
    "<script>alert(2)</script>": {}
    '"><img src=x onerror=alert(3)>': {wd: 0.3}
    "@SUM(1+1)|`x`$x^2$\\\\input{a}": {wd: 0.4}
  "-2+3<b>": {"a&amp;b": {}, "{{ 7*7 }}{% raw %}": {lr: 0.002}}
design: one_at_a_time
seeds: [0, 1, 2]
"""  # noqa: E501


def test_what_users_write_is_only_ever_text(tmp_path):
    """Markup, formulas and templates in names come out as the characters that were typed."""
    study = study_of(tmp_path, EVIL)
    record = write_study(tmp_path, study, effects={}, diverged={}, failed=[
        ("-2+3<b>", "{{ 7*7 }}{% raw %}", 0)
    ])  # fmt: skip
    paths = write_report(study, record)
    html = paths.html.read_text()
    page = _Page(html)
    tags = {tag for tag, _ in page.elements}
    assert "script" not in tags and "img" not in tags
    assert "49" not in {word for row in paths.summary.rows for word in (row.factor, row.level)}
    for text in ("<script>alert(2)</script>", '"><img src=x onerror=alert(3)>', "a&amp;b",
                 "{{ 7*7 }}{% raw %}", "<bus error>"):  # fmt: skip
        assert text in page.text, text
    markdown = paths.markdown.read_text()
    assert "<script" not in markdown and "<img" not in markdown
    table = [line for line in markdown.splitlines() if line.startswith("| ")]
    bars = {len(re.findall(r"(?<!\\)\|", line)) for line in table}
    assert bars <= {5, 6, 9, 10, 12}, bars
    for path in (paths.effects_csv, paths.trials_csv, paths.cost_csv):
        with open(path, newline="") as file:
            for row in csv.reader(file):
                for cell in row:
                    if cell[:1] in ("=", "+", "-", "@"):
                        float(cell)
    assert "\\input" not in paths.latex.read_text()


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\tx", "\rx"])
def test_a_spreadsheet_never_sees_a_formula(text):
    """Text that a spreadsheet would execute is marked as text; numbers stay numbers."""
    assert guard(text) == f"'{text}"
    assert guard(-1.5) == -1.5 and guard("a=b") == "a=b"


def test_texts_for_markdown_and_latex():
    """Characters with a meaning lose it."""
    assert markdown_text("a|b*c_<d>\n&") == r"a\|b\*c\_&lt;d&gt; &amp;"
    assert latex_text(r"50% of_\x") == r"50\% of\_\textbackslash{}x"


def test_the_question_is_the_header_comment():
    """Paragraphs of the comment at the head of the file, labels begin one; a line for editors and
    comments further down are no part of it."""
    assert header_comment("# Why?\n# Because.\n#\n# Cost: 3.\nrecipe: x\n# no\n") == (
        "Why? Because.",
        "Cost: 3.",
    )
    assert header_comment("recipe: x\n# no") == ()
    assert header_comment(
        "# yaml-language-server: $schema=s\n#\n# Why?\n# Cost     3\n#   or 4\n"
    ) == (
        "Why?",
        "Cost: 3 or 4",
    )


ONE_FACTOR = (
    QUICK[: QUICK.index("factors:")]
    + """\
factors:
  warmup: [20, 5]
design: one_at_a_time
seeds: [7]
objective: {margin: 0.01}
"""
)


def test_one_seed(tmp_path):
    """With one seed the differences are told, and that nothing is decided."""
    study = study_of(tmp_path, ONE_FACTOR)
    paths = write_report(study, write_study(tmp_path, study))
    (row,) = paths.summary.rows
    assert row.role == "open" and row.interval == "\N{EN DASH}"
    assert "With one seed nothing is known about noise" in paths.html.read_text()


def test_nothing_has_run(tmp_path):
    """The report of an empty folder says so instead of failing."""
    study = study_of(tmp_path, ONE_FACTOR)
    paths = write_report(study, StudyRecord(tmp_path / "runs"))
    assert paths.summary.rows == () and "2 trials of 2 are not there yet" in paths.summary.partial
    assert "No trial has ended yet" in paths.html.read_text()


def test_a_folder_of_other_settings_is_not_called_empty(tmp_path):
    """After a change of the baseline the answer says that what is there is of another one."""
    record = write_study(tmp_path, study_of(tmp_path, ONE_FACTOR))
    changed = study_of(tmp_path, ONE_FACTOR.replace("wd: 0.1", "wd: 0.3"))
    use = recommend(read_table(changed, record))
    assert use.cell is None and "2 trials in the folder are of other settings" in use.why


def test_failures_that_fall_on_one_level_are_held_against_it(tmp_path):
    """Three of three runs of a level that failed are said to fall there; one here and one there
    are said to fall nowhere in particular."""
    study = study_of(tmp_path)
    for name, failed, says in (
        ("one", {("beta2", "0.98", seed) for seed in range(3)}, "Failures fall on beta2=0.98"),
        ("two", {("beta2", "0.98", 0), ("warmup", "5", 1)}, "They fall on no level in particular"),
    ):
        record = write_study(tmp_path / name, study, failed=failed)
        assert says in write_report(study, record).markdown.read_text()


def test_a_study_whose_runs_all_failed_is_told_to_mend_them(tmp_path):
    """No seed is asked for, no level is said to be free of blame: mend the cause, try again."""
    study = study_of(tmp_path, ONE_FACTOR)
    trials = [(one, two, seed) for one, two in (("baseline", ""), ("warmup", "5"))
              for seed in study.seeds]  # fmt: skip
    paths = write_report(study, write_study(tmp_path, study, failed=trials))
    assert all(row.needs_seeds == "" for row in paths.summary.rows) and paths.summary.rows
    [(text, code)] = paths.summary.next
    assert "No run has a score, so nothing can be said of any setting." in text
    assert code == f"ablate launch {study.file} --again failed"


def test_more_seeds_are_not_advised_where_all_results_are_identical(tmp_path):
    """A level that changed no bit of the result is asked about ("is it applied?"); that another
    fifty seeds would decide it is not said, in the table nor in the advice."""
    study = study_of(tmp_path)
    record = write_study(tmp_path, study, effects={}, diverged={}, spiky=(), noise=0.0)
    paths = write_report(study, record)
    assert "identical results in all 4 seeds" in paths.markdown.read_text()
    assert not any(row.needs_seeds for row in paths.summary.rows)
    assert not any("seeds" in text for text, _ in paths.summary.next)


def test_each_equivalence_has_an_error_of_its_own(report):
    """The figure of effects says that "within the margin" is no claim about all of them at once."""
    assert "answers that something lies within the margin has 5 % of its own" in (
        report.html.read_text().replace("\n", " ")
    )


def test_part_of_a_study(tmp_path):
    """A partial study is reported as far as it goes, with what is missing on top."""
    study = study_of(tmp_path)
    missing = [("augmentation", "strong", seed) for seed in (0, 1, 2, 3)] + [("baseline", "", 3)]
    failed = [("beta2", "0.98", 1)]
    paths = write_report(study, write_study(tmp_path, study, missing=missing, failed=failed))
    assert "5 trials of 44 are not there yet" in paths.summary.partial
    assert ("failed", 1) in paths.summary.counts
    page = _Page(paths.html.read_text())
    assert "rank 1 <bus error>" in page.text
    assert paths.summary.next[0][1] == "ablate launch quick.yaml"


def test_equal_results_are_called_identical():
    """In every table and picture: no difference was too small to tell, there was none."""
    results = [
        Result((("flag", level),), seed, "completed", 0.5 + seed / 100)
        for level in ("off", "on")
        for seed in range(3)
    ]
    [on] = analyze_results(results, baseline={"flag": "off"}, objective=Objective()).contrasts
    assert (verdict_words(on), on.verdict) == ("identical", "INCONCLUSIVE")


def test_no_number_is_cut_off_on_eighty_columns():
    """The widest words of every column side by side: "+23" is not to be read as "+2"."""
    row = SummaryRow(
        "lr", "0.002", "0.0005", "+11.13", "\N{MINUS SIGN}10.71 to +12.98", "matters, better",
        "open", "0/10", "+23",
    )  # fmt: skip
    diverged = replace(row, diverged="10/10", needs_seeds="> 50")
    summary = Summary("s", "points", (), (row, diverged), (), "", ())
    console = Console(width=80, file=io.StringIO())
    console.print(render_summary(summary))
    shown = console.file.getvalue()
    for word in ("+23", "> 50", "10/10", "+11.13", "to +12.98", "matters, better", "seeds"):
        assert word in shown, shown


def test_while_a_launch_is_at_work_nobody_is_told_to_launch(tmp_path):
    """What is to be done about trials that are still to come is to wait for them."""
    study = study_of(tmp_path)
    record = write_study(tmp_path, study, missing=[("baseline", "", 3)])
    missing = study.trial(study.cell({}), seed=3).id
    text, code = write_report(study, record, active={missing}).summary.next[0]
    assert "a launch is at work" in text and code == "ablate watch runs/quick"


def test_everything_diverged(tmp_path):
    """When every run of every cell diverged there is no difference, and no crash either."""
    study = study_of(tmp_path, ONE_FACTOR.replace("[7]", "[0, 1, 2]"))
    record = write_study(
        tmp_path, study, diverged={("warmup", "5"): (0, 1, 2), ("baseline", ""): (0, 1, 2)}
    )
    paths = write_report(study, record)
    assert paths.summary.counts == (("diverged", 6),)
    (row,) = paths.summary.rows
    assert row.diverged == "3/3" and row.delta == "\N{EN DASH}"


def wide(design: str, *, factors: int, levels: int) -> str:
    """A study with many factors, each a compound of its own."""
    names = ["lr", "wd", "beta1", "beta2", "eps", "warmup", "grad_clip_norm", "batch_size",
             "epochs", "accum_freq", "lr_scheduler", "precision"]  # fmt: skip
    values = {
        "lr": [1e-3, 2e-3, 3e-3, 4e-3], "wd": [0.1, 0.2, 0.3, 0.4],
        "beta1": [0.9, 0.8, 0.85, 0.95], "beta2": [0.999, 0.99, 0.98, 0.95],
        "eps": [1e-8, 1e-7, 1e-6, 1e-5], "warmup": [20, 5, 60, 80],
        "grad_clip_norm": [1.0, 2.0, 3.0, 4.0], "batch_size": [64, 32, 128, 256],
        "epochs": [12, 13, 14, 15], "accum_freq": [1, 2, 3, 4],
        "lr_scheduler": ["cosine", "const"], "precision": ["amp_bf16", "amp", "fp32", "bf16"],
    }  # fmt: skip
    head = QUICK[: QUICK.index("factors:")].replace("model:", "grad_clip_norm: 1.0\n  model:")
    lines = [f"  {name}: {values[name][:levels]}" for name in names[:factors]]
    return (
        head + "factors:\n" + "\n".join(lines).replace("'", "") + f"\ndesign: {design}\n"
        "seeds: [0, 1]\n"
    )


@pytest.mark.slow
def test_twelve_factors_of_four_levels(tmp_path):
    """A wide study gives one pair of panels a factor and one row a contrast, in bounded time."""
    study = study_of(tmp_path, wide("one_at_a_time", factors=12, levels=4))
    paths = write_report(study, write_study(tmp_path, study, effects={}, diverged={}))
    assert len(paths.summary.rows) == 34
    assert paths.html.read_text().count('<svg class="plot"') == 2 * 12 + 3
    assert paths.html.stat().st_size < 5_000_000


def test_full_factorial_shows_interactions(tmp_path):
    """A complete crossing reports main effects and the interactions between them."""
    study = study_of(tmp_path, wide("full_factorial", factors=2, levels=2))
    record = write_study(tmp_path, study, effects={("wd", "0.2"): 0.05}, diverged={})
    paths = write_report(study, record)
    assert [(row.factor, row.role) for row in paths.summary.rows] == [
        ("lr", paths.summary.rows[0].role),
        ("wd", "better"),
    ]
    assert "Interactions" in _Page(paths.html.read_text()).text


def test_leave_one_out_asks_two_questions(tmp_path):
    """Changes are judged as reverted from the target and as made alone."""
    design = '{name: leave_one_out, target: {lr: "0.002", wd: "0.2"}}'
    study = study_of(tmp_path, wide(design, factors=2, levels=2))
    record = write_study(tmp_path, study, effects={("wd", "0.2"): 0.05}, diverged={})
    paths = write_report(study, record)
    verdicts = json.loads(paths.verdicts_json.read_text())["questions"]
    assert list(verdicts) == ["reverted", "added"]
    assert [c["delta"] > 0 for c in verdicts["reverted"]["contrasts"] if c["factor"] == "wd"] == [
        False
    ]
    assert [c["delta"] > 0 for c in verdicts["added"]["contrasts"] if c["factor"] == "wd"] == [True]
    first, second, _ = paths.summary.headlines
    assert first.startswith("Each change taken out of the target: ")
    assert second.startswith("Each change made alone: ")


def test_colours_on_text_are_legible():
    """Every colour that text is set in has a contrast of 4.5 on its page (WCAG AA)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, two: str) -> float:
        high, low = sorted((luminance(one), luminance(two)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for theme in (0, 1):
        paper = PALETTE["paper"][theme]
        for role in ("ink", "muted", "better", "worse", "open", "same"):
            assert contrast(PALETTE[role][theme], paper) >= 4.5, (role, theme)


def test_figures_for_papers_are_pdf(report):
    """The effect plot is also there as a PDF with its fonts inside."""
    assert [Path(figure).name for figure in report.figures] == ["effects-baseline.pdf"]
    content = report.figures[0].read_bytes()
    assert content.startswith(b"%PDF-") and b"/FontFile2" in content


def test_names_in_any_script(tmp_path):
    """Names that the drawing's font lacks are text on the page all the same."""
    names = "  初期化: {既定: {}, 강한: {wd: 0.3}, \U0001f680: {wd: 0.4}}\n"
    head = QUICK[: QUICK.index("factors:")].replace("Which", "何が効くか? Which")
    study = study_of(tmp_path, f"{head}factors:\n{names}seeds: [0, 1]\n")
    paths = write_report(study, write_study(tmp_path, study, effects={}, diverged={}))
    text = paths.html.read_text()
    for name in ("初期化", "강한", "\U0001f680", "何が効くか"):
        assert name in text


def test_a_fraction_shows_its_design_and_aliases(tmp_path):
    """A fractional factorial prints its cells by sign and what it cannot tell apart."""
    design = "{name: fractional_factorial, resolution: III}"
    study = study_of(tmp_path, wide(design, factors=3, levels=2))
    paths = write_report(study, write_study(tmp_path, study, effects={}, diverged={}))
    text = _Page(paths.html.read_text()).text
    assert "Effects on one line cannot be told from each other" in text
    assert re.search(r"lr = wd x beta1", text)
    contrasts = json.loads(paths.verdicts_json.read_text())["questions"]["baseline"]["contrasts"]
    assert {c["factor"]: c["aliases"] for c in contrasts}["lr"] == ["wd x beta1"]


def test_the_executed_path_is_drawn(tmp_path):
    """An ablation path shows the best change first, and waits for rounds that are not complete."""
    design = '{name: ablation_path, target: {lr: "0.002", wd: "0.2"}}'
    study = study_of(tmp_path, wide(design, factors=2, levels=2))
    effects = {("wd", "0.2"): 0.08, ("lr", "0.002"): 0.02}
    record = write_study(tmp_path, study, effects=effects, diverged={})
    table = read_table(study, record)
    assert len(table.cells) == 4 and table.count("waiting") == 2, "the second round is asked"
    assert "+ wd" in path_picture(table, scale_of(study, ())).svg()
    record = write_study(tmp_path, study, effects=effects, diverged={}, results=table.results)
    text = _Page(write_report(study, record).html.read_text()).text
    assert "The path" in text and text.index("+ wd") < text.index("+ lr")


def test_levels_that_are_one_experiment_are_named(report):
    """local_gather scales the gradient, which AdamW undoes: the report calls it a control."""
    text = _Page(report.html.read_text()).text
    assert (
        "contrastive_loss=local_gather is a control: it is the same experiment as "
        "contrastive_loss=default (local_slices:" in text
    )
    assert "local_only is a control" not in text


def test_merged_levels_share_their_runs_and_the_report_says_so(tmp_path):
    """Without `controls` the level is not run; its verdict stands on the baseline's runs."""
    study = study_of(tmp_path, QUICK.replace("controls: {contrastive_loss: [local_gather]}\n", ""))
    record = write_study(tmp_path, study)
    assert not any(
        f.trial()["levels"]["contrastive_loss"] == "local_gather" for f in record.records()
    )
    paths = write_report(study, record)
    text = _Page(paths.html.read_text()).text
    assert (
        "contrastive_loss=local_gather is not run: it is the same experiment as the baseline "
        "(local_slices:" in text
    )
    assert "local_gather and default are the same experiment and share their runs." in text
    row = next(
        c
        for c in json.loads(paths.verdicts_json.read_text())["questions"]["baseline"]["contrasts"]
        if c["level"] == "local_gather"
    )
    assert (row["estimand"], row["verdict"], row["delta"]) == ("shared", "EQUIVALENT", 0.0)


def test_what_to_use_stands_under_the_headline(quick, report):
    """The report says which setting to use, how sure that is, and what would tell more."""
    best = max(read_table(*quick, curves=False).cells, key=lambda cell: cell.score(0.01))
    assert best.name == "augmentation=strong", "the largest planted gain"
    text = _Page(report.html.read_text()).text
    assert f"Use {best.name}: imagenet_top1 {100 * best.mean:.1f} % over 4 seeds, " in text
    assert "ablate confirm" in text and "4 trials" in text
    assert text.index("Use augmentation") < text.index("Effects", text.index("The answer"))


def test_a_factor_without_results_is_not_forgotten(tmp_path):
    """A factor none of whose trials has ended stands in the answer as such."""
    study = study_of(tmp_path)
    missing = [("augmentation", "strong", seed) for seed in (0, 1, 2, 3)]
    paths = write_report(study, write_study(tmp_path, study, missing=missing))
    text = _Page(paths.html.read_text()).text
    assert re.search(r"augmentation\s*no result yet", text)
    assert "**augmentation**: no result yet" in paths.markdown.read_text()


def test_a_screen_with_one_seed_says_what_stands_out(tmp_path):
    """An unreplicated two-level screen holds each effect against the others."""
    text = wide("plackett_burman", factors=7, levels=2).replace("seeds: [0, 1]", "seeds: [0]")
    study = study_of(tmp_path, text)
    effects = {("wd", "0.2"): 0.08}
    paths = write_report(
        study, write_study(tmp_path, study, effects=effects, diverged={}, noise=0.002)
    )
    screen = json.loads(paths.verdicts_json.read_text())["questions"]["baseline"]["screen"]
    assert screen["effects"][0]["name"] == "wd"
    assert "What stands out" in _Page(paths.html.read_text()).text


def test_trials_of_an_older_study_are_told_on_top(quick, tmp_path):
    """After a change of the baseline the report says that the old trials take no part."""
    study, record = quick
    changed = study_of(Path(study.root), QUICK.replace("wd: 0.1", "wd: 0.3"))
    paths = write_report(changed, record, folder=tmp_path)
    assert "44 trials in the folder are not of this study any more" in paths.summary.partial
    assert "Not of this study any more" in _Page(paths.html.read_text()).text


AT = QUICK.replace("margin: 0.01}", "margin: 0.01, at: mean_last_k, k: 4}")


def test_a_run_counts_with_the_number_that_the_study_names(tmp_path):
    """The mean of its last evaluations in every number of the report, which says so and how much
    each choice tells; a run that was evaluated less often has failed, and says why."""
    study = study_of(tmp_path, AT)
    record = write_study(tmp_path, study)
    table = read_table(study, record)
    for row in table.baseline.trials:
        scores = [entry["imagenet_top1"] for entry in record.record(row.id).evaluations()]
        assert row.value == pytest.approx(sum(scores[-4:]) / 4)
        assert record.record(row.id).outcome()["value"] == scores[-1], "a record stays what it was"
    page = read_page(table)
    assert ("Judged by", "imagenet_top1, mean of the last 4 evaluations, higher is better") in (
        page.facts
    )
    course = page.runs.course
    assert course is not None and [row.used for row in course.rows] == [False, True]
    written = write_report(study, record)
    told = read_json(written.verdicts_json)["course"]
    assert [one["at"] for one in told["choices"]] == ["last", "mean_last_k"]
    assert "signal-to-noise" in written.markdown.read_text()
    assert "What a run counts with" in written.html.read_text()

    more = study_of(tmp_path, AT.replace("k: 4", "k: 40"))
    row = read_table(more, record).baseline.trials[0]
    assert row.state == "failed" and "mean of the last 40 evaluations" in row.reason


def test_a_name_stands_beside_how_often_healthy_runs_get_it(report):
    """Of the measured length that is nearest to the named runs' (240 steps: 276)."""
    said = "of 1200 simulated healthy runs of 276 steps"
    assert said in report.markdown.read_text() and said in _Page(report.html.read_text()).text
    assert [false_names(steps).steps for steps in (1, 100, 160, 170, 5_000, 12_000)] == [
        100, 100, 100, 276, 1500, 91_000,
    ]  # fmt: skip


def test_cells_whose_runs_told_no_loss_are_not_called_calm(tmp_path: Path) -> None:
    """They are counted by themselves: nothing was seen where nothing could be. Of runs that failed
    it is not said."""
    study = study_of(tmp_path, QUICK)
    failed = [("warmup", "60", seed) for seed in study.seeds]
    record = write_study(tmp_path, study, effects={}, diverged={}, spiky=(), failed=failed)
    silent = [trial for trial in record.records() if trial.trial()["levels"]["beta2"] == "0.98"]
    for trial in silent:
        outcome = trial.folder / "outcome.json"
        outcome.write_text(json.dumps({**json.loads(outcome.read_text()), "verdict": ""}))
    write_report(study, record)
    text = (record.folder / "report.md").read_text()
    [told] = [line for line in text.splitlines() if "no marker saw anything" in line]
    cells = {json.dumps(trial.trial()["levels"]) for trial in record.records()}
    assert f"anything: {len(cells) - 1}. No run of 1 cell told a loss" in told
