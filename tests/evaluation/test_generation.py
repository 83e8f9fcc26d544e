from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import SampleGenerations, ScoreAnswers
from lightning_sft.data.batches.loader import PromptBatch
from lightning_sft.demos import tiny_model, tiny_pretrained, tiny_tokenizer
from lightning_sft.evaluation.generation import Sampling, answer_all, answers, draw
from lightning_sft.model.limits import num_positions
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


@pytest.mark.parametrize(
    "published",
    [
        {"repetition_penalty": 5.0, "num_beams": 3},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(0, 264, 2))},
        {"begin_suppress_tokens": list(range(0, 264, 2))},
        {"bad_words_ids": [[i] for i in range(1, 264, 2)]},
        {"sequence_bias": [[[7], 50.0]]},
        {"forced_bos_token_id": 9, "forced_eos_token_id": 8},
        {"guidance_scale": 3.0},
        {"max_time": 1e-9},
        {"max_length": 3},
        {"min_new_tokens": 12},
        {"stop_strings": ["a", "e", "i", "o", "u"]},
        {"do_sample": True, "temperature": 30.0, "top_k": 3, "num_return_sequences": 2},
        {"use_cache": False, "exponential_decay_length_penalty": (1, 9.0)},
    ],
    ids=lambda published: next(iter(published)),
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_the_model_was_published_with_does_not_change_how_tokens_are_chosen(
    published: dict[str, Any], temperature: float
) -> None:
    model, sampling = tiny_model().eval(), Sampling(temperature)
    plain = predictions(model, PROMPTS, sampling)
    for name, value in published.items():
        setattr(model.generation_config, name, value)
    before = model.generation_config.to_dict()
    assert predictions(model, PROMPTS, sampling) == plain
    assert model.generation_config.to_dict() == before


def test_an_answer_ends_with_a_stop_token_of_the_generation_config_and_nothing_stands_behind_it() -> None:
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    prompts = [Prompt([40 + i, 41], None, f"row {i}", i) for i in range(4)]
    whole = {
        f"row {i}": model.generate(torch.tensor([[40 + i, 41]]), max_new_tokens=12)[0, 2:].tolist() for i in range(4)
    }
    stop = whole["row 0"][3]
    model.generation_config.eos_token_id = [257, stop]
    ends = {name: ids.index(stop) + 1 if stop in ids else 12 for name, ids in whole.items()}
    assert len(set(ends.values())) > 1
    wanted = {name: tokenizer.decode(ids[: ends[name]], skip_special_tokens=True) for name, ids in whole.items()}
    assert predictions(model, prompts, Sampling()) == wanted


WITH_A_TABLE = ["gpt2", "opt", "gptj", "gpt_neo"]


@pytest.fixture(params=WITH_A_TABLE)
def short(request: pytest.FixtureRequest) -> Any:
    """A model of 64 positions and no more, learned or not."""
    more = {
        "opt": {"ffn_dim": 16, "word_embed_proj_dim": 16},
        "gptj": {"rotary_dim": 4},
        "gpt_neo": {"attention_types": [[["global"], 2]]},
    }
    return tiny_model(request.param, max_position_embeddings=64, **more.get(request.param, {})).eval()


def test_an_answer_has_as_many_tokens_as_there_are_positions_left_for_it(short: Any) -> None:
    assert num_positions(short) == 64
    prompts = [Prompt([5 + i] * length, None, f"row {i}", i) for i, length in enumerate((4, 60, 63))]
    short.generation_config.eos_token_id = None
    found = predictions(short, prompts, Sampling())
    [plain] = short.generate(torch.tensor([[5] * 4]), max_new_tokens=12, do_sample=False)
    assert found["row 0"] == tiny_tokenizer().decode(plain[4:], skip_special_tokens=True)
    assert found == {k: v for prompt in prompts for k, v in predictions(short, [prompt], Sampling()).items()}


def test_prompts_that_leave_no_position_are_named(short: Any) -> None:
    prompts = [Prompt([5] * length, None, f"train.jsonl:{length}", 0) for length in (4, 64, 90)]
    with pytest.raises(InputError, match=r"train.jsonl:64: the prompt has 64 tokens, as have 1 more .* 64 positions"):
        predictions(short, prompts, Sampling())


def test_rotary_positions_have_no_end() -> None:
    model = tiny_model(max_position_embeddings=16).eval()
    assert num_positions(model) is None
    assert len(predictions(model, [Prompt([5] * 20, None, "row", 0)], Sampling())) == 1


@pytest.mark.parametrize("kind", ["samples", "texts", "scores", "predict", "fit", "fit of a stream"])
def test_beyond_the_positions_a_run_ends_before_its_first_step(kind: str, quiet_trainer: Any, tmp_path: Path) -> None:
    folder = tiny_pretrained(tmp_path, "gpt2", max_position_embeddings=64)
    long, fits = {"prompt": "x" * 90, "completion": "y"}, {"prompt": "x", "completion": "y"}
    asked: dict[str, Any] = {"samples": 2, "texts": ["x" * 90]}
    callbacks = [SampleGenerations(asked[kind])] if kind in asked else [ScoreAnswers()] if kind == "scores" else []
    rows = [fits, long]
    splits: dict[str, Any] = {"train": [fits], "val": rows, "test": rows, "predict": rows}
    if kind.startswith("fit"):
        splits |= {"train": rows, "max_length": 200, "streaming": kind != "fit"}
    module, data = SFTModule(folder), SFTDataModule(**splits, cache=None)
    trainer = quiet_trainer(callbacks=callbacks, max_steps=2, limit_val_batches=0)
    run = {"scores": trainer.test, "predict": trainer.predict}.get(kind, trainer.fit)
    message = r"but the model has 64 positions. Set data.max_length=64" if kind.startswith("fit") else "the prompt has"
    with pytest.raises(InputError, match=message):
        run(module, data)
    assert trainer.global_step == 0


def test_padding_needs_no_embedding_of_its_own(quiet_trainer: Any, rows: list[dict[str, str]], tmp_path: Path) -> None:
    """A tokenizer to which somebody has added a token of padding, and a model that was not resized."""
    settings = {"vocab_size": 258, "pad_token_id": None}
    folder = tiny_pretrained(tmp_path, **settings)
    assert tiny_tokenizer().pad_token_id == 258
    losses = []
    for packing in ("packed", "padded"):
        trainer, module = quiet_trainer(max_steps=1), SFTModule(folder, max_new_tokens=3)
        how: dict[str, Any] = {"packing": packing, "cache": None}
        data = SFTDataModule(train=rows, val=rows, predict=rows, **how)
        trainer.fit(module, data)
        losses.append(trainer.callback_metrics["val/loss"].item())
        assert sum(map(len, trainer.predict(module, data))) == len(rows)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_prompts_of_another_tokenizer_are_refused(quiet_trainer: Any, pretrained: str, tmp_path: Path) -> None:
    small = tiny_pretrained(tmp_path, vocab_size=100, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    with pytest.raises(InputError, match=r"data.predict has the token id 25\d, but the model has embeddings for 100"):
        quiet_trainer().predict(SFTModule(small), SFTDataModule(predict=[{"prompt": "x"}], tokenizer=pretrained))


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
