"""The report in a real browser: it renders, asks nothing of the network, and reports no error."""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from PIL import Image
from synthetic import EFFECTS, QUICK, study_of, write_study

from ablate.report.report import write_report
from ablate.study.results import result_of
from ablate.study.table import read_table

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")

BROWSERS_OWN = "not an origin"
"""What a net log gives as the origin of a request that no page made."""

DARK = "--blink-settings=preferredColorScheme=0"


def browse(page: str, *options: str) -> str:
    """Open `page` headless; what the browser printed (its log, or the page with --dump-dom)."""
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [
                str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
                "--no-first-run", "--disable-background-networking", "--disable-sync",
                "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars",
                "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
                f"--user-data-dir={profile}", *options, page,
            ],
            capture_output=True,
            text=True,
            timeout=200,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def screenshot(page: Path, target: Path, width: int, height: int, *options: str) -> Image.Image:
    browse(f"file://{page}", f"--window-size={width},{height}", f"--screenshot={target}", *options)
    return Image.open(target).convert("RGB")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    study = study_of(folder)
    return write_report(study, write_study(folder, study)).html


TUNED = re.sub(
    r"(?s)factors:.*?design: one_at_a_time\nseeds: .*?\n",
    """factors:
  warmup: [20, 5]
  contrastive_loss: {default: {}, local_only: {local_loss: true}}
nuisance: {settings: {lr: [1.0e-3, 2.0e-3]}, seeds: [1000]}
seeds: [0, 1]
""",
    QUICK,
)
SWEEP = (
    QUICK.replace(
        "design: one_at_a_time",
        "design: {name: search, cells: 4, sampler: random, then: leave_one_out}",
    )
    .replace("seeds: [0, 1, 2, 3]", "seeds: [0, 1]")
    .replace("margin: 0.01}", "margin: 0.01, cost: peak_memory_gib}")
)


def tuned_report(folder: Path) -> Path:
    """A study whose lr is tuned in every level: the candidates first, then what they chose."""
    study = study_of(folder, TUNED, name="tuned")
    effects = {**EFFECTS, ("lr", "0.002"): 0.03}
    record = write_study(folder, study, effects=effects, diverged={})
    tried = [
        result_of(trial, home, outcome)
        for home in record.records()
        if (trial := study.recall(home.trial())) and (outcome := home.outcome())
    ]
    record = write_study(folder, study, effects=effects, diverged={}, results=tried)
    return write_report(study, record).html


def sweep_report(folder: Path) -> Path:
    """A search for accuracy and memory, and its best cell taken apart."""
    study = study_of(folder, SWEEP, name="sweep")
    usual = study.baseline_levels()
    changes = ({}, {"precision": "fp32"}, {"beta2": "0.98", "lr": "0.002"}, {"warmup": "5"})
    asked = [{**usual, **change} for change in changes]
    planted = {"asked": asked, "memory": {("precision", "fp32"): 3.0}, "diverged": {}}
    record = write_study(folder, study, **planted)
    found = read_table(study, record).results
    return write_report(study, write_study(folder, study, **planted, results=found)).html


@contextlib.contextmanager
def recording_server() -> Iterator[tuple[str, list[str]]]:
    """A server on loopback and the list of paths it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def console_messages(log: str) -> list[str]:
    """What the page itself made the browser say."""
    return [line for line in log.splitlines() if "CONSOLE" in line]


def requests_in(net_log: Path) -> list[str]:
    """Addresses that the page asked for, from a net log; the browser's own calls are not its."""
    events = json.loads(net_log.read_text())["events"]
    asked = [event["params"] for event in events if "url" in event.get("params", {})]
    return sorted({p["url"] for p in asked if p.get("initiator", BROWSERS_OWN) != BROWSERS_OWN})


def test_the_page_renders_without_an_error_or_a_request(report, tmp_path):
    """The browser loads one file, lays out every section and picture, and logs no error."""
    net_log = tmp_path / "net.json"
    log = browse(
        f"file://{report}",
        "--dump-dom",
        "--enable-logging=stderr",
        f"--log-net-log={net_log}",
    )
    assert console_messages(log) == []
    assert requests_in(net_log) == []
    assert log.count('<svg class="plot"') == 2 * 6 + 3
    assert log.count("<section") == 11


@pytest.mark.parametrize(
    ("write", "sections", "said"),
    [
        (
            tuned_report,
            {"answer", "tuning"},
            r"stands? at its best lr=0.002|Best for both: lr=0.002",
        ),
        (sweep_report, {"answer", "cost"}, "From the cheapest:"),
    ],
)
def test_a_tuned_study_and_a_search_render_too(write, sections, said, tmp_path):
    """Their own sections are laid out; nothing is fetched and nothing is logged."""
    net_log = tmp_path / "net.json"
    log = browse(
        f"file://{write(tmp_path)}", "--dump-dom", "--enable-logging=stderr",
        f"--log-net-log={net_log}",
    )  # fmt: skip
    assert console_messages(log) == [] and requests_in(net_log) == []
    shown = {
        name: text for name, text in re.findall(r'(?s)<section id="(\w+)"(.*?)</section>', log)
    }
    assert sections <= set(shown)
    assert re.search(said, shown["answer"])
    assert "<td" in shown[max(sections)]


def test_the_check_for_errors_and_requests_can_fail(tmp_path):
    """A page with a broken script and a picture from a server is caught by the same checks."""
    with recording_server() as (address, asked):
        page = tmp_path / "bad.html"
        page.write_text(f"<img src='{address}/pixel.png'><script>console.error('no')</script>")
        net_log = tmp_path / "net.json"
        log = browse(
            f"file://{page}", "--dump-dom", "--enable-logging=stderr", f"--log-net-log={net_log}"
        )
        assert console_messages(log)
        assert asked == ["/pixel.png"]
        assert requests_in(net_log) == [f"{address}/pixel.png"]


def test_planted_markup_is_neither_run_nor_fetched(tmp_path):
    """A level named like a script or a picture is shown as text in a real browser."""
    with recording_server() as (address, asked):
        text = (
            f"# <script src='{address}/a.js'></script>\n"
            f"# <img src='{address}/b.png' onerror=\"document.title=1\">\n"
            "recipe: openclip\n"
            "baseline: {model: RN50, train_data: d.tar, train_num_samples: 640, "
            "imagenet_val: data/val}\n"
            "factors:\n"
            f"  \"<img src='{address}/c.png'>\":\n"
            "    none: {}\n"
            "    \"</text></svg><script>document.title='broken'</script>\": {wd: 0.3}\n"
            f"    \"</title></style><img src='{address}/d.png'>\": {{wd: 0.4}}\n"
            "seeds: [0, 1]\n"
        )
        study = study_of(tmp_path, text, name="evil")
        record = write_study(tmp_path, study, effects={}, diverged={})
        dom = browse(f"file://{write_report(study, record).html}", "--dump-dom")
        assert asked == []
        assert "<title>evil: ablation report</title>" in dom
        assert "<img" not in dom and "<script" not in dom


@pytest.mark.parametrize("width", [500, 1280])
def test_nothing_sticks_out_of_the_page(report, tmp_path, width):
    """At a narrow and a wide width the page itself never scrolls sideways; tables do."""
    copy = tmp_path / "measured.html"
    # The measuring script is added to a copy; the policy that forbids scripts is taken out of it.
    text = re.sub(r"<meta http-equiv[^>]*>", "", report.read_text())
    script = (
        "<script>document.documentElement.dataset.wide = "
        "document.documentElement.scrollWidth + '/' + window.innerWidth;</script>"
    )
    copy.write_text(text.replace("</body>", f"{script}</body>"))
    dom = browse(f"file://{copy}", f"--window-size={width},900", "--dump-dom")
    inner, window = map(int, re.search(r'data-wide="(\d+)/(\d+)"', dom).groups())
    assert window == width and inner <= window


def test_light_and_dark(report, tmp_path):
    """The page follows the reader's theme: the paper and the pictures' ink change with it."""
    light = screenshot(report, tmp_path / "light.png", 1180, 2400)
    dark = screenshot(report, tmp_path / "dark.png", 1180, 2400, DARK)
    assert light.getpixel((5, 5)) == (255, 255, 255)
    assert max(dark.getpixel((5, 5))) < 40
    assert _distinct(light) > 20 and _distinct(dark) > 20, "coloured pictures were drawn"


def test_it_prints(report, tmp_path):
    """The browser makes a PDF of more than one page of it."""
    target = tmp_path / "report.pdf"
    browse(f"file://{report}", f"--print-to-pdf={target}", "--no-pdf-header-footer")
    content = target.read_bytes()
    assert content.startswith(b"%PDF-")
    assert len(re.findall(rb"/Type\s*/Page\b", content)) > 3


def _distinct(image: Image.Image) -> int:
    """Colours that cover more than a few pixels."""
    colours: Sequence[tuple[int, object]] = image.getcolors(maxcolors=1 << 24) or []
    return sum(count > 30 for count, _ in colours)
