"""Noise on embeddings: as large as the formula says, in training only, and the same when a step is run again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import RunRecord, SampleGenerations, ScoreAnswers
from lightning_sft.data.batches.collate import collate
from lightning_sft.types import Example
from tests.helpers.gradients import ROWS


@pytest.fixture
def module(pretrained: str) -> SFTModule:
    module = SFTModule(pretrained, neftune_alpha=5.0)
    module.configure_model()
    return module


@pytest.fixture
def examples() -> list[Example]:
    return [Example(range(5, 5 + length), [0.0] + [1.0] * (length - 1)) for length in (4, 64)]


def noise(module: Any, batch: Any) -> torch.Tensor:
    """What the embeddings of a batch get, seen by the first layer."""
    seen = []
    layer = module.model.model.layers[0]
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args or (kwargs["hidden_states"],))[0]), with_kwargs=True
    )
    module(batch)
    hook.remove()
    return (seen[0] - module.model.get_input_embeddings()(batch.input_ids)).detach()


@pytest.mark.parametrize("packed", [True, False])
def test_each_document_has_noise_of_its_own_length(module: Any, examples: list[Example], packed: bool) -> None:
    batch = collate(examples, packed=packed)
    found = (
        noise(module, batch).flatten(0, 1)[(batch.documents() == 0).flatten()][:4],
        noise(module, batch)[batch.documents() == 1],
    )
    for of_document, length in zip(found, (4, 64), strict=True):
        most = 5.0 / (length * of_document.shape[-1]) ** 0.5
        assert of_document.abs().max() <= most * 1.0001
        assert of_document.abs().max() > most * 0.9  # of 64 draws or more, uniform in (-1, 1)
        assert of_document.abs().mean() == pytest.approx(most / 2, rel=0.25)


def test_padding_and_what_follows_the_last_target_do_not_count(module: Any) -> None:
    plain, longer = Example([5, 6, 7], [0, 0, 1.0]), Example([5, 6, 7, 8, 9], [0, 0, 1.0, 0, 0])
    drawn = []
    for example in (plain, longer):
        torch.manual_seed(0)
        drawn.append(noise(module, collate([example]))[:, :3])
    assert torch.equal(*drawn)


def test_there_is_none_outside_of_training(module: Any, examples: list[Example]) -> None:
    batch = collate(examples)
    assert noise(module, batch).any()
    assert not noise(module.eval(), batch).any()
    module.train()
    ids = batch.input_ids
    assert torch.equal(module.model(ids).logits, module.model(ids).logits)  # not of the scorer: an export, say


def test_the_gradient_is_that_at_the_noisy_embeddings(module: Any, examples: list[Example]) -> None:
    batch = collate(examples)
    torch.manual_seed(3)
    noisy = noise(module, batch)
    torch.manual_seed(3)
    module(batch).total.backward()
    gradient = module.model.lm_head.weight.grad.clone()
    module.zero_grad()
    module.eval()
    hook = module.model.get_input_embeddings().register_forward_hook(lambda _, args, output: output + noisy)
    module(batch).total.backward()
    hook.remove()
    assert torch.allclose(gradient, module.model.lm_head.weight.grad, atol=1e-6)


def test_callbacks_that_ask_the_model_work_beside_it_and_get_no_noise(
    pretrained: str, quiet_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    def answered(alpha: float | None, name: str) -> list[str]:
        record, ask = RunRecord(tmp_path / name), SampleGenerations(2, 6, console=False)
        trainer = quiet_trainer(max_steps=1, callbacks=[record, ask, ScoreAnswers()], default_root_dir=tmp_path)
        data = SFTDataModule(train=ROWS, val=ROWS, test=ROWS[:2], tokens_per_batch=100)
        module = SFTModule(pretrained, neftune_alpha=alpha, max_new_tokens=3)
        trainer.fit(module, data)
        trainer.test(module, data, verbose=False)
        assert "test/exact_match" in trainer.callback_metrics
        return (tmp_path / name / "samples" / "step=00000000.jsonl").read_text(encoding="utf-8").splitlines()

    assert answered(50.0, "with") == answered(None, "without")


def test_two_fits_draw_the_same_and_validation_none(pretrained: str, quiet_trainer: Callable[..., Trainer]) -> None:
    results = []
    for alpha in (5.0, 5.0, None):
        module = SFTModule(pretrained, neftune_alpha=alpha)
        trainer = quiet_trainer(max_steps=2)
        data = SFTDataModule(train=ROWS, val=ROWS, tokens_per_batch=100)
        [before] = trainer.validate(module, data, verbose=False)
        trainer.fit(module, data)
        results.append((before["val/loss"], trainer.callback_metrics["train/loss"].item()))
    assert results[0] == results[1]
    assert results[0][0] == results[2][0]
    assert results[0][1] != results[2][1]
