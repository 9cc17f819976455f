"""A picture of two feature spaces by class, and of what moved between them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ablate.training.evaluations.scores import plane
from ablate.training.inspection.inspect import Inspection

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito, which stay apart for colour-blind readers; two more by darkness.
_COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442", "#000000",
    "#7b5ea7", "#8a6d3b",
)  # fmt: skip
_OTHERS = "#cfd6dd"
_INK = "#1d2329"
_MODULES = 14


def draw_inspection(found: Inspection, path: Path) -> bool:
    """Draw both feature spaces (each on its own first two principal components) and the modules.

    Ten classes are coloured, the others grey. False, and nothing drawn, without features.
    """
    if found.features is None or found.labels is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 0.8))
    labels = found.labels.numpy()
    shown = _shown(labels)
    for place, (axis, title, side) in enumerate(
        zip(axes[:2], (found.a, found.b), found.features, strict=True)
    ):
        flat = plane(side.values)
        others = ~np.isin(labels, shown)
        axis.scatter(*flat[others].T, s=5, color=_OTHERS, linewidths=0)
        for colour, label in zip(_COLOURS, shown, strict=False):
            mine = labels == label
            axis.scatter(
                *flat[mine].T, s=26, color=colour, linewidths=0.4, edgecolors="white",
                label=_name(found, int(label)),
            )  # fmt: skip
        asked = ({} if side.knn is None else {"neighbours": side.knn}) | dict(side.own)
        told = "".join(f"{name.replace('_', '-')} {s.value:.1%}, " for name, s in asked.items())
        axis.set_title(
            f"{'AB'[place]}: {title}\n{told}rank {side.rank:.3g}",
            fontsize=10, loc="left", color=_INK,
        )  # fmt: skip
        axis.set_xlabel("first principal component")
        axis.set_ylabel("second principal component")
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(
        fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(0.0, -0.13), ncols=4
    )
    _draw_modules(axes[2], found)
    figure.suptitle(f"{found.verdict}: {found.reasons[0]}", x=0.01, ha="left", color=_INK)
    figure.savefig(path, dpi=130)
    return True


def _shown(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Ten classes: evenly spaced among those with the most images."""
    names, counts = np.unique(labels, return_counts=True)
    names = names[counts >= np.median(counts)]
    picked = np.linspace(0, len(names) - 1, min(len(_COLOURS), len(names))).round().astype(int)
    chosen: npt.NDArray[np.int64] = names[picked]
    return chosen


def _name(found: Inspection, label: int) -> str:
    name = found.class_names[label] if label < len(found.class_names) else f"class {label}"
    return name if len(name) <= 22 else name[:21] + "…"


def _draw_modules(axis: Axes, found: Inspection) -> None:
    modules = found.modules[:_MODULES][::-1]
    finite = [min(module.relative, 1e6) for module in modules]
    axis.barh([module.name for module in modules], finite, color=_COLOURS[0], height=0.7)
    axis.set_title(
        f"relative change of each module\n({found.moved} of {found.parameters} tensors "
        "moved)",
        fontsize=10, loc="left", color=_INK,
    )  # fmt: skip
    axis.tick_params(axis="y", labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
