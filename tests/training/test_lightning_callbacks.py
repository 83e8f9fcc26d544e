from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    GradientAccumulationScheduler,
    ModelPruning,
    StochasticWeightAveraging,
)

from lightning_sft import SFTModule
from lightning_sft.callbacks import HFExport, RunRecord, SampleLedger
from lightning_sft.training.lightning_callbacks import check_callbacks
from lightning_sft.types import InputError


class Averaging(StochasticWeightAveraging):
    """A user's own, derived from Lightning's."""


class Accumulating(GradientAccumulationScheduler):
    """Another one."""


class Frozen(BaseFinetuning):
    """Freezes what there is when it is asked: nothing."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.model)


@pytest.mark.parametrize(
    ("callback", "remedy"),
    [
        (StochasticWeightAveraging(1e-3), r"would average nothing. Use lightning.pytorch.callbacks.WeightAveraging"),
        (Averaging(1e-3), r"^Averaging copies the module before"),
        (Accumulating({0: 1, 1: 2}), r"^Accumulating changes how many micro-batches .* Use a constant trainer.accum"),
        (Frozen(), r"^Frozen freezes .* and would freeze nothing. Set model.frozen"),
        (BackboneFinetuning(), r"^BackboneFinetuning freezes"),
        (ModelPruning("l1_unstructured", amount=0.5), r"^ModelPruning .* would prune none. Prune the model"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_callbacks_that_would_have_no_effect_or_another_one_are_refused_before_anything_is_read(
    quiet_trainer: Callable[..., Trainer], callback: Any, remedy: str
) -> None:
    with pytest.raises(InputError, match=remedy):
        quiet_trainer(callbacks=[callback]).fit(SFTModule("nowhere"), [])


@pytest.mark.parametrize("kind", [RunRecord, SampleLedger, HFExport])
def test_two_that_write_the_same_files_are_refused(
    quiet_trainer: Callable[..., Trainer], tmp_path: Path, kind: Any
) -> None:
    def checked(*folders: Any) -> None:
        check_callbacks(quiet_trainer(callbacks=[kind(folder) for folder in folders]))

    checked(tmp_path / "a", tmp_path / "b")
    with pytest.raises(InputError, match=rf"^Two callbacks {kind.__name__} write to the same folder.* Remove one"):
        checked(tmp_path / "a", str(tmp_path / "a"))
