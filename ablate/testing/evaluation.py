"""The contract of an evaluation.

::

    class TestMine(ablate.testing.EvaluationContract):
        measures = ("my_score",)

        def evaluated(self, tmp_path):
            return Mine(images, due=lambda epoch: True), model
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

    from ablate.training.evaluations.evaluation import Evaluation


class EvaluationContract:
    """What holds of every evaluation, an object with ``name``, ``due(epoch)``,
    ``run(model, gang)``."""

    measures: ClassVar[tuple[str, ...]]
    """Names of what it measures; it may say more, such as its time."""

    def evaluated(self, tmp_path: Path) -> tuple[Evaluation, torch.nn.Module]:
        """The evaluation, and a model that it can measure."""
        raise NotImplementedError

    def test_it_measures_the_same_twice_and_touches_nothing(self, tmp_path: Path) -> None:
        """Finite numbers, equal but for their time; model, modes, gradients and generators are as
        they were, so that measuring more or less often changes no training."""
        import torch

        from ablate.training.ranks import Gang

        evaluation, model = self.evaluated(tmp_path)
        alone = Gang(0, 1, 0, 1, torch.device("cpu"))
        model.eval()
        assert evaluation.name and isinstance(evaluation.due(1), bool)
        before, drawn = _state(model), _drawn()
        first, again = (evaluation.run(model, alone) for _ in range(2))
        assert _untimed(first) == _untimed(again)
        assert set(self.measures) <= set(first)
        assert all(type(value) is float and math.isfinite(value) for value in first.values()), first
        after = _state(model)
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        assert not any(module.training for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert _drawn() == drawn


def _state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _drawn() -> tuple[Any, ...]:
    """Where the generators stand that a training may use."""
    import numpy as np
    import torch

    return torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()


def _untimed(measured: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in measured.items() if "time" not in name}
