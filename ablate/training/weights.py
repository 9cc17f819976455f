"""Starting from given weights: strictly, with a report, and nothing but weights.

``init_from`` is not ``resume``. Resuming goes on with the same trial, so everything comes back,
optimizer included. Fine-tuning starts another optimisation: the moments of the old one were
estimated under other losses and learning rates, its step count would switch off bias correction,
and torch maps optimizer state by position, so one new parameter shifts it silently.

Loading is strict: names are mapped by an injective list of replacements, and whatever is missing,
unexpected or of another shape is an error unless a glob allows it. Files are safetensors, or
torch files read with ``weights_only``, which run no code.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ablate.errors import LoadError
from ablate.training.weight_files import find_unsound, read_weights

Resize = Callable[[MutableMapping[str, torch.Tensor], nn.Module], None]
"""Fits positional embeddings of a state dict to the model, in place."""
Convert = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
"""The state dict of another library's model as one of ours."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What was loaded, and what was not."""

    path: str
    sha256: str
    loaded_tensors: int
    loaded_share: float
    """Share of the model's parameters (counted in numbers) that were loaded."""
    renamed: Mapping[str, str]
    """Name in the file -> name in the model, where they differ."""
    missing: tuple[str, ...]
    """In the model, not in the file, allowed: they keep their random initialisation."""
    unexpected: tuple[str, ...]
    """In the file, not in the model, allowed: they are left out."""
    mismatched: tuple[str, ...]
    """Of another shape and skipped: they keep their random initialisation."""
    resized: tuple[str, ...]
    """Positional embeddings that were interpolated."""
    reset: tuple[str, ...]
    """Left at their random initialisation on request."""
    cast: tuple[str, ...]
    """Stored with another type than the model's."""
    taken: str = ""
    """Key of the state dict within the file; empty where the file is one."""
    others: tuple[str, ...] = ()
    """Keys of the file's other state dicts, which were not taken."""
    buffers_missing: tuple[str, ...] = ()
    """Those of `missing` that are buffers (BatchNorm's statistics): not counted in the share."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def at_random(self) -> tuple[str, ...]:
        """Tensors that hold their random initialisation."""
        return tuple(sorted({*self.missing, *self.mismatched, *self.reset}))


def load_weights(
    model: nn.Module,
    path: Path,
    *,
    sha256: str | None = None,
    key: str | None = None,
    key_map: Sequence[tuple[str, str]] = (),
    reset: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    on_shape: Literal["error", "skip", "interp_pos"] = "error",
    min_loaded: float = 0.99,
    on_gap: Literal["error", "silent"] = "error",
    resize: Resize | None = None,
    convert: Convert | None = None,
) -> LoadReport:
    """Load the weights of `path` into `model`; globs name the model's tensors.

    `key` names the state dict in a file of several; `convert` turns it, after `key_map`, into what
    the model has, where another library arranged it. With ``on_gap="silent"`` whatever does not fit
    is left out, as by ``load_state_dict(strict=False)``: a negative control.

    Raises:
        LoadError: anything that is not allowed, or less than `min_loaded` of the parameters;
            the model is unchanged then.
    """
    file = read_weights(path, key=key)
    stored, digest = file.tensors, file.sha256
    if sha256 is not None and sha256 != digest:
        raise LoadError(f"{path} has sha256 {digest}, and init_from asks for {sha256}")
    mapped, renamed = _map_keys(stored, key_map, path)
    if convert is not None:
        mapped = convert(mapped)
    own = model.state_dict()
    left = {name for name in own if _matches(name, reset)}
    offered = {name: value for name, value in mapped.items() if name not in left}

    resized: tuple[str, ...] = ()
    if on_shape == "interp_pos" and resize is not None:
        before = {name: value.shape for name, value in offered.items()}
        resize(offered, model)
        resized = tuple(name for name, value in offered.items() if value.shape != before[name])
    mismatched = sorted(n for n in offered if n in own and offered[n].shape != own[n].shape)
    missing = sorted(set(own) - set(offered) - left)
    unexpected = sorted(set(offered) - set(own))

    problems = _refused("missing in the file", missing, allow_missing, "allow_missing")
    problems += _refused("not in the model", unexpected, allow_unexpected, "allow_unexpected")
    if mismatched and on_shape != "skip":
        problems.append("of another shape: " + _shapes(mismatched, offered, own))
    loaded = {n: v for n, v in offered.items() if n in own and n not in mismatched}
    parameters = {name: p.numel() for name, p in model.named_parameters()}
    share = sum(parameters[n] for n in loaded if n in parameters) / sum(parameters.values())
    if share < min_loaded:
        problems.append(
            f"only {share:.1%} of the parameters would be loaded; min_loaded is {min_loaded:.1%}"
        )
    if on_gap == "silent":
        problems = []
    problems += [*_of_another_kind(loaded, own), *find_unsound(loaded)][:5]
    if problems:
        hint = _prefix_hint(mapped, own)
        raise LoadError(f"{path} does not fit the model: " + "; ".join(problems) + hint)
    model.load_state_dict({**own, **loaded})
    return LoadReport(
        path=str(path),
        sha256=digest,
        loaded_tensors=len(loaded),
        loaded_share=share,
        renamed=renamed,
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        mismatched=tuple(mismatched),
        resized=resized,
        reset=tuple(sorted(left)),
        cast=tuple(sorted(n for n in loaded if loaded[n].dtype != own[n].dtype)),
        taken=file.taken,
        others=file.others,
        buffers_missing=tuple(name for name in missing if name not in parameters),
    )


def _map_keys(
    stored: Mapping[str, torch.Tensor], key_map: Sequence[tuple[str, str]], path: Path
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    mapped: dict[str, torch.Tensor] = {}
    sources: dict[str, str] = {}
    for name, value in stored.items():
        target = name
        for pattern, replacement in key_map:
            target = re.sub(pattern, replacement, target)
        if target in sources:
            raise LoadError(
                f"key_map sends both {sources[target]!r} and {name!r} of {path} to {target!r}; "
                "make the patterns tell them apart"
            )
        sources[target] = name
        mapped[target] = value
    return mapped, {source: target for target, source in sources.items() if source != target}


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _refused(what: str, names: Sequence[str], allowed: Sequence[str], field: str) -> list[str]:
    refused = [name for name in names if not _matches(name, allowed)]
    if not refused:
        return []
    shown = ", ".join(refused[:5]) + (f" and {len(refused) - 5} more" if refused[5:] else "")
    return [f"{what}: {shown} (allow with init_from.{field})"]


def _shapes(
    names: Sequence[str], offered: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]
) -> str:
    parts = []
    for name in names[:5]:
        theirs, ours = tuple(offered[name].shape), tuple(own[name].shape)
        turned = " (transposed?)" if theirs == ours[::-1] else ""
        parts.append(f"{name} is {theirs}, not {ours}{turned}")
    return ", ".join(parts) + (f" and {len(names) - 5} more" if names[5:] else "")


def _of_another_kind(
    loaded: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]
) -> list[str]:
    """Whole or complex numbers (quantized weights, say) for a tensor of the model's floats."""
    return [
        f"{name} holds {str(value.dtype).removeprefix('torch.')}, not floating-point numbers"
        for name, value in loaded.items()
        if own[name].is_floating_point() and not value.is_floating_point()
    ]


def _prefix_hint(mapped: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """The likely mend, when most names of the file share a prefix that the model's lack."""
    if any(name in own for name in mapped):
        return ""
    for name in mapped:
        for target in own:
            if name.endswith("." + target):
                prefix = name[: -len(target)]
                taken = [each for each in mapped if each.startswith(prefix)]
                left = [each for each in mapped if each not in taken]
                if len(taken) < 0.8 * len(mapped):
                    continue
                hint = f". Did you mean key_map: [[{'^' + re.escape(prefix)!r}, '']]?"
                if left:
                    hint += (
                        f" It takes {len(taken)} of {len(mapped)} names; {', '.join(left[:3])} "
                        "would be for allow_unexpected"
                    )
                return hint
    return ""


# --------------------------------------------------------------------------- the same features


def digest_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """sha256 of each tensor's bytes."""
    return {
        name: hashlib.sha256(
            value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        ).hexdigest()
        for name, value in tensors.items()
    }


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How far features are from those that were stored with the weights."""

    name: str
    largest: float


def compare_features(
    stored: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
    *,
    tolerance: float = 1e-4,
) -> list[Mismatch]:
    """Features that differ by more than `tolerance` (they have norm 1), or are not there."""
    wrong = []
    for name, value in stored.items():
        other = found.get(name)
        if other is None or other.shape != value.shape:
            wrong.append(Mismatch(name, float("inf")))
            continue
        largest = float((other.float() - value.float()).abs().max())
        if not largest <= tolerance:
            wrong.append(Mismatch(name, largest))
    return wrong
