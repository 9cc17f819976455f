"""What a configuration says of weights to start from, and what came of it; imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from ablate.trial.recipe import Role

if TYPE_CHECKING:
    import torch

    from ablate.training.weights import Convert, LoadReport, Resize


class InitFrom(BaseModel):
    """Weights to start from: model weights only, never an optimizer's state (that is resuming)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    path: Annotated[str, Field(min_length=1), Role.PATH]
    """A .safetensors file, or a torch file of plain tensors; relative to the study's root."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """What the file must be; anything when empty."""
    key: str | None = None
    """Which state dict of a torch file that holds several, e.g. model_ema; dots go deeper."""
    key_map: tuple[tuple[str, str], ...] = ()
    """Replacements (regular expression, text) that turn the file's names into the model's."""
    reset: tuple[str, ...] = ()
    """Globs of tensors that keep their random initialisation."""
    allow_missing: tuple[str, ...] = ()
    """Globs of tensors that the file may lack."""
    allow_unexpected: tuple[str, ...] = ()
    """Globs of tensors (after key_map) that only the file has."""
    on_shape: Literal["error", "skip", "interp_pos"] = "error"
    """A tensor of another shape: refuse, skip it, or interpolate positional embeddings."""
    min_loaded: Annotated[float, Field(ge=0.0, le=1.0)] = 0.99
    """Share of the model's parameters that must be loaded."""
    on_gap: Literal["error", "silent"] = "error"
    """What does not fit: refuse it, or go on without a word as ``strict=False`` does. The latter
    is a negative control, which the plan names as one."""

    @model_serializer(mode="wrap")
    def _as_before(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without keys that are younger and not given, so that trials keep the ids they had."""
        content: dict[str, Any] = serialise(self)
        younger = {"key": None, "on_gap": "error"}
        return {k: v for k, v in content.items() if k not in younger or v != younger[k]}


def load_initial(
    source: InitFrom,
    model: torch.nn.Module,
    *,
    resize: Resize | None = None,
    convert: Convert | None = None,
) -> LoadReport:
    """Load the weights of `source` into a model; into one without memory, to see whether they fit.

    Raises:
        LoadError: they do not fit, or the file cannot be read.
    """
    import warnings

    from ablate.training.weights import load_weights

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
        return load_weights(
            model,
            Path(source.path),
            sha256=source.sha256,
            key=source.key,
            key_map=source.key_map,
            reset=source.reset,
            allow_missing=source.allow_missing,
            allow_unexpected=source.allow_unexpected,
            on_shape=source.on_shape,
            min_loaded=source.min_loaded,
            on_gap=source.on_gap,
            resize=resize,
            convert=convert,
        )


def describe_initial(source: InitFrom | None, fit: Callable[[], LoadReport]) -> str | None:
    """What `source` brings, as `fit` tries it on a model without memory; None where there is none.

    Raises:
        LoadError: the file does not fit the model; says which tensors, and the likely mend.
    """
    if source is None:
        return None
    if not Path(source.path).exists():
        return f"{source.path} is not on this machine; whether it fits is seen when a trial starts"
    return describe_load(source, fit())


def describe_load(source: InitFrom, report: LoadReport) -> str:
    """What was loaded and what was not, in words for the plan."""
    words = [f"{report.loaded_share:.1%} of the parameters come from {source.path}"]
    if report.others:
        words.append(f"{report.taken} was taken, and {', '.join(report.others)} left")
    if report.renamed:
        words.append(f"{len(report.renamed)} tensors renamed")
    if report.at_random:
        shown = ", ".join(report.at_random[:3]) + (", ..." if report.at_random[3:] else "")
        words.append(f"{len(report.at_random)} at their random initialisation: {shown}")
    if report.buffers_missing:
        words.append(
            f"{len(report.buffers_missing)} of these are buffers ({report.buffers_missing[0]}, "
            "...), which every load initialises alike: neither the share of parameters nor a "
            "second load shows them"
        )
    if report.unexpected:
        words.append(f"{len(report.unexpected)} of the file left out")
    if source.on_gap == "silent":
        words.append("on_gap: silent lets all of this pass: use it as a negative control only")
    return "; ".join(words)
