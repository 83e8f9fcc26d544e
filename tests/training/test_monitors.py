"""A metric that nothing logs is said before training, with the name that may be meant."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import BestCheckpoint
from lightning_sft.training.monitors import _OF_PARTS, NAMES
from lightning_sft.types import InputError
from tests.helpers.gradients import ROWS

Make = Callable[..., Trainer]


class Seen(Callback):
    """Whether a batch was computed."""

    batches = 0

    def on_validation_batch_start(self, *args: Any) -> None:
        self.batches += 1

    on_train_batch_start = on_validation_batch_start


class Mine(SFTModule):
    """A user's own module, which logs a metric."""

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.log("val_loss", 1.0)


def data(val: Any = ROWS[:4]) -> SFTDataModule:
    return SFTDataModule(train=ROWS, val=val, tokens_per_batch=200)


@pytest.mark.parametrize("kind", [EarlyStopping, ModelCheckpoint, BestCheckpoint])
@pytest.mark.parametrize("typo", ["val_loss", "val/los", "valid_loss", "val.loss"])
def test_a_misspelt_metric_is_refused_before_the_first_batch(
    pretrained: str, quiet_trainer: Make, tmp_path: Any, kind: Any, typo: str
) -> None:
    folder = {} if kind is EarlyStopping else {"dirpath": tmp_path}
    trainer = quiet_trainer(callbacks=[kind(monitor=typo, **folder)], enable_checkpointing=True)
    with pytest.raises(
        InputError, match=rf"{kind.__name__} monitors '{typo}', which nothing logs. Did you mean val/loss"
    ):
        trainer.fit(SFTModule(pretrained), data())
    assert trainer.global_step == 0


def test_so_is_that_of_a_schedule(pretrained: str, quiet_trainer: Make) -> None:
    module = SFTModule(pretrained, schedule=partial(ReduceLROnPlateau, monitor="val_loss"))
    with pytest.raises(InputError, match=r"model.schedule=ReduceLROnPlateau monitors 'val_loss', .* mean val/loss\?"):
        quiet_trainer().fit(module, data())


def test_what_a_user_s_own_code_may_log_is_not_refused(pretrained: str, quiet_trainer: Make) -> None:
    trainer = quiet_trainer(callbacks=[EarlyStopping("val_loss")])
    with pytest.warns(UserWarning, match=r"monitors 'val_loss', which SFTModule does not log. Did you mean val/loss"):
        trainer.fit(Mine(pretrained), data())
    quiet_trainer(callbacks=[EarlyStopping("reward", strict=False), Seen()]).fit(SFTModule(pretrained), data())


def test_waiting_for_a_validation_without_its_data_is_refused(
    pretrained: str, quiet_trainer: Make, tmp_path: Any
) -> None:
    seen = Seen()
    with pytest.raises(InputError, match=r"EarlyStopping monitors 'val/loss', and there are no validation data"):
        quiet_trainer(callbacks=[EarlyStopping("val/loss"), seen]).fit(SFTModule(pretrained), data(None))
    assert seen.batches == 0
    with pytest.raises(InputError, match=r"leave trainer.limit_val_batches above 0"):
        quiet_trainer(callbacks=[EarlyStopping("val/loss")], limit_val_batches=0).fit(SFTModule(pretrained), data())
    best = ModelCheckpoint(tmp_path, monitor="val/loss")
    with pytest.raises(InputError, match=r"ModelCheckpoint monitors 'val/loss', and there are no validation data: set"):
        quiet_trainer(callbacks=[best], enable_checkpointing=True).fit(SFTModule(pretrained), data(None))
    ours = [BestCheckpoint(tmp_path), ModelCheckpoint(tmp_path, monitor="train/loss")]  # there by default; logged
    quiet_trainer(callbacks=ours, enable_checkpointing=True).fit(SFTModule(pretrained), data(None))
    module = SFTModule(pretrained, schedule=partial(ReduceLROnPlateau, monitor="val/loss"))
    with pytest.raises(InputError, match=r"stepped after each validation: set data.val, and leave trainer.limit_val"):
        quiet_trainer(limit_val_batches=0).fit(module, data())


def test_all_that_a_fit_logs_is_known(pretrained: str, quiet_trainer: Make) -> None:
    trainer = quiet_trainer(callbacks=[EarlyStopping("val/perplexity")], gradient_clip_val=1.0)
    trainer.fit(SFTModule(pretrained), data())
    unknown = {name for name in trainer.callback_metrics if name not in NAMES and not _OF_PARTS.fullmatch(name)}
    assert not unknown
    assert {"val/loss", "train/loss", "train/gradient_norm", "lr"} <= trainer.callback_metrics.keys()
