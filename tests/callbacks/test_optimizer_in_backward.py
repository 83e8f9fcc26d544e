"""The optimizer in the backward pass: bit for bit the same weights, without the gradients."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks.optimizer_in_backward import OptimizerInBackward
from lightning_sft.demos import tiny_pretrained
from lightning_sft.types import InputError

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
ADAMW = partial(torch.optim.AdamW, lr=1e-2, fused=True)


class Gradients(Callback):
    """How many parameters have a gradient when the backward pass is done."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(sum(p.grad is not None for p in pl_module.parameters()))


def fit(
    pretrained: str, rows: Any, *callbacks: Callback, data: Any = None, ckpt_path: Any = None, **given: Any
) -> Trainer:
    settings = {"optimizer": ADAMW, **{name: given.pop(name) for name in list(given) if name in _OF_MODULE}}
    module = SFTModule(pretrained, **settings)
    trainer = Trainer(**{"accelerator": "cpu", "max_epochs": 2, **QUIET, **given, "callbacks": list(callbacks)})
    trainer.fit(module, data or SFTDataModule(train=rows, tokens_per_batch=64), ckpt_path=ckpt_path)
    return trainer


_OF_MODULE = ("optimizer", "gradient_checkpointing", "lora", "neftune_alpha")


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.lightning_module.parameters()])


@pytest.fixture
def tied(tmp_path: Path) -> str:
    return tiny_pretrained(tmp_path / "tied", tie_word_embeddings=True)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_checkpointing": True},
        {"optimizer": partial(torch.optim.AdamW, lr=1e-2, foreach=True)},
        {"optimizer": partial(torch.optim.NAdam, lr=1e-2)},
        {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)},
        {"optimizer": partial(torch.optim.Adafactor, lr=1e-2)},
        {"neftune_alpha": 5.0},
    ],
    ids=["fused", "checkpointing", "foreach", "nadam", "sgd", "adafactor", "noise"],
)
def test_weights_are_those_of_the_ordinary_step_to_the_bit(
    tied: str, rows: list[dict[str, str]], settings: dict[str, Any]
) -> None:
    own, usual = Gradients(), Gradients()
    inside = fit(tied, rows, OptimizerInBackward(), own, **settings)
    outside = fit(tied, rows, usual, **settings)
    assert torch.equal(weights(inside), weights(outside))
    assert set(own.seen) == {0}
    assert min(usual.seen) > 0
    assert "train/gradient_norm" not in inside.callback_metrics
    assert inside.callback_metrics["train/loss"] == outside.callback_metrics["train/loss"]


def test_a_backward_pass_visits_each_parameter_a_constant_number_of_times(
    tied: str, rows: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    visited = {"step": 0, "zero_grad": 0}
    of_group, of_all = torch.optim.AdamW._init_group, torch.optim.Optimizer.zero_grad

    def init_group(self: Any, group: Any, *rest: Any, **more: Any) -> Any:
        visited["step"] += len(group["params"])
        return of_group(self, group, *rest, **more)

    def zero_grad(self: Any, *rest: Any, **more: Any) -> None:
        visited["zero_grad"] += sum(len(group["params"]) for group in self.param_groups)
        of_all(self, *rest, **more)

    monkeypatch.setattr(torch.optim.AdamW, "_init_group", init_group)
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", zero_grad)
    trainer = fit(tied, rows, OptimizerInBackward(), max_steps=3)
    num_parameters = len(list(trainer.lightning_module.parameters()))
    assert num_parameters > 10
    assert 3 * num_parameters <= visited["step"] <= 2 * 3 * num_parameters  # in the backward pass, and Lightning's own
    assert visited["zero_grad"] <= 4 * 3 * num_parameters + num_parameters


def test_a_checkpoint_goes_on_with_it_or_without(tied: str, rows: list[dict[str, str]], tmp_path: Path) -> None:
    path = tmp_path / "middle.ckpt"
    whole = fit(tied, rows)
    fit(tied, rows, OptimizerInBackward(), Save(path, after=3))
    for callbacks in ([OptimizerInBackward()], []):
        assert torch.equal(weights(fit(tied, rows, *callbacks, ckpt_path=path)), weights(whole))


class Save(Callback):
    """Saves a checkpoint after so many steps, inside of an epoch."""

    def __init__(self, path: Path, after: int) -> None:
        self.path, self.after = path, after

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.after:
            trainer.save_checkpoint(self.path)


def test_the_model_is_as_it_was_afterwards(tied: str, rows: list[dict[str, str]]) -> None:
    module = fit(tied, rows, OptimizerInBackward()).lightning_module
    before = [p.detach().clone() for p in module.parameters()]
    sum(p.sum() for p in module.parameters()).backward()
    assert all(p.grad is not None for p in module.parameters())
    assert all(map(torch.equal, before, module.parameters()))


def test_nothing_is_updated_with_a_loss_that_is_no_number(tied: str, rows: list[dict[str, str]]) -> None:
    class Poison(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                with torch.no_grad():
                    pl_module.model.lm_head.weight[0, 0] = float("inf")
                self.before = [p.detach().clone() for p in pl_module.parameters()]
                self.parameters = list(pl_module.parameters())

    poison = Poison()
    with pytest.raises(FloatingPointError, match="Nothing was updated with it"):
        fit(tied, rows, OptimizerInBackward(), poison)
    assert all(map(torch.equal, poison.before, poison.parameters))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate_grad_batches": 2}, "accumulates gradients. Set trainer.accumulate_grad_batches=1, or leave"),
        ({"gradient_clip_val": 1.0}, "clips them. Set trainer.gradient_clip_val=null"),
        ({"strategy": "ddp", "devices": 2}, "reduces them over processes. Use one device"),
    ],
)
def test_what_needs_all_gradients_is_refused_before_anything_is_read(settings: dict[str, Any], message: str) -> None:
    trainer = Trainer(accelerator="cpu", **QUIET, **settings)
    with pytest.raises(InputError, match=message):
        OptimizerInBackward().setup(trainer, None, "fit")
    OptimizerInBackward().setup(trainer, None, "validate")


def test_other_optimizers_and_batches_are_refused(tied: str, rows: list[dict[str, str]]) -> None:
    class Own(torch.optim.SGD):
        pass

    with pytest.raises(InputError, match=r"got Own\. Use torch\.optim\.AdamW"):
        fit(tied, rows, OptimizerInBackward(), optimizer=partial(Own, lr=0.1))
    plain = DataLoader([{"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([5, 6])}], batch_size=1)
    with pytest.raises(InputError, match="needs batches of SFTDataModule"):
        Trainer(accelerator="cpu", max_steps=1, **QUIET, callbacks=[OptimizerInBackward()]).fit(SFTModule(tied), plain)
