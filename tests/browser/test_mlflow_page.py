"""MLflow's page as a study's reader meets it, in a real browser that has never been there."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic import EFFECTS, QUICK, study_of, write_study

from ablate.api import open_tracker
from ablate.report.report import write_report
from ablate.runner.agenda import planned
from ablate.tracking.mlflow.server import serve
from ablate.tracking.mlflow.store import default_uri

playwright = pytest.importorskip(
    "playwright.sync_api", reason="no playwright: pip install -e '.[test]'"
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no chromium is installed"),
    pytest.mark.slow,
]
SLOW_MS = 60_000

FEW = re.sub(
    r"(?s)factors:.*?controls: .*?\n",
    "factors:\n  augmentation: {default: {}, strong: {aug_cfg: {use_timm: true}}}\n"
    "  beta2: [0.999, 0.98]\n  lr: [1.0e-3, 2.0e-2]\n",
    QUICK,
)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of a study on paper, with its report and the command of its best setting."""
    folder = tmp_path_factory.mktemp("page")
    study = study_of(folder, FEW)
    record = write_study(folder, study, effects={**EFFECTS, ("beta2", "0.98"): -0.04}, spiky=())
    write_report(study, record)
    (record.folder / "best").mkdir()
    (record.folder / "best/train.sh").write_text("torchrun -m open_clip_train.main --beta2 0.999\n")
    with open_tracker(study, record, None, behind=pytest.fail) as mirror:
        mirror.update(planned(study, record), ())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    runs = record.folder.parent
    with serve(default_uri(runs), port=port, log=folder / "log") as server:
        server.wait_ready(120)
        assert server.is_ours, "the entry point mlflow.app is not installed: pip install -e ."
        yield server.url


@pytest.fixture
def page(address: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """A tab of a browser that has never been anywhere; a picture is kept where a test fails."""
    with playwright.sync_playwright() as driver:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = driver.chromium.launch(executable_path=BROWSER, args=options)
        tab = browser.new_page(viewport={"width": 1900, "height": 1000})
        tab.set_default_timeout(SLOW_MS)
        playwright.expect.set_options(timeout=SLOW_MS)
        try:
            yield tab
        finally:
            tab.screenshot(path=tmp_path / "last.png")
            browser.close()


def rows(page: Any) -> Any:
    """The names of the runs that the table shows, in no order."""
    return page.locator(".ag-center-cols-container, .ag-pinned-left-cols-container").locator(
        "a[href*='/runs/']"
    )


def from_the_top(page: Any) -> list[str]:
    """The names of the runs as they stand below each other: the grid moves rows by their style."""
    found = page.locator(".ag-row", has=page.locator("a[href*='/runs/']")).all()
    ranked = [(int(row.get_attribute("row-index")), row.locator("a").first) for row in found]
    return [link.inner_text() for _, link in sorted(ranked, key=lambda pair: pair[0])]


def wait_for_rows(page: Any, *names: str) -> None:
    """Until these runs stand in this order."""
    playwright.expect(rows(page)).to_have_count(len(names))
    first = page.locator(".ag-row[row-index='0']", has=page.locator("a[href*='/runs/']"))
    playwright.expect(first.locator("a").first).to_have_text(names[0])
    assert from_the_top(page) == list(names)


BEST_FIRST = ("augmentation=strong", "baseline", "beta2=0.98", "lr=0.02")


def open_study(page: Any, address: str) -> None:
    page.goto(address)
    page.get_by_role("link", name="quick", exact=True).click()
    wait_for_rows(page, *BEST_FIRST)


def test_a_reader_finds_the_answer_sorts_and_filters_by_verdict(page: Any, address: str) -> None:
    """Open, click the study: Model training, the settings with score, verdict and outcome, best
    first, the answer above them with its links, no banner, no assistant. A click on the score turns
    the order; a filter leaves the worse ones."""
    expect = playwright.expect
    open_study(page, address)
    text = page.inner_text("body")
    assert "viewing a shared view" not in text
    assert "Answer: better: augmentation=strong (+" in text
    assert "diverges: lr=0.02 (3 of 4)" in text
    for said in ("verdict", "difference", "score_pct", "matters, better", "matters, worse"):
        assert said in text
    for name in ("Settings", "Trials", "Unstable", "Report", "Command"):
        expect(page.get_by_role("link", name=name, exact=True).first).to_be_attached()

    score = page.get_by_test_id("sort-header-score_pct")
    score.click()
    wait_for_rows(page, *reversed(BEST_FIRST))
    score.click()
    wait_for_rows(page, *BEST_FIRST)

    box = page.locator("input[value*='tags.kind']").first
    box.fill("tags.kind = 'cell' and tags.verdict LIKE '%worse%'")
    box.press("Enter")
    wait_for_rows(page, "beta2=0.98", "lr=0.02")


def test_a_reader_compares_the_curves_of_two_settings(page: Any, address: str) -> None:
    """Tick two settings, compare, click the accuracy: a curve of each, under the settings' names,
    with the last values of both."""
    open_study(page, address)
    for name in ("augmentation=strong", "beta2=0.98"):
        row = page.locator(".ag-row", has=page.get_by_role("link", name=name, exact=True)).first
        row.locator("input[type=checkbox]").first.check()
    page.get_by_role("button", name="Compare", exact=True).click()
    page.get_by_role("link", name="eval/imagenet_top1_pct", exact=True).click()
    curves = page.locator(".js-plotly-plot .scatterlayer .trace .js-line")
    playwright.expect(curves).to_have_count(4)
    assert len({curve.get_attribute("d") for curve in curves.all()}) == 2, "raw and smoothed alike"
    text = page.inner_text("body")
    for name, last in (("augmentation=strong", "34.4"), ("beta2=0.98", "27.88")):
        assert f"{name} (eval/imagenet_top1_pct)" in text
        assert f"{name}\t{last}" in text, "of the table below the curves"


def test_a_reader_opens_the_report_and_finds_the_command(page: Any, address: str) -> None:
    """Both stand in a tab of their own, and show what they hold: the page with its answer, and the
    line that trains the setting to use."""
    open_study(page, address)

    def follow(name: str) -> Any:
        with page.context.expect_page() as opened:
            page.get_by_role("link", name=name, exact=True).first.click()
        opened.value.set_default_timeout(SLOW_MS)
        return opened.value

    report = follow("Report").frame_locator("iframe")
    playwright.expect(report.locator("h1").first).to_be_visible()
    assert "augmentation=strong" in report.locator("body").inner_text()
    shown = follow("Command").get_by_text("torchrun -m open_clip_train.main --beta2 0.999")
    playwright.expect(shown.first).to_be_visible()
