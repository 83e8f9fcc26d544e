"""What callbacks get of a validated batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer

from lightning_sft import SFTDataModule, SFTModule
from tests.helpers.gradients import ROWS


class Sums(Callback):
    """Sums of likelihood and weight over the batches."""

    def __init__(self) -> None:
        self.total = self.weight = self.targets = 0.0

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *numbers: int) -> None:
        likelihood = outputs["likelihood"]
        self.total, self.weight = self.total + likelihood.total.item(), self.weight + likelihood.weight.item()
        self.targets += len(batch.targets)
        assert len(likelihood.correct) == len(batch.targets)

    on_test_batch_end = on_validation_batch_end


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_callbacks_get_the_likelihood_of_each_batch(
    pretrained: str, quiet_trainer: Callable[..., Trainer], verb: str
) -> None:
    seen, name = Sums(), {"validate": "val"}.get(verb, verb)
    data = SFTDataModule(**{name: ROWS, "tokens_per_batch": 100})
    [logged] = getattr(quiet_trainer(callbacks=[seen]), verb)(SFTModule(pretrained), data, verbose=False)
    assert seen.targets == seen.weight > 0
    assert -seen.total / seen.weight == pytest.approx(logged[f"{name}/loss"], rel=1e-5)
