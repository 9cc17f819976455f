"""A training set, as a type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch


class Samples(Protocol):
    """A training set that is read by sample id, in any order, from any process."""

    @property
    def shard_sizes(self) -> npt.NDArray[np.int64]:
        """Samples in each shard; ids count through the shards in this order."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when the data change."""
        ...

    def batch(
        self, ids: npt.NDArray[np.int64], seeds: npt.NDArray[np.uint64]
    ) -> tuple[tuple[torch.Tensor, ...], npt.NDArray[np.bool_]]:
        """Tensors of these samples (first dimension: sample), and which of them are bad.

        `seeds` holds the seed of each sample's own generator. A bad sample (unreadable image,
        empty caption) is reported, never skipped: the caller replaces its row.
        """
        ...
