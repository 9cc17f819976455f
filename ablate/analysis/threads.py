"""Small matrices are computed by one thread."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from threadpoolctl import threadpool_limits


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """BLAS, OpenMP and torch, where it is imported, compute on one thread meanwhile.

    Matrices of tens of cells are too small to share, and on cores that train the threads wait for
    one another: a sweep of 40 cells and its confirming were answered in 10 s in place of 2, and 55
    proposals of Optuna's Gaussian process took 38 s in place of 6 (two at once on two cores).
    """
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 0
    with threadpool_limits(limits=1):
        if torch:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            if torch:
                torch.set_num_threads(before)
