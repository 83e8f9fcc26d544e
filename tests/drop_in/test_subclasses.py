"""Subclasses that change the loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.demos import tiny_pretrained
from tests.helpers.dropping import blocks, flat_gradient, run_code
from tests.helpers.gradients import ROWS, Recorder, furthest
from tests.helpers.losses import classes

Make = Callable[..., Trainer]
SETTINGS: dict[str, Any] = {"optimizer": Recorder, "schedule": "constant", "warmup": 0.0}
Subclass = type[SFTModule]


@pytest.fixture(scope="module")
def preference() -> Subclass:
    return run_code("Preferences")["Preference"]


@pytest.fixture(scope="module")
def distilled() -> Subclass:
    return classes()["Distilled"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_pretrained(tmp_path_factory.mktemp("pretrained") / "teacher", seed=1, hidden_size=32)


def logits_of(model: Any, ids: list[int]) -> Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0, :-1]


def pairs() -> list[tuple[list[int], int]]:
    """Better and worse answers in turn, each with the length of its prompt: 5 pairs of unequal lengths."""
    torch.manual_seed(0)
    rows = []
    for pair in range(5):
        prompt = torch.randint(256, (2 + pair,)).tolist()
        rows += [(prompt + torch.randint(256, (3 + k * pair,)).tolist(), len(prompt)) for k in (1, 2)]
    return rows


def padded(rows: list[tuple[list[int], int]]) -> dict[str, Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    labels = torch.tensor([[-100] * n + ids[n:] + [-100] * (longest - len(ids)) for ids, n in rows])
    return {"input_ids": ids, "labels": labels}


def moved(model: Any) -> Any:
    """The same model a little way off, so that there is a gain to be had."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def test_preference_gradients_are_those_of_the_formula(
    pretrained: str, quiet_trainer: Make, preference: Subclass
) -> None:
    """The mean over the pairs of a step, whose micro-batches have 2, 2 and 1."""

    class Moved(preference):
        def configure_model(self) -> None:
            super().configure_model()
            moved(self.model)

    trainer = quiet_trainer(accumulate_grad_batches=3)
    loader = DataLoader(pairs(), batch_size=4, collate_fn=padded)
    trainer.fit(Moved(pretrained, beta=0.7, **SETTINGS), loader)
    before = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32)
    now = moved(AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32).train())
    gains = []
    for ids, n in pairs():
        of_models = [logits_of(model, ids).double().log_softmax(-1) for model in (now, before)]
        ours, theirs = (p.gather(1, torch.tensor(ids[1:])[:, None])[n - 1 :].sum() for p in of_models)
        gains.append(ours - theirs.detach())
    margins = [better - worse for better, worse in zip(gains[::2], gains[1::2], strict=True)]
    loss = torch.stack([-(0.7 * margin).sigmoid().log() for margin in margins]).mean()
    loss.backward()
    assert max(abs(margin.item()) for margin in margins) > 0.1
    assert furthest(trainer.optimizers[0].gradients, [flat_gradient(now)]) <= 1e-5
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(loss.item(), rel=1e-5)


def test_a_checkpoint_of_a_subclass_loads_and_has_nothing_of_its_teacher(
    pretrained: str, quiet_trainer: Make, distilled: Subclass, teacher: str, tmp_path: Path
) -> None:
    module = distilled(pretrained, teacher=teacher, share=0.3)
    saver = ModelCheckpoint(tmp_path / "saved")
    trainer = quiet_trainer(callbacks=[saver], enable_checkpointing=True)
    trainer.fit(module, SFTDataModule(train=ROWS, val=ROWS))
    saved = torch.load(saver.best_model_path, weights_only=True)
    assert saved["state_dict"].keys() == {f"scorer.model.{n}" for n in module.model.state_dict()}
    again = distilled.load_from_checkpoint(saver.best_model_path, weights_only=True)
    assert (again.share, again.hparams["teacher"]) == (0.3, teacher)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), module.parameters(), strict=True))
    [plain] = quiet_trainer().validate(again, SFTDataModule(val=ROWS), verbose=False)
    assert plain["val/loss"] == pytest.approx(trainer.callback_metrics["val/loss"].item(), rel=1e-6)


def test_a_training_step_of_a_subclass_stands_for_itself(pretrained: str, quiet_trainer: Make) -> None:
    class Own(SFTModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return -self(batch).total / batch.normalizer

    gradients = []
    for kind in (Own, SFTModule):
        trainer = quiet_trainer()
        trainer.fit(kind(pretrained, **SETTINGS), SFTDataModule(train=ROWS, tokens_per_batch=150))
        gradients.append(trainer.optimizers[0].gradients)
    assert len(gradients[0]) > 1
    assert furthest(*gradients) == 0


def test_such_a_subclass_has_less_than_30_lines() -> None:
    code = blocks("Preferences")[0].partition("class ")[2]
    assert len([line for line in code.splitlines() if line]) < 30
