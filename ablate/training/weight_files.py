"""Files of weights as people have them: what lies in one, read without running any code."""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from ablate.errors import LoadError

USUAL_KEYS = ("state_dict", "model")
"""Where a state dict lies in a torch file that holds several, if nothing else is asked for."""

_NUMPY: Any = np._core.multiarray  # type: ignore[attr-defined]
_HARMLESS = (
    argparse.Namespace,
    np.dtype,
    np.ndarray,
    # By the names of numpy 2 and of numpy 1, which wrote most of the files there are.
    _NUMPY.scalar,
    _NUMPY._reconstruct,
    (_NUMPY.scalar, "numpy.core.multiarray.scalar"),
    (_NUMPY._reconstruct, "numpy.core.multiarray._reconstruct"),
    *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdg"),
)
"""What training scripts put beside the tensors, and which runs no code when it is read."""


@dataclass(frozen=True, slots=True)
class WeightFile:
    """Tensors by name, and where they were."""

    tensors: Mapping[str, torch.Tensor]
    sha256: str
    taken: str = ""
    """Key of the state dict within the file; empty where the file is one."""
    others: tuple[str, ...] = ()
    """Keys of its other state dicts."""


def read_weights(
    path: Path, *, key: str | None = None, asked_by: str = "init_from.key:"
) -> WeightFile:
    """The tensors of a .safetensors file, a torch file, or a checkpoint folder of ours.

    `key` names the state dict in a torch file that holds several (dots go deeper); `asked_by` is
    how the user gives it.

    Raises:
        LoadError: it cannot be read; says what it holds instead, and what to do.
    """
    if path.is_dir():
        path = _file_in(path)
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise LoadError(f"init_from {path} cannot be read: {error.strerror}") from error
    if path.suffix == ".safetensors":
        if key is not None:
            raise LoadError(f"{path} holds one state dict and no keys; leave {asked_by} {key} out")
        try:
            return WeightFile(safetensors.torch.load_file(path), digest)
        except safetensors.SafetensorError as error:
            raise LoadError(
                f"{path} is no safetensors file: it is {_told_by_its_beginning(path)}"
            ) from error
    content = _load(path)
    for part in (key or "").split(".") if key else ():
        if not isinstance(content, Mapping) or part not in content:
            raise LoadError(f"{path} has no {key!r}; it holds {_listed(content)}")
        content = content[part]
    if key is not None or _is_state_dict(content):
        if not _is_state_dict(content):
            raise LoadError(f"{path}: {key!r} is no state dict; it holds {_listed(content)}")
        return WeightFile(_plain(content, path), digest, taken=key or "")
    found = _state_dicts(content) or {
        f"{outer}.{name}": value
        for outer, inner in (content.items() if isinstance(content, Mapping) else ())
        for name, value in _state_dicts(inner).items()
    }
    taken = _choose(path, content, list(found), asked_by)
    others = tuple(name for name in found if name != taken)
    return WeightFile(_plain(found[taken], path), digest, taken=taken, others=others)


def _state_dicts(content: Any) -> dict[str, Mapping[str, torch.Tensor]]:
    inner = content if isinstance(content, Mapping) else {}
    return {str(name): value for name, value in inner.items() if _is_state_dict(value)}


def _plain(tensors: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """The numbers themselves, however they were stored."""
    absent = [name for name, value in tensors.items() if value.is_meta]
    if absent:
        raise LoadError(
            f"{path}: {absent[0]} has no values (it is on torch's meta device, as {len(absent)} of "
            f"{len(tensors)} tensors); save the model after its weights were loaded"
        )
    return {
        name: value.detach() if value.layout == torch.strided else value.detach().to_dense()
        for name, value in tensors.items()
    }


def _choose(path: Path, content: Any, found: list[str], asked_by: str) -> str:
    """The one state dict inside of a torch file, or the usual one of several."""
    usual = [name for name in USUAL_KEYS if name in found]
    if not found:
        raise LoadError(
            f"{path} holds no state dict (tensors by name); it holds {_listed(content)}"
        )
    if len(found) > 1 and not usual:
        raise LoadError(
            f"{path} holds several state dicts: {', '.join(found)}. Say which: "
            f"{asked_by} {found[-1]}"
        )
    return usual[0] if usual else found[0]


def _file_in(folder: Path) -> Path:
    """The file of weights in a folder."""
    ours = folder / "model.safetensors"
    if ours.is_file():
        return ours
    if (folder / ".metadata").is_file():
        raise LoadError(
            f"{folder} is a folder: a distributed checkpoint of torch. Make one file of it with "
            f"`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} OUT.pt`"
        )
    there = sorted(path.name for path in folder.iterdir())[:5]
    raise LoadError(
        f"{folder} is a folder, and weights are one file; it holds {', '.join(there) or 'nothing'}"
    )


def _load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(list(_HARMLESS)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how it was pickled; what it holds is looked at
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, in words about switches that do not exist here
        foreign = re.search(r"(?:GLOBAL|class|instantiate) ([\w.]+\.[\w.]+)", str(error))
        if foreign is not None:
            raise LoadError(
                f"{path} holds {foreign[1]} among its tensors, which would run code to be read. "
                "Where you trust the file, read it with torch there and save its state dict alone, "
                "with safetensors.torch.save_file"
            ) from None
        raise LoadError(
            f"{path} cannot be read as a torch file ({type(error).__name__}): it is "
            f"{_told_by_its_beginning(path)}"
        ) from None


def _told_by_its_beginning(path: Path) -> str:
    """What a file is that is no file of weights."""
    with open(path, "rb") as file:
        head = file.read(100)
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS in place of the file; fetch it with `git lfs pull`"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page: the address gave no file; download it again"
    if head.lstrip().startswith(b"{"):
        return "JSON, as the index of a checkpoint in several files; make one file of them"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any("/code/" in name for name in names):
            return (
                "a TorchScript program; where you trust it, save torch.jit.load(FILE).state_dict() "
                "with safetensors.torch.save_file"
            )
        if all(name.endswith(".npy") for name in names):
            return "numpy's archive; save its arrays with safetensors.numpy.save_file"
    return "cut, damaged, or something else" if head else "empty"


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(isinstance(n, str) and isinstance(v, torch.Tensor) for n, v in content.items())
    )


def _listed(content: Any) -> str:
    """What an object holds, in words."""
    if not isinstance(content, Mapping):
        return f"one {type(content).__name__}"
    if not content:
        return "nothing"
    # What keeps it from being a state dict comes first.
    ordered = sorted(content.items(), key=lambda item: isinstance(item[1], torch.Tensor))
    shown = [f"{name} ({_kind(value)})" for name, value in ordered[:8]]
    return ", ".join(shown) + (f" and {len(content) - 8} more" if len(content) > 8 else "")


def _kind(value: Any) -> str:
    if _is_state_dict(value):
        return f"state dict of {len(value)} tensors"
    if isinstance(value, Mapping):
        return f"mapping of {len(value)}"
    return "tensor" if isinstance(value, torch.Tensor) else type(value).__name__


_NO_LOGARITHM = 10.0
"""A logit scale above this is none: its exponential would be 22,026. SigLIP's are up to 4.8."""


def find_unsound(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """What no trained model holds: values that are not finite, a negative variance, a temperature
    in place of its logarithm, zeros alone."""
    found = []
    for name, value in tensors.items():
        if not value.is_floating_point():
            continue
        wrong = int((~torch.isfinite(value)).sum())
        if wrong:
            kind = "nan" if bool(torch.isnan(value).any()) else "inf"
            found.append(f"{name} holds {wrong} values that are not finite ({kind})")
        elif name.endswith("running_var") and bool((value < 0).any()):
            found.append(f"{name} holds {int((value < 0).sum())} variances below 0")
        elif name.rpartition(".")[2] == "logit_scale" and float(value.max()) > _NO_LOGARITHM:
            found.append(
                f"{name} is {float(value.max()):g}, and the model's is a logarithm, at most "
                f"{math.log(100):.3f} (ln 100). Was its exponential stored? Write reset: [{name}]"
            )
    matrices = [value for value in tensors.values() if value.ndim > 1]
    if matrices and not any(bool(value.any()) for value in matrices):
        found.append(f"all {len(matrices)} matrices are 0")
    return found
