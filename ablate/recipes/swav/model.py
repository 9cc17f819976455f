"""Backbone, projection and prototypes, and the queue of earlier features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ablate.recipes.swav.config import Config
from ablate.training.data.augment import ToInput, seed_globals

MEAN, STD = (0.485, 0.456, 0.406), (0.228, 0.224, 0.225)
"""As src/multicropdataset.py has them; the first deviation is not the usual 0.229."""


class SwAV(nn.Module):
    """Crops to projections of norm 1 and their scores by the prototypes.

    `queue` holds the assigned crops' projections of the last batches over all workers, the same on
    each of them: crops x length x feat_dim, newest first. It is a buffer, so that it goes wherever
    the weights go.
    """

    queue: torch.Tensor
    queued: torch.Tensor

    def __init__(self, config: Config, *, workers: int) -> None:
        super().__init__()
        from lightly.models.modules.heads import SwaVProjectionHead

        self.backbone, width = make_backbone(config.arch)
        self.projection: nn.Module
        if config.hidden_mlp:
            self.projection = SwaVProjectionHead(width, config.hidden_mlp, config.feat_dim)
        else:
            self.projection = nn.Linear(width, config.feat_dim)
        self.prototypes = nn.Linear(
            config.feat_dim, config.nmb_prototypes, bias=config.prototype_bias
        )
        shape = (len(config.crops_for_assign), config.queue(workers), config.feat_dim)
        self.register_buffer("queue", torch.zeros(shape))
        self.register_buffer("queued", torch.zeros((), dtype=torch.long))

    def forward(self, crops: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Crops, each N x 3 x S x S, to (projections, scores) of all of them, crop after crop.

        Those of one size go through the backbone together, as the peer's forward has it: BatchNorm
        sees each resolution apart.
        """
        sizes = [crop.shape[-1] for crop in crops]
        parts, start = [], 0
        while start < len(crops):
            stop = start + 1
            while stop < len(crops) and sizes[stop] == sizes[start]:
                stop += 1
            parts.append(self.backbone(torch.cat(list(crops[start:stop]))))
            start = stop
        projected = nn.functional.normalize(self.projection(torch.cat(parts)).float(), dim=1)
        return projected, self.prototypes(projected)

    @torch.no_grad()
    def normalise_prototypes(self) -> None:
        """Prototypes of norm 1."""
        self.prototypes.weight.copy_(nn.functional.normalize(self.prototypes.weight, dim=1))

    @torch.no_grad()
    def enqueue(self, newest: torch.Tensor) -> None:
        """Put `newest` (crops x samples of all workers x feat_dim) before what is there."""
        count = newest.shape[1]
        self.queue.copy_(torch.cat([newest, self.queue], dim=1)[:, : self.queue.shape[1]])
        self.queued += count

    @property
    def queue_is_full(self) -> bool:
        """Whether the queue holds features alone. It waits for the device."""
        return 0 < self.queue.shape[1] <= int(self.queued)


def make_backbone(arch: str) -> tuple[nn.Module, int]:
    """A network from images to features, and how wide they are."""
    if arch != "tiny":
        from torchvision import models

        network = getattr(models, arch)(weights=None)
        width = int(network.fc.in_features)
        network.fc = nn.Identity()
        return network, width
    layers: list[nn.Module] = []
    before = 3
    for channels in (16, 32, 64):
        for stride in (2, 1):
            layers += [
                nn.Conv2d(before, channels, 3, stride, 1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
            ]
            before = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), before


def create_model(config: Config, device: torch.device, *, workers: int = 1) -> SwAV:
    """The model with its initial weights, which the seed decides, in train mode."""
    seed_globals(config.seed)
    with device:
        return SwAV(config, workers=workers).train()


def make_input(device: torch.device) -> ToInput:
    """Bytes to what the model takes."""
    return ToInput(MEAN, STD, device=device)


def encode(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """The backbone's features, of norm 1; what linear probes of SwAV read."""
    assert isinstance(model, SwAV)
    return nn.functional.normalize(model.backbone(pixels).float(), dim=1)
