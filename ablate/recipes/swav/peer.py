"""The way back to facebookresearch/swav: its command line, and weights that torchvision loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ablate.errors import LoadError
from ablate.recipes.swav.config import PEER, Config

FLAGS = (
    "data_path",
    "nmb_crops",
    "size_crops",
    "min_scale_crops",
    "max_scale_crops",
    "crops_for_assign",
    "temperature",
    "epsilon",
    "sinkhorn_iterations",
    "feat_dim",
    "nmb_prototypes",
    "queue_length",
    "epoch_queue_starts",
    "epochs",
    "batch_size",
    "base_lr",
    "final_lr",
    "freeze_prototypes_niters",
    "wd",
    "warmup_epochs",
    "start_warmup",
    "arch",
    "hidden_mlp",
    "workers",
    "use_fp16",
    "sync_bn",
    "seed",
)
"""Fields that are flags of main_swav.py, by the same name."""
LIKE_THE_PEER: dict[str, Any] = {
    "optimizer": "larc",
    "sinkhorn_scope": "global",
    "prototype_bias": False,
    "normalize_prototypes": True,
    "sync_bn": "pytorch",
    "interruption": None,
}
"""What is no flag of its, or has a value that it lacks, with what it does."""
BACKBONE_FILE, HEADS_FILE = "backbone.safetensors", "heads.safetensors"


def command(config: Config, *, workers: int) -> list[str]:
    """The line of main_swav.py, every value resolved; it needs apex for LARC.

    Raises:
        ValueError: the peer cannot do what this asks for.
    """
    for name, value in LIKE_THE_PEER.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name} {getattr(config, name)!r} has no equal in {PEER}'s main_swav.py; the "
                f"exported run would differ. Set {name}: {value}"
            )
    if config.arch not in ("resnet50",):
        raise ValueError(f"{PEER} has arch resnet50 and wider ones, not {config.arch}")
    if config.data_path is None or config.data_path.endswith(".tar"):
        raise ValueError(f"{PEER} reads an image folder, and data_path is {config.data_path!r}")
    flags = [word for name in FLAGS for word in _flag(name, getattr(config, name))]
    return ["torchrun", "--nproc_per_node", str(workers), "main_swav.py", *flags]


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, tuple):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]


def export_model(config: Config, weights: Path, folder: Path) -> None:
    """Write `folder`: the backbone in torchvision's names, projection and prototypes apart.

    `weights` is a checkpoint's model.safetensors. The backbone has no ``fc``.
    """
    import safetensors.torch

    stored = safetensors.torch.load_file(weights)
    prefix = "backbone."
    backbone = {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}
    heads = {n: t for n, t in stored.items() if n.startswith(("projection.", "prototypes."))}
    folder.mkdir(parents=True, exist_ok=True)
    about = {"arch": config.arch, "trained_by": PEER}
    safetensors.torch.save_file(backbone, folder / BACKBONE_FILE, metadata=about)
    safetensors.torch.save_file(heads, folder / HEADS_FILE, metadata=about)


def check_model(folder: str) -> str:
    """Load an exported backbone into a fresh network; what was found, in a sentence.

    Raises:
        LoadError: it does not fit its architecture, whole.
    """
    import safetensors

    from ablate.recipes.swav.model import make_backbone

    path = Path(folder) / BACKBONE_FILE
    with safetensors.safe_open(path, framework="pt") as file:
        arch = file.metadata()["arch"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    network, width = make_backbone(arch)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise LoadError(f"{path} does not load into {arch}: {error}") from error
    return f"{arch} takes all {len(tensors)} tensors of the backbone; its features are {width} wide"
