"""A second load in a fresh process: what differs between the two was not in the file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate.errors import LoadError

if TYPE_CHECKING:
    pass
from ablate.recipes.openclip.config import Config
from ablate.recipes.openclip.model import create_model
from ablate.recipes.openclip.weights import compute_probe

_OF_THE_MODEL = (
    "model", "siglip", "force_image_size", "force_context_length", "force_quick_gelu",
    "force_custom_text", "force_patch_dropout", "image_mean", "image_std", "image_interpolation",
    "image_resize_mode", "precision", "init_from",
)  # fmt: skip
"""Fields that decide what is built and loaded."""


_FRESH_SEED = 1_234_567_891


def check_load(config: Config, model: Any, report: Mapping[str, Any]) -> dict[str, Any]:
    """Compare the loaded model with another load, in a fresh process under another seed.

    What the file does not determine is what differs: parameters at their random initialisation.
    The other load is made once for a machine and kept in the cache. Gives what goes into the
    load report: ``reloaded`` in words, and the names in ``random``.

    Raises:
        LoadError: the features differ for another reason than gaps that init_from allows.
    """
    import open_clip
    import torch

    from ablate.training.data import cache
    from ablate.training.weights import compare_features, digest_tensors

    fields = {name: getattr(config, name) for name in _OF_THE_MODEL}
    seed = _FRESH_SEED + (config.seed == _FRESH_SEED)
    content = Config(**fields, seed=seed).model_dump_json()

    def build(folder: Path) -> None:
        entry = "from ablate.recipes.openclip import reload; reload.load_afresh"
        _run_fresh(entry, content, folder)

    name = cache.key("load-1", content, report["sha256"], torch.__version__, open_clip.__version__)
    folder = cache.build_once("loads", name, build)
    other = json.loads((folder / "load.json").read_text(encoding="utf-8"))
    mine = digest_tensors(model.state_dict())
    random = sorted(n for n, digest in mine.items() if other["tensors"].get(n) != digest)
    dtype = open_clip.get_input_dtype(config.precision)
    exact = dtype is None and model.logit_scale.device.type == "cpu"
    wrong = compare_features(
        {name: torch.tensor(value) for name, value in other["features"].items()},
        compute_probe(model, dtype=dtype),
        tolerance=1e-4 if exact else 2e-2,  # another device, or 8 bits, rounds otherwise
    )
    far = ", ".join(f"{item.name} by {item.largest:.2g}" for item in wrong)
    allowed = {*report["missing"], *report["mismatched"], *report["reset"]}
    unknown = [name for name in random if name not in allowed]
    if unknown or (wrong and not random):
        why = (
            f"at random initialisation: {', '.join(unknown[:8])}"
            + (f" and {len(unknown) - 8} more" if unknown[8:] else "")
            if unknown
            else "all tensors are equal, so the model computes differently there"
        )
        raise LoadError(
            f"{report['path']} was loaded twice, here and in a fresh process, and the models are "
            f"not the same ({f'features differ: {far}' if wrong else 'features are equal'}); {why}"
        )
    if not wrong:
        said = "equal features in a fresh process"
    else:
        said = f"features differ in a fresh process ({far}): {len(random)} tensors are random"
    return {"reloaded": said, "random": random}


def load_afresh(content: str, folder: str) -> None:
    """The other process of :func:`check_load`: builds, loads, and leaves load.json."""
    import open_clip
    import torch

    from ablate.training.weights import digest_tensors

    config = Config.model_validate_json(content)
    model, _, _, _ = create_model(config, torch.device("cpu"))
    features = compute_probe(model, dtype=open_clip.get_input_dtype(config.precision))
    found = {
        "tensors": digest_tensors(model.state_dict()),
        "features": {name: value.tolist() for name, value in features.items()},
    }
    (Path(folder) / "load.json").write_text(json.dumps(found), encoding="utf-8")


def _run_fresh(function: str, *arguments: object) -> None:
    """Call ``function`` (imports and a name) with these texts in a new interpreter, without GPUs.

    Raises:
        LoadError: it failed; gives its last words.
    """
    import subprocess
    import sys

    code = f"import sys; {function}(*sys.argv[1:])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**env, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise LoadError(f"init_from cannot be loaded again in a fresh process: {last[0]}")
