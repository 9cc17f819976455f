"""The cells of a study in numbers: means, spread over seeds, and what the seed alone changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import scipy

from ablate.analysis.answer import CellSummary, Interval, Noise
from ablate.analysis.fit import Fit
from ablate.analysis.results import Cell, Objective, Table


def summarise(table: Table, reference: Cell) -> tuple[CellSummary, ...]:
    summaries = []
    rows = {cell: row for row, cell in enumerate(table.cells)}
    for cell, home in table.shared.items():
        row = rows[home]
        values = table.values[row][~np.isnan(table.values[row])]
        levels = dict(zip(table.factors, cell, strict=True))
        summaries.append(
            CellSummary(
                levels=levels,
                changes={
                    f: name
                    for (f, name), base in zip(levels.items(), reference, strict=True)
                    if name != base
                },
                n=len(values),
                mean=float(values.mean()) if len(values) else None,
                sd=float(values.std(ddof=1)) if len(values) >= 2 else None,
                runs=tuple(
                    (seed, str(outcome), None if np.isnan(value) else float(value))
                    for seed, outcome, value in zip(
                        table.seeds, table.outcomes[row], table.values[row], strict=True
                    )
                    if outcome
                ),
            )
        )
    return tuple(summaries)


def best(cells: Sequence[CellSummary], objective: Objective) -> Mapping[str, str] | None:
    calm = [
        cell
        for cell in cells
        if cell.mean is not None and all(outcome != "diverged" for _, outcome, _ in cell.runs)
    ]
    if not calm:
        return None
    # A cell with fewer seeds than others may lead by luck: complete cells first.
    most = max(cell.n for cell in calm)
    full = [cell for cell in calm if cell.n == most]
    return max(full, key=lambda cell: objective.gain(cell.mean or 0.0)).levels


def noise_of(table: Table, fitted: Fit) -> Noise:
    if not fitted.rows:
        return Noise(None, None, None, None, 0, None)
    y = table.values[list(fitted.rows)]
    counts = (~np.isnan(y)).sum(axis=1)
    freedom = int((counts[counts > 0] - 1).sum())
    if freedom < 1:
        return Noise(None, None, None, None, 0, None)
    means = np.nanmean(y, axis=1, keepdims=True)
    within = float(np.nansum((y - means) ** 2)) / freedom
    cells, blocks = len(fitted.rows), len(fitted.seeds)
    if cells == 1 or fitted.df < 1:
        return Noise(math.sqrt(within), _sd_interval(within, freedom), None, None, freedom, None)
    # Runs of one seed are correlated over cells, so `within` has fewer degrees of freedom than it
    # counts: Satterthwaite over its block and its residual part.
    block = max(within - fitted.mse, 0.0) + fitted.mse / cells
    parts = block**2 / (blocks - 1) + ((1 - 1 / cells) * fitted.mse) ** 2 / fitted.df
    df = within**2 / parts if parts > 0 else float(freedom)
    rho = (within - fitted.mse) / within if within > 0 else None
    return Noise(
        sigma_seed=math.sqrt(within),
        sigma_seed_ci=_sd_interval(within, max(df, 1.0)),
        sigma_residual=math.sqrt(fitted.mse),
        sigma_residual_ci=_sd_interval(fitted.mse, fitted.df),
        df=fitted.df,
        rho=rho,
    )


def _sd_interval(variance: float, df: float) -> Interval:
    low, high = scipy.stats.chi2.isf(0.025, df), scipy.stats.chi2.isf(0.975, df)
    return math.sqrt(variance * df / low), math.sqrt(variance * df / high)
