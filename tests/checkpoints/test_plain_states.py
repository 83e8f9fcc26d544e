"""A state that no run could resume from is refused before the first step, with its holder and what to keep instead."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import SafeCheckpoint
from lightning_sft.checkpoints.plain_states import why_not_resumable
from lightning_sft.types import InputError

Make = Callable[..., Trainer]
OBJECTS = {
    "collections.deque": (deque([1.0]), r"list\(x\)"),
    "numpy.ndarray": (np.ones(2), r"x\.tolist\(\)"),
    "numpy.float64": (np.float64(1), r"float\(x\)"),
    "collections.defaultdict": (defaultdict(list), r"dict\(x\)"),
    "pathlib.PosixPath": (Path("/a"), r"str\(x\)"),
    "the function <lambda>": (lambda: 0, "Leave it out"),
    "SFTModule": (SFTModule("nowhere"), "Keep the numbers"),
}


class Keeps(Callback):
    """A callback with a state, which begins at once or at the first step."""

    def __init__(self, last: Any, at_once: bool = True) -> None:
        self.last, self.at_once = last, at_once
        self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps} if self.steps == 0 and not self.at_once else {"kept": [{"last": self.last}]}

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1


@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("in_background", [True, False])
def test_the_state_of_a_callback_is_refused_before_a_checkpoint_is_written(
    name: str, at_once: bool, in_background: bool, pretrained: str, quiet_trainer: Make, rows: Any, tmp_path: Path
) -> None:
    value, instead = OBJECTS[name]
    keeps = Keeps(value, at_once)
    saver = SafeCheckpoint(tmp_path, every_n_train_steps=1, in_background=in_background)
    trainer = quiet_trainer(callbacks=[keeps, saver], enable_checkpointing=True, max_steps=2)
    with pytest.raises(InputError, match=rf"callback Keeps at \['kept'\]\['0'\]\['last'\] has .*{name}.*{instead}"):
        trainer.fit(SFTModule(pretrained), SFTDataModule(train=rows, tokens_per_batch=60))
    assert keeps.steps == (0 if at_once else 1)
    assert not list(tmp_path.glob("*.ckpt"))


class Settings(SFTModule):
    """A module that keeps an object among its hyperparameters."""

    def __init__(self, pretrained: str, table: Any) -> None:
        super().__init__(pretrained)
        self.save_hyperparameters("table")


class Adds(SFTModule):
    """A module that adds an object in a hook."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["mine"] = {"window": deque([1])}


class Data(SFTDataModule):
    """A data module that has an object in its state."""

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"window": deque([1])}


@pytest.mark.parametrize(
    ("kind", "data", "holder"),
    [
        (lambda name: Settings(name, np.ones(2)), SFTDataModule, "the hyperparameters of the module: table has"),
        (Adds, SFTDataModule, r"checkpoint\['mine'\]\['window'\] has"),
        (SFTModule, Data, r"checkpoint\['Data'\]\['window'\] has"),
    ],
)
def test_so_are_those_of_modules(
    kind: Any, data: Any, holder: str, pretrained: str, quiet_trainer: Make, rows: Any, tmp_path: Path
) -> None:
    trainer = quiet_trainer(callbacks=[SafeCheckpoint(tmp_path)], enable_checkpointing=True, max_steps=1)
    with pytest.raises(InputError, match=holder):
        trainer.fit(kind(pretrained), data(train=rows))
    assert not list(tmp_path.glob("*.ckpt"))


def test_a_file_of_lightning_is_warned_of_once_and_one_that_cannot_be_written_is_one_error(
    pretrained: str, quiet_trainer: Make, rows: Any, tmp_path: Path
) -> None:
    def fit(value: Any) -> None:
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
        trainer = quiet_trainer(callbacks=[Keeps(value), saver], enable_checkpointing=True, max_steps=3)
        trainer.fit(SFTModule(pretrained), SFTDataModule(train=rows, tokens_per_batch=60))

    with pytest.warns(UserWarning, match="No run could resume from this checkpoint") as seen:
        fit(deque([1.0]))
    assert sum("No run could resume" in str(one.message) for one in seen) == 1
    assert len(list(tmp_path.glob("*.ckpt"))) == 3
    with (
        pytest.warns(UserWarning, match="No run could resume"),
        pytest.raises(InputError, match=r"cannot be written: .*has the function .*<lambda>"),
    ):
        fit(lambda: 0)


def test_what_torch_loads_without_running_code_is_kept() -> None:
    plain = OrderedDict(a=[1, 2.0, None, "x", True, b"y", {1, 2}, 1j], b=(torch.ones(1), {"c": torch.float32, 3: []}))
    assert why_not_resumable({"callbacks": {"Window": plain}}) is None


@pytest.mark.filterwarnings("ignore:.fit.ckpt_path=.last.. is set, but there is no last checkpoint available")
def test_where_no_checkpoint_can_be_read_it_says_why(
    pretrained: str, quiet_trainer: Make, rows: Any, tmp_path: Path
) -> None:
    def fit(**settings: Any) -> None:
        trainer = quiet_trainer(callbacks=[SafeCheckpoint(tmp_path)], enable_checkpointing=True, max_steps=1)
        trainer.fit(SFTModule(pretrained), SFTDataModule(train=rows), **settings)

    fit()
    [path] = tmp_path.glob("*.ckpt")
    torch.save(torch.load(path) | {"mine": deque([1])}, path)  # as of an earlier release
    with (
        pytest.warns(UserWarning, match="Skipping"),
        pytest.raises(InputError, match=r"none of them can be read.*holds more than tensors.*collections\.deque"),
    ):
        fit(ckpt_path="last")
