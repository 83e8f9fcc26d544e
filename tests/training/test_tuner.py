from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.demos import tiny_pretrained
from lightning_sft.types import InputError
from tests.helpers.dropping import blocks
from tests.helpers.gradients import ROWS
from tests.helpers.own_steps import batches

Make = Callable[..., Trainer]


class Losses(Callback):
    """Losses and learning rates of each step."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.rows.append((trainer.callback_metrics["train/loss"].item(), trainer.callback_metrics["lr"].item()))


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What it computes depends on the random numbers that it draws."""
    return tiny_pretrained(tmp_path_factory.mktemp("pretrained") / "dropping", attention_dropout=0.5)


def fitted(trainer: Trainer, losses: Losses, module: SFTModule, data: SFTDataModule) -> Any:
    trainer.fit(module, data)
    assert trainer.global_step == len(losses.rows) == 2 * data.steps_per_epoch
    return losses.rows, [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("mode", ["power", "binsearch", "lr_find"])
def test_a_fit_after_the_tuner_is_that_of_a_fit_without_one(dropping: str, quiet_trainer: Make, mode: str) -> None:
    """The same losses, learning rates and weights to the bit, where it finds what was given."""
    results = []
    for tuned in (False, True):
        losses = Losses()
        trainer = quiet_trainer(max_epochs=2, callbacks=[losses])
        module, data = SFTModule(dropping), SFTDataModule(train=ROWS, val=ROWS[:4], tokens_per_batch=128)
        if tuned and mode == "lr_find":
            found = Tuner(trainer).lr_find(module, datamodule=data, num_training=5, update_attr=False)
            assert len(found.results["lr"]) == 5
        elif tuned:
            settings: dict[str, Any] = {"batch_arg_name": "tokens_per_batch", "steps_per_trial": 2, "margin": 0.0}
            settings |= {"init_val": 64, "max_trials": 2, "mode": mode}
            assert Tuner(trainer).scale_batch_size(module, datamodule=data, **settings) == 128
            assert data.tokens_per_batch == 128
        results.append(fitted(trainer, losses, module, data))
    assert results[0][0] == results[1][0]
    assert all(map(torch.equal, results[0][1], results[1][1]))


def test_each_size_that_is_tried_has_a_plan_of_its_own(
    pretrained: str, quiet_trainer: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the default of 2 on; sizes below the longest sequence are tried as that."""
    tried: list[int] = []

    class Spy(SFTModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            tried.append(self.trainer.datamodule.positions_per_batch)
            assert batch.input_ids.shape[1] <= tried[-1] or len(tried) == 1
            return super().training_step(batch, batch_idx)

    trainer, data = quiet_trainer(), SFTDataModule(train=ROWS)
    settings: dict[str, Any] = {"batch_arg_name": "tokens_per_batch", "steps_per_trial": 1, "max_trials": 9}
    found = Tuner(trainer).scale_batch_size(Spy(pretrained), datamodule=data, **settings)
    longest = int(data.splits["train"].lengths.max())
    assert found == data.tokens_per_batch == 512
    assert tried[1:] == [max(longest, 2**power) for power in range(2, 10)]  # the first has the loader of before
    assert "An epoch" not in capsys.readouterr().out  # a report of each would bury the rest


def test_what_runs_out_of_memory_is_not_taken(pretrained: str, quiet_trainer: Make) -> None:
    class Small(SFTModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.trainer.datamodule.positions_per_batch > 256:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(batch, batch_idx)

    data = SFTDataModule(train=ROWS, tokens_per_batch=128)
    settings: dict[str, Any] = {"batch_arg_name": "tokens_per_batch", "steps_per_trial": 1, "init_val": 128}
    assert Tuner(quiet_trainer()).scale_batch_size(Small(pretrained), datamodule=data, **settings) == 256
    quiet_trainer().fit(Small(pretrained), data)


def test_the_found_learning_rate_is_that_of_the_next_fit(pretrained: str, quiet_trainer: Make) -> None:
    losses = Losses()
    trainer = quiet_trainer(max_epochs=20, callbacks=[losses])
    module = SFTModule(pretrained, schedule="constant", warmup=0.0)
    data = SFTDataModule(train=ROWS, tokens_per_batch=150)
    found = Tuner(trainer).lr_find(module, datamodule=data, num_training=40, max_lr=0.1)
    assert module.learning_rate == found.suggestion() > 0
    rates = found.results["lr"]
    assert len(rates) == 40
    assert math.log(rates[-1] / rates[-2]) == pytest.approx(math.log(0.1 / 1e-8) / 40, rel=0.05)
    trainer.fit(module, data)
    assert [rate for _, rate in losses.rows] == pytest.approx([module.learning_rate] * len(losses.rows))


@pytest.mark.parametrize("kind", [BatchSizeFinder, LearningRateFinder])
def test_the_finders_as_callbacks_are_refused(pretrained: str, quiet_trainer: Make, kind: Any) -> None:
    settings = {"batch_arg_name": "tokens_per_batch"} if kind is BatchSizeFinder else {}
    with pytest.raises(InputError, match=rf"{kind.__name__} as a callback changes .* Call Tuner\(trainer\)\."):
        quiet_trainer(callbacks=[kind(**settings)]).fit(SFTModule(pretrained), SFTDataModule(train=ROWS))


def test_a_size_that_we_do_not_have_is_refused_with_ours(pretrained: str, quiet_trainer: Make) -> None:
    with pytest.raises(InputError, match=r"scale 'batch_size', which neither .*batch_arg_name='tokens_per_batch'"):
        Tuner(quiet_trainer()).scale_batch_size(SFTModule(pretrained), datamodule=SFTDataModule(train=ROWS))

    class Own(SFTDataModule):
        batch_size = 2

    data = Own(train=ROWS, val=ROWS, tokens_per_batch=256)
    Tuner(quiet_trainer()).scale_batch_size(SFTModule(pretrained), datamodule=data, steps_per_trial=1, max_trials=1)
    assert data.tokens_per_batch == 256


def test_sizes_of_a_stream_are_refused(pretrained: str, quiet_trainer: Make) -> None:
    data = SFTDataModule(train=ROWS, streaming=True)
    with pytest.raises(InputError, match=r"cannot try data.tokens_per_batch on a stream"):
        Tuner(quiet_trainer(max_steps=1)).scale_batch_size(
            SFTModule(pretrained), datamodule=data, batch_arg_name="tokens_per_batch"
        )


def test_the_code_of_the_page_runs(
    pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jsonl: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SmolLM2").symlink_to(pretrained)
    jsonl(ROWS)
    exec(blocks("Lightning's tuner")[0], scope := {"__name__": "page"})
    assert scope["trainer"].global_step == 1
    assert scope["data"].tokens_per_batch == 8192


@pytest.mark.parametrize("own", [True, False])
def test_a_search_for_the_learning_rate_that_would_see_a_part_of_each_step_is_refused(
    pretrained: str, quiet_trainer: Make, own: bool
) -> None:
    data: Any = {"datamodule": SFTDataModule(train=ROWS, tokens_per_batch=128)}
    if own:
        data = {"train_dataloaders": DataLoader(batches([9, 3]), batch_size=None)}
    with pytest.raises(InputError, match=r"accumulate_grad_batches=2 is a part .* 2 times the tokens_per_batch"):
        Tuner(quiet_trainer(accumulate_grad_batches=2)).lr_find(SFTModule(pretrained), **data, num_training=5)
