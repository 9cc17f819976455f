"""Figures for notebooks, by plotly: ``pip install 'ablate-runner[notebook]'``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ablate.errors import AblateError

if TYPE_CHECKING:
    import pandas as pd

    from ablate.study.table import StudyTable


def draw_effects(effects: pd.DataFrame, *, metric: str) -> Any:
    """Each level's difference to its reference with the 95 % interval, as a plotly figure;
    `effects` are :meth:`ablate.Run.effects`."""
    known = effects[effects["delta"].notna()]
    names = [f"{row.factor}={row.level}" for row in known.itertuples()]
    bars = {
        "type": "data",
        "symmetric": False,
        "array": (known["ci_high"] - known["delta"]).tolist(),
        "arrayminus": (known["delta"] - known["ci_low"]).tolist(),
    }
    figure = _figure(
        [
            {
                "type": "scatter",
                "mode": "markers",
                "x": known["delta"].tolist(),
                "y": names,
                "error_x": bars,
                "text": known["verdict"].tolist(),
                "hovertemplate": "%{y}: %{x:.4g} (%{text})<extra></extra>",
            }
        ]
    )
    figure.update_layout(
        xaxis={"title": f"difference in {metric}, 95 % interval", "zeroline": True},
        yaxis={"autorange": "reversed"},
        showlegend=False,
    )
    return figure


def draw_curves(table: StudyTable, *, what: str) -> Any:
    """A line for each trial, as a plotly figure: its `loss` over steps, or its `score` over
    epochs."""
    lines = []
    for cell in table.cells:
        for row in cell.trials:
            curve = row.loss if what == "loss" else row.score
            lines.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "x": list(curve.x),
                    "y": list(curve.y),
                    "name": f"{cell.name} · seed {row.seed}",
                    "legendgroup": cell.name,
                }
            )
    figure = _figure([line for line in lines if line["x"]])
    unit = {"loss": "optimizer step", "score": "epoch"}[what]
    name = "training loss" if what == "loss" else table.study.objective.metric
    figure.update_layout(xaxis={"title": unit}, yaxis={"title": name})
    return figure


def _figure(traces: Sequence[dict[str, Any]]) -> Any:
    try:
        plotly = importlib.import_module("plotly.graph_objects")
    except ImportError:
        raise AblateError(
            "figures in notebooks are plotly's: pip install 'ablate-runner[notebook]'. The report "
            "has the same as pictures"
        ) from None
    return plotly.Figure(data=list(traces), layout={"template": "plotly_white", "height": 420})
