"""Saved views of a study's page: columns, order and charts, in the form of MLflow 3.17.

They stand in the page's menu "Views"; a page that does not know the form leaves them out.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from ablate.records.files import dumps
from ablate.study import FractionalFactorial, FullFactorial, PlackettBurman, Search, Study
from ablate.tracking.mlflow.measures import Measures

OPENING = "settings"
"""The view that a fresh browser opens."""

_RESULT = "Result and course"
_SEEDS = "Seeds: mean, lowest and highest; gradient norm"
_PACKED = "deflate;"
_MOST_FACTORS = 12
"""Views of single factors."""


def tag_of(key: str) -> str:
    """The experiment's tag that holds a view."""
    return f"mlflow.sharedViewState.{key}"


def factor_key(name: str) -> str:
    return f"factor-{re.sub(r'[^A-Za-z0-9_]', '_', name)}"


def compares(study: Study, changed: Sequence[str]) -> str:
    """The factors over whose levels a run can be grouped: ``|lr|beta2|``.

    Where one factor is changed at a time, a cell tells about that one, and the baseline about all.
    """
    crossed = (FullFactorial, FractionalFactorial, PlackettBurman, Search)
    every = isinstance(study.design, crossed) or not changed
    names = [factor.name for factor in study.factors] if every else list(changed)
    return f"|{'|'.join(names)}|"


def page_state(view: str) -> str:
    """The page's own state, for a browser that has none, from a saved view."""
    state = json.loads(view)["state"]
    if state.startswith(_PACKED):
        state = zlib.decompress(base64.b64decode(state.removeprefix(_PACKED))).decode()
    full = {
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsVisibilityMap": {},
        "viewMaximized": False,
        "runListHidden": False,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupsExpanded": {},
        "groupBy": None,
        "autoRefreshEnabled": True,
        **json.loads(state),
    }
    return dumps(full)


def views_of(study: Study) -> dict[str, str]:
    """Key -> saved view."""
    keys = Measures(study)
    views = {
        OPENING: _settings(study, keys),
        "trials": _trials(study, keys),
        "unstable": _unstable(keys),
    }
    for factor in study.compared[:_MOST_FACTORS]:
        views[factor_key(factor.name)] = _levels(study, keys, factor.name)
    return views


def _settings(study: Study, keys: Measures) -> str:
    score, factors = f"metrics.`{keys.score}`", [factor.name for factor in study.factors]
    return _view(
        "Settings",
        "tags.kind = 'cell'",
        score,
        [
            "tags.`verdict`",
            "tags.`difference`",
            score,
            f"metrics.`{keys.score}_low`",
            f"metrics.`{keys.score}_high`",
            *_cost(study),
            "tags.`outcome`",
            "tags.`markers`",
            *(f"params.`{name}`" for name in factors),
        ],
        upward=_upward(study),
        charts=[
            *_course(keys)[:-1],
            _line(keys.objective, _SEEDS, band=True),
            _line("train/loss", _SEEDS, band=True),
            _course(keys)[-1],
            _parallel(keys.score, factors, "Factors together"),
        ],
    )


def _trials(study: Study, keys: Measures) -> str:
    score = f"metrics.`{keys.score}`"
    return _view(
        "Trials, best first",
        "tags.kind = 'trial'",
        score,
        [
            "tags.`outcome`",
            "tags.`verdict`",
            score,
            f"metrics.`{keys.best}`",
            *_cost(study),
            "tags.`markers`",
            "tags.`flags`",
            "metrics.`gpu_hours`",
            "params.`seed`",
            *(f"params.`{factor.name}`" for factor in study.factors),
        ],
        upward=_upward(study),
        charts=_course(keys),
    )


def _unstable(keys: Measures) -> str:
    return _view(
        "Unstable",
        "tags.kind = 'trial' and tags.markers != ''",
        "metrics.`markers`",
        [
            "tags.`outcome`",
            "tags.`verdict`",
            "tags.`markers`",
            "metrics.`markers`",
            "metrics.`first_marker_step`",
            f"metrics.`{keys.score}`",
            "tags.`reason`",
        ],
        upward=False,
        charts=_course(keys)[1:],
    )


def _levels(study: Study, keys: Measures, factor: str) -> str:
    """Level against level of one factor: mean and band of the runs that tell about it."""
    score = f"metrics.`{keys.score}`"
    return _view(
        f"Factor {factor}",
        f"tags.kind = 'trial' and tags.compares LIKE '%|{factor}|%'",
        score,
        [score, "tags.`outcome`", "tags.`verdict`", f"params.`{factor}`", "params.`seed`"],
        upward=_upward(study),
        charts=_course(keys),
        group=factor,
    )


def _upward(study: Study) -> bool:
    """Whether the smallest score stands first."""
    return study.objective.direction == "minimize"


def _cost(study: Study) -> list[str]:
    return ["metrics.`cost`"] if study.objective.cost else []


def _course(keys: Measures) -> list[dict[str, Any]]:
    """What is looked at of every kind of run: the score, its course, the loss, the gradients."""
    return [
        _bar(keys.score, _RESULT),
        _line(keys.objective, _RESULT),
        _line("train/loss", _RESULT),
        _line("train/grad_norm", _SEEDS, scale="log"),
    ]


def view_link(experiment: str, key: str) -> str:
    """Within the page: a saved view."""
    return f"#/experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey={key}"


def run_link(experiment: str, run_id: str, page: str = "") -> str:
    """Within the page: a run, or one of its tabs or files."""
    return f"#/experiments/{experiment}/runs/{run_id}{page and f'/{page}'}"


def _view(
    name: str,
    search: str,
    order: str,
    columns: Sequence[str],
    *,
    upward: bool,
    charts: Sequence[Mapping[str, Any]],
    group: str = "",
) -> str:
    """A saved view in MLflow's own form; `upward`: the smallest value first."""
    sections = dict.fromkeys(chart["metricSectionId"] for chart in charts)
    state = {
        "searchFilter": search,
        "orderByKey": order,
        "orderByAsc": upward,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": list(columns),
        # "1" is the column of check boxes; a width counts only for what stands in the order.
        "columnOrder": ["1", _NAME, *columns, "runDateAndNestInfo", "duration"],
        "columnWidths": {_NAME: 280, **{column: _width(column) for column in columns}},
        "groupBy": group
        and {
            "aggregateFunction": "average",
            "groupByKeys": [{"mode": "param", "groupByData": group}],
        }
        or None,
        "runsHiddenMode": "SHOW_ALL",  # else charts show the first ten runs
        "compareRunCharts": [{**chart, "uuid": f"chart-{i}"} for i, chart in enumerate(charts)],
        "compareRunSections": [_section(section) for section in sections],
        "isAccordionReordered": True,
    }
    packed = _PACKED + base64.b64encode(zlib.compress(dumps(state).encode(), 9)).decode()
    return dumps({"name": name, "createdAt": 0, "updatedAt": 0, "state": packed})


_NAME = "attributes.`Run Name`"


def _width(column: str) -> int:
    widest = {
        "tags.`difference`": 190,
        "tags.`markers`": 220,
        "tags.`reason`": 400,
        "tags.`outcome`": 200,
    }
    return widest.get(column, 140 if column.startswith("tags.") else 110)


def _section(name: str) -> dict[str, Any]:
    return {
        "uuid": name,
        "name": name,
        "display": True,
        "isReordered": False,
        "deleted": False,
        "isGenerated": False,
    }


def _chart(kind: str, section: str, *, runs: int) -> dict[str, Any]:
    return {
        "type": kind,
        "runsCountToCompare": runs,
        "metricSectionId": section,
        "deleted": False,
        "isGenerated": False,
    }


def _line(key: str, section: str, *, band: bool = False, scale: str = "linear") -> dict[str, Any]:
    """A curve of every run; with `band` also the lowest and the highest of its seeds."""
    return {
        **_chart("LINE", section, runs=10),
        "metricKey": key,
        "selectedMetricKeys": [key, f"{key}_low", f"{key}_high"] if band else [key],
        "lineSmoothness": 0,
        "xAxisScaleType": "linear",
        "scaleType": scale,
        "range": {},
        "xAxisKey": "step",
        "selectedXAxisMetricKey": "",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }


def _bar(key: str, section: str) -> dict[str, Any]:
    return {**_chart("BAR", section, runs=20), "metricKey": key}


def _parallel(key: str, params: Sequence[str], section: str) -> dict[str, Any]:
    return {
        **_chart("PARALLEL", section, runs=20),
        "selectedMetrics": [key],
        "selectedParams": list(params),
        "showAllRuns": False,
    }
