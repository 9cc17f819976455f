"""The pictures show what they must, also for odd runs."""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
from marker_traces import LONG, healthy_evaluations, judged, whole_rows

from ablate.report.pictures.timeline import draw_trial


def drawn(tmp_path: Path, rows: list[dict[str, Any]], evals: list[dict[str, Any]]) -> str:
    """The text of the SVG; the PNG beside it must be one, of a sensible size."""
    judgement = judged(rows, evals)
    stop = judgement.verdict.stop
    png, svg = tmp_path / "timeline.png", tmp_path / "timeline.svg"
    for path in (png, svg):
        draw_trial(
            path,
            rows,
            evals,
            judgement.events,
            title="trial 9f2c <amp & seed 1>",
            verdict=judgement.verdict.name,
            stop_step=stop.step if stop else None,
            context=LONG,
        )
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png.read_bytes()[16:24])
    assert 800 < width < 2000 and 300 < height < 3000
    return svg.read_text()


def texts(svg: str) -> set[str]:
    return set(re.findall(r">([^<>]+)</text>", svg))


def test_a_trial_shows_curves_events_verdict_and_stop(tmp_path: Path) -> None:
    """Panels of the four quantities, a lane per marker, the verdict and where it was to stop."""
    rows = whole_rows(np.random.default_rng(0), 3500)
    for row in rows[1500:1510]:
        row["loss"] += 2.0
    for row in rows[3000:]:
        row["loss"] = math.nan
    words = texts(drawn(tmp_path, rows, healthy_evaluations(3500)))
    assert {"loss / nat", "gradient norm", "temperature", "top-1 / %"} <= words
    assert {"loss_spike", "non_finite", "NUMERIC_FAIL", "stop at 3003", "ln(batch)"} <= words
    assert "trial 9f2c &lt;amp &amp; seed 1&gt;" in words


def test_quantities_that_were_not_measured_have_no_panel(tmp_path: Path) -> None:
    """A run of losses only, all of them NaN, still gives a picture."""
    rows: list[dict[str, Any]] = [{"step": step, "loss": math.nan} for step in range(1, 20)]
    words = texts(drawn(tmp_path, rows, []))
    assert "loss / nat" in words and "gradient norm" not in words


def test_a_healthy_trial_has_no_lanes(tmp_path: Path) -> None:
    """Without events there are only curves; a single row is enough."""
    words = texts(drawn(tmp_path, whole_rows(np.random.default_rng(0), 1), []))
    assert "STABLE" in words and "loss_spike" not in words


def test_a_run_without_rows_is_still_a_picture(tmp_path: Path) -> None:
    """A trial that died before its first step."""
    path = tmp_path / "none.svg"
    draw_trial(path, [], [], [], title="trial", verdict="STABLE")
    assert "trial" in texts(path.read_text())


def test_a_one_step_spike_survives_thinning(tmp_path: Path) -> None:
    """A curve of many steps is drawn by extremes, so that its highest step is in the picture."""
    from ablate.report.pictures.timeline import thin

    values = np.zeros(90_000)
    values[54_321] = 7.0
    steps, kept = thin(np.arange(90_000), values)
    assert len(steps) <= 3000
    assert kept.max() == 7.0 and steps[kept.argmax()] == 54_321
    assert (np.diff(steps) > 0).all()


def test_the_same_run_gives_the_same_drawing(tmp_path: Path) -> None:
    """Drawn twice, the SVG is the same file."""
    rows = whole_rows(np.random.default_rng(0), 300)
    assert drawn(tmp_path, rows, []) == drawn(tmp_path, rows, [])
