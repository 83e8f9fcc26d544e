from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.data.loader import PromptBatch
from lightning_sft.demos import tiny_model, tiny_tokenizer
from lightning_sft.generation import Sampling, answer_all, answers, draw
from lightning_sft.types import InputError, Prompt

PROMPTS = [Prompt(list(range(40 + i, 44 + 5 * i)), None, f"row {i}", i) for i in range(5)]


def drawn(logits: torch.Tensor, sampling: Sampling, count: int = 20_000) -> torch.Tensor:
    """How often each token is drawn."""
    uniform = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = draw(logits.expand(count, -1), uniform, sampling)
    return torch.bincount(tokens, minlength=logits.shape[-1]) / count


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1.0), [0, 1, 2, 3, 4]),
        (Sampling(0.5), [0, 1, 2, 3, 4]),
        (Sampling(1.0, top_k=2), [1, 3]),
        (Sampling(1.0, top_p=0.6), [1, 3]),
        (Sampling(1.0, top_p=0.1), [3]),
        (Sampling(2.0, top_p=0.9, top_k=3), [1, 2, 3]),
        (Sampling(1.0, top_k=99), [0, 1, 2, 3, 4]),
    ],
)
def test_tokens_are_drawn_with_the_probabilities_of_those_that_are_left(sampling: Sampling, kept: list[int]) -> None:
    logits = torch.tensor([-1.0, 1.0, 0.5, 1.7, -3.0])
    wanted = torch.zeros(5)
    wanted[kept] = (logits[kept] / sampling.temperature).softmax(-1)
    assert torch.allclose(drawn(logits, sampling), wanted, atol=0.012)
    assert drawn(logits, sampling)[[i for i in range(5) if i not in kept]].sum() == 0


def test_the_ends_of_the_interval_are_tokens_that_are_left() -> None:
    logits = torch.tensor([[-1.0, 1.0, 0.5, 1.7, -3.0]])
    for u, token in ((0.0, 1), (1.0 - 1e-16, 3)):
        assert draw(logits, torch.tensor([u], dtype=torch.float64), Sampling(1.0, top_k=2)).item() == token


def predictions(model: Any, prompts: list[Prompt], sampling: Sampling) -> dict[str, str]:
    rows = answers(model, PromptBatch(prompts, tiny_tokenizer()), 12, sampling)
    return {row["source"]: row["prediction"] for row in rows}


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_an_answer_does_not_depend_on_the_rows_beside_it(temperature: float) -> None:
    model, sampling = tiny_model().eval(), Sampling(temperature, top_p=0.95, seed=3)
    together = predictions(model, PROMPTS, sampling)
    torch.manual_seed(5)
    apart = {k: v for prompt in PROMPTS for k, v in predictions(model, [prompt], sampling).items()}
    assert together == apart == predictions(model, PROMPTS[::-1], sampling)


def test_rows_and_seeds_draw_differently_and_plain_generate_agrees_where_nothing_is_drawn() -> None:
    model, same = tiny_model().eval(), [Prompt([40, 41], None, f"row {i}", i) for i in range(6)]
    first, second = (predictions(model, same, Sampling(1.0, seed=seed)) for seed in (0, 1))
    assert len(set(first.values())) > 3
    assert first != second
    greedy = predictions(model, same, Sampling())
    [plain] = model.generate(torch.tensor([[40, 41]]), max_new_tokens=12, do_sample=False, eos_token_id=257)
    assert Counter(greedy.values()) == {tiny_tokenizer().decode(plain[2:], skip_special_tokens=True): 6}


def test_what_the_model_was_published_with_does_not_change_how_tokens_are_chosen() -> None:
    model = tiny_model().eval()
    plain = predictions(model, PROMPTS, Sampling())
    model.generation_config.repetition_penalty, model.generation_config.num_beams = 5.0, 3
    assert predictions(model, PROMPTS, Sampling()) == plain


def test_a_temperature_that_is_no_temperature_is_refused() -> None:
    with pytest.raises(InputError, match=r"Sampling.temperature is -1; expected a number >= 0"):
        Sampling(-1)
    with pytest.raises(InputError, match=r"Sampling.top_p is 0; expected a number > 0 and <= 1"):
        Sampling(1.0, top_p=0)


def test_answers_in_a_training_are_those_of_predict_and_change_nothing_about_it(
    pretrained: str, quiet_trainer: Any, rows: list[dict[str, str]]
) -> None:
    sampling = Sampling(0.8, seed=2)

    class Asking(SFTModule):
        def on_train_start(self) -> None:
            super().on_train_start()
            data, modes = self.trainer.datamodule, [part.training for part in self.modules()]
            self.found = answer_all(self, data.prompts_of("train"), data.tokenizer, 5, 4)
            assert [part.training for part in self.modules()] == modes

    def fit(kind: type[SFTModule]) -> tuple[Trainer, Any]:
        trainer, module = quiet_trainer(max_steps=2), kind(pretrained, sampling=sampling, max_new_tokens=4)
        trainer.fit(module, SFTDataModule(train=rows, tokens_per_batch=100))
        return trainer, module

    trainer, module = fit(Asking)
    assert trainer.callback_metrics["train/loss"] == fit(SFTModule)[0].callback_metrics["train/loss"]
    predicted = quiet_trainer().predict(
        SFTModule(pretrained, sampling=sampling, max_new_tokens=4), SFTDataModule(predict=rows)
    )
    by_source = {row["source"]: row for batch in predicted for row in batch}
    assert module.found == [by_source[f"row {i}"] for i in range(1, len(rows) + 1)]
