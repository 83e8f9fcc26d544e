from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.data.batches.collate import collate
from lightning_sft.demos import tiny_pretrained
from lightning_sft.training.schedules import learning_rate_factor
from lightning_sft.types import IGNORE, Batch, InputError, LogLikelihood

Make = Callable[..., Trainer]


class Losses(Callback):
    """Every logged figure of every step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.rows.append({key: value.item() for key, value in trainer.callback_metrics.items()})


def test_twenty_steps_of_adamw_follow_transformers_own_loss(
    pretrained: str, quiet_trainer: Make, rows: list[dict[str, str]]
) -> None:
    losses = Losses()
    module = SFTModule(
        pretrained,
        optimizer=lambda groups: AdamW(groups, lr=1e-2, weight_decay=0.0),
        schedule="constant",
        warmup=0.0,
    )
    data = SFTDataModule(train=rows * 2, packing="padded", tokens_per_batch=200)
    trainer = quiet_trainer(max_steps=20, max_epochs=-1, callbacks=[losses])
    trainer.fit(module, data)
    peer = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32).train()
    optimizer = AdamW(peer.parameters(), lr=1e-2, weight_decay=0.0)
    wanted, epoch = [], 0
    while len(wanted) < 20:
        for micro in data.planned("train").plan.micro_batches(epoch, 0):
            batch = collate([data.splits["train"].examples[i] for i in micro.examples], packed=False)
            labels = torch.full_like(batch.labels, IGNORE)
            labels[:, 1:] = batch.labels[:, :-1]  # transformers shifts by itself
            loss = peer(input_ids=batch.input_ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            wanted.append(loss.item())
        epoch += 1
    got = [row["train/loss"] for row in losses.rows]
    assert len(got) == 20
    assert got == pytest.approx(wanted[:20], rel=2e-5)
    assert got[-1] < got[0] - 0.5


def test_dropout_and_checkpointing_are_on_in_training_and_off_in_validation(
    tmp_path: Path, quiet_trainer: Make, rows: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrained = tiny_pretrained(tmp_path / "dropping", attention_dropout=0.5)
    seen: dict[str, list[Any]] = {"train": [], "val": []}

    class Spy(SFTModule):
        def forward(self, batch: Batch) -> LogLikelihood:
            first, second = super().forward(batch), super().forward(batch)
            stage = "train" if torch.is_grad_enabled() else "val"
            seen[stage].append((self.training, bool(torch.equal(first.log_probs, second.log_probs))))
            return second

    computed, begun, again = [0], [0], []
    original = LlamaMLP.forward

    def spy(self: LlamaMLP, x: Tensor) -> Tensor:
        computed[0] += 1
        return original(self, x)

    class Backward(Callback):
        def on_before_backward(self, *_: Any) -> None:
            begun[0] = computed[0]

        def on_after_backward(self, *_: Any) -> None:
            again.append(computed[0] - begun[0])

    monkeypatch.setattr(LlamaMLP, "forward", spy)
    module = Spy(pretrained, gradient_checkpointing=True)
    quiet_trainer(callbacks=[Backward()]).fit(module, SFTDataModule(train=rows, val=rows))
    assert seen["train"]
    assert set(seen["train"]) == {(True, False)}  # in training mode, and two passes differ
    assert set(seen["val"]) == {(False, True)}
    assert module.scorer is not None
    assert set(again) == {module.scorer.model.config.num_hidden_layers}  # each layer once


def test_gradient_checkpointing_changes_no_gradient(pretrained: str, rows: list[dict[str, str]]) -> None:
    gradients = []
    for on in (False, True):
        module = SFTModule(pretrained, gradient_checkpointing=on)
        module.configure_model()
        data = SFTDataModule(train=rows, tokenizer=pretrained)
        data.setup("fit")
        module(collate(data.splits["train"].examples)).total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)


def test_figures_of_validation_are_those_of_the_corpus(
    pretrained: str, quiet_trainer: Make, rows: list[dict[str, str]]
) -> None:
    results = []
    for settings in ({"tokens_per_batch": 100}, {"tokens_per_batch": 4000}, {"packing": "padded"}):
        module = SFTModule(pretrained)
        [figures] = quiet_trainer().validate(module, SFTDataModule(val=rows, **settings), verbose=False)
        results.append(figures)
    for figures in results:
        assert figures == pytest.approx(results[0], rel=1e-5)
        assert figures["val/perplexity"] == pytest.approx(math.exp(figures["val/loss"]), rel=1e-5)


def test_the_training_figure_is_the_token_weighted_mean_of_the_whole_step(
    pretrained: str, quiet_trainer: Make, rows: list[dict[str, str]]
) -> None:
    rows = [{"prompt": "a", "completion": "b" * (1 + 5 * i)} for i in range(8)]
    losses = Losses()
    trainer = quiet_trainer(accumulate_grad_batches=8, callbacks=[losses])
    module = SFTModule(pretrained, optimizer=lambda groups: SGD(groups, lr=0.0))
    trainer.fit(module, SFTDataModule(train=rows, tokens_per_batch=100))
    [figures] = quiet_trainer().validate(SFTModule(pretrained), SFTDataModule(val=rows), verbose=False)
    assert losses.rows[-1]["train/loss"] == pytest.approx(figures["val/loss"], rel=1e-5)


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_loss_that_is_no_number_stops_before_the_update_and_names_the_row(
    pretrained: str, quiet_trainer: Make, jsonl: Any, stage: str
) -> None:
    module = SFTModule(pretrained, optimizer=lambda groups: SGD(groups, lr=1.0))
    module.configure_model()
    assert module.model is not None
    poison = ord("~") - 33  # a byte that only one row has
    module.model.get_input_embeddings().weight.data[poison] = torch.nan
    before = [p.clone() for p in module.parameters()]
    path = jsonl([{"prompt": "fine", "completion": "ok"}, {"prompt": "bad ~", "completion": "ok"}])
    data = SFTDataModule(train=path, val=path)
    with pytest.raises(FloatingPointError, match=rf"Samples: {path}:2\. Nothing was updated"):
        getattr(quiet_trainer(num_sanity_val_steps=0), stage)(module, data)
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before, module.parameters(), strict=True))


def test_norms_and_biases_are_not_decayed(pretrained: str, quiet_trainer: Make, rows: list[dict[str, str]]) -> None:
    module = SFTModule(pretrained)
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, SFTDataModule(train=rows))
    decayed, kept = trainer.optimizers[0].param_groups
    assert decayed["weight_decay"] > 0
    assert kept["weight_decay"] == 0
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in kept["params"]} == {1}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(module.parameters()))


def test_the_learning_rate_follows_the_schedule_over_all_planned_steps(
    pretrained: str, quiet_trainer: Make, rows: list[dict[str, str]]
) -> None:
    losses = Losses()
    module = SFTModule(pretrained, optimizer=lambda groups: SGD(groups, lr=0.5), warmup=0.25)
    data = SFTDataModule(train=rows, tokens_per_batch=150)
    quiet_trainer(max_epochs=2, callbacks=[losses]).fit(module, data)
    total = 2 * data.steps_per_epoch
    assert [row["lr"] for row in losses.rows] == pytest.approx(
        [0.5 * learning_rate_factor(step, total, "cosine", 0.25) for step in range(total)]
    )


def test_fused_adamw_can_be_clipped_in_mixed_precision(
    pretrained: str, quiet_trainer: Make, rows: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_sft.module.warn_if_bfloat16_is_slow", lambda: None)
    trainer = quiet_trainer(precision="bf16-mixed", gradient_clip_val=1.0, max_epochs=2)
    trainer.fit(SFTModule(pretrained), SFTDataModule(train=rows))
    assert trainer.global_step == 2
    assert trainer.optimizers[0].defaults["fused"] is True


@pytest.fixture
def checkpoint(tmp_path: Path, quiet_trainer: Make, rows: list[dict[str, str]]) -> tuple[str, SFTModule]:
    pretrained = tiny_pretrained(tmp_path / "gone")
    module = SFTModule(pretrained, optimizer=lambda groups: SGD(groups, lr=0.1))
    saver = ModelCheckpoint(tmp_path / "saved")
    quiet_trainer(max_epochs=1, enable_checkpointing=True, callbacks=[saver]).fit(module, SFTDataModule(train=rows))
    for path in Path(pretrained).iterdir():
        path.unlink()
    return saver.best_model_path, module


def test_a_checkpoint_loads_although_the_pretrained_model_is_gone(checkpoint: tuple[str, SFTModule]) -> None:
    path, module = checkpoint
    again = SFTModule.load_from_checkpoint(path, weights_only=True)
    assert again.state_dict().keys() == module.state_dict().keys()
    for ours, theirs in zip(again.state_dict().values(), module.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_is_plain_and_knows_its_tokenizer(checkpoint: tuple[str, SFTModule]) -> None:
    saved = torch.load(checkpoint[0], weights_only=True)
    assert json.dumps(saved["hyper_parameters"])
    assert saved["SFTDataModule"]["chat_template"]
    assert saved["SFTDataModule"]["tokenizer"].endswith("gone")


@pytest.mark.parametrize("stream", [{}, {"streaming": True, "buffer_rows": 5}])
def test_a_run_goes_on_where_its_checkpoint_was_taken(
    pretrained: str, quiet_trainer: Make, rows: list[dict[str, str]], tmp_path: Path, stream: dict[str, Any]
) -> None:
    """In the middle of an epoch: the same rows in the same order, the same losses to the bit."""

    def fit(max_steps: int, ckpt_path: str | None = None, **settings: Any) -> list[float]:
        losses = Losses()
        callbacks = [losses, ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)]
        settings = {"enable_checkpointing": True, "max_epochs": 3, "accumulate_grad_batches": 2, **settings}
        trainer = quiet_trainer(max_steps=max_steps, callbacks=callbacks, **settings)
        module = SFTModule(pretrained, schedule="constant", optimizer=lambda groups: SGD(groups, lr=0.1))
        trainer.fit(module, SFTDataModule(train=rows, tokens_per_batch=60, **stream), ckpt_path=ckpt_path)
        return [row["train/loss"] for row in losses.rows[1::2]]

    whole = fit(9)
    [first] = [path for path in tmp_path.glob("*.ckpt") if "step=3" in path.name]
    assert fit(9, str(first)) == whole[3:]


@pytest.mark.parametrize("stream", [{}, {"streaming": True}])
def test_overfit_batches_limits_an_epoch_and_the_step_it_cuts_is_exact(
    pretrained: str, quiet_trainer: Make, rows: list[dict[str, str]], stream: dict[str, Any]
) -> None:
    batches: list[Batch] = []

    class Spy(SFTModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            batches.append(batch)
            return super().training_step(batch, batch_idx)

    trainer = quiet_trainer(overfit_batches=1, max_epochs=3, accumulate_grad_batches=2)
    trainer.fit(Spy(pretrained, schedule="constant"), SFTDataModule(train=rows, tokens_per_batch=60, **stream))
    assert trainer.global_step == len(batches) == 3
    assert [batch.normalizer for batch in batches] == [batch.target_weights.sum().item() for batch in batches]


def test_batches_of_a_user_cannot_be_normalized_by_sequence(pretrained: str, quiet_trainer: Make) -> None:
    batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[1, 2]])}
    with pytest.raises(InputError, match=r"model.normalize=sequence needs batches of SFTDataModule"):
        quiet_trainer(max_steps=1).fit(
            SFTModule(pretrained, normalize="sequence"), DataLoader([batch], batch_size=None)
        )


@pytest.mark.parametrize("chunk_size", [0, -1, 1.5, "many"])
def test_a_chunk_size_that_is_none_is_refused_before_a_model_is_looked_for(chunk_size: Any) -> None:
    with pytest.raises(InputError, match=r"model.chunk_size is .*; expected an integer >= 1 or null"):
        SFTModule("nowhere", chunk_size=chunk_size)


def test_a_schedule_without_an_end_is_refused(pretrained: str, quiet_trainer: Make, rows: list[dict[str, str]]) -> None:
    with pytest.raises(InputError, match=r"needs an end"):
        quiet_trainer(max_epochs=-1).fit(SFTModule(pretrained), SFTDataModule(train=rows))
    with pytest.raises(InputError, match=r"trainer.limit_train_batches=0.01 leaves no micro-batch of an epoch"):
        quiet_trainer(limit_train_batches=0.01).fit(SFTModule(pretrained), SFTDataModule(train=rows))


def test_where_documents_would_see_each_other_they_are_padded_with_a_warning(
    tmp_path: Path, quiet_trainer: Make, rows: list[dict[str, str]]
) -> None:
    leaky = tiny_pretrained(tmp_path / "bloom", "bloom")
    data = SFTDataModule(train=rows)
    with pytest.warns(UserWarning, match=r"see each other"):
        quiet_trainer(max_steps=1).fit(SFTModule(leaky), data)
    assert data.packing == "padded"


def test_a_packed_batch_for_a_model_that_leaks_is_refused(tmp_path: Path, quiet_trainer: Make) -> None:
    leaky = tiny_pretrained(tmp_path / "bloom", "bloom")
    ids = torch.tensor([[1, 2, 3, 4]])
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[0, 1, 0, 1]])}
    with pytest.raises(InputError, match=r"they attend to each other"):
        quiet_trainer(max_steps=1).fit(SFTModule(leaky), DataLoader([batch], batch_size=None))


@pytest.mark.parametrize(("of_model", "stops"), [(None, [257]), (7, [7, 257]), ([257, 9], [9, 257])])
def test_an_answer_ends_with_the_stop_token_that_training_teaches(
    pretrained: str, quiet_trainer: Make, monkeypatch: pytest.MonkeyPatch, of_model: Any, stops: list[int]
) -> None:
    module, asked = SFTModule(pretrained, max_new_tokens=2), []
    module.configure_model()
    assert module.model is not None
    module.model.generation_config.eos_token_id = of_model
    generate = module.model.generate

    def record(**given: Any) -> Any:
        asked.append(module.model.generation_config.eos_token_id)
        return generate(**given)

    monkeypatch.setattr(module.model, "generate", record)
    data = SFTDataModule(predict=[{"prompt": "a"}])
    quiet_trainer().predict(module, data)
    assert data.tokenizer.convert_ids_to_tokens(257) == "<|im_end|>"
    assert asked == [stops]
    assert module.model.generation_config.eos_token_id == of_model


def test_a_fine_tuned_model_without_an_eos_of_its_own_stops_after_its_answer(
    tmp_path: Path, quiet_trainer: Make
) -> None:
    base = tiny_pretrained(tmp_path / "base", eos_token_id=None)
    rows = [{"prompt": "Hi", "completion": "Yo"}]
    module = SFTModule(
        base,
        optimizer=lambda groups: AdamW(groups, lr=2e-2),
        schedule="constant",
        warmup=0.0,
        max_new_tokens=12,
    )
    quiet_trainer(max_epochs=60).fit(module, SFTDataModule(train=rows))
    assert module.model is not None
    assert module.model.generation_config.eos_token_id is None
    [[answer]] = quiet_trainer().predict(module, SFTDataModule(predict=rows)) or []
    assert answer["prediction"] == "Yo"


def test_greedy_answers_come_in_the_order_of_the_rows(pretrained: str, quiet_trainer: Make) -> None:
    rows = [{"prompt": "a" * n, "completion": "x"} for n in (3, 9, 1)] + [{"prompt": "no answer"}]
    data = SFTDataModule(predict=rows, predict_batch_size=3)
    module = SFTModule(pretrained, max_new_tokens=3)
    batches = quiet_trainer().predict(module, data)
    answers = [row for batch in batches or [] for row in batch]
    assert [a["source"] for a in answers] == ["row 1", "row 2", "row 3", "row 4"]
    assert [a["reference"] for a in answers] == ["x", "x", "x", None]
    assert module.model is not None
    tokenizer = data.tokenizer
    for row, answer in zip(rows, answers, strict=True):  # padding on the left changes no answer
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        alone = module.model.generate(**ids, max_new_tokens=3, do_sample=False, use_cache=True, pad_token_id=258)
        assert answer["prediction"] == tokenizer.decode(alone[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_module_within_another_one_is_refused(pretrained: str, quiet_trainer: Any) -> None:
    class Outer(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = SFTModule(pretrained)

        def configure_model(self) -> None:
            self.inner.configure_model()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.inner.training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1.0)

    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[-100, 6, 7]])}
    with pytest.raises(InputError, match=r"SFTModule is part of Outer, whose step Lightning completes: .* by itself"):
        quiet_trainer(max_steps=1).fit(Outer(), DataLoader([batch], batch_size=None))


def test_manual_optimization_is_refused_unless_the_step_is_the_users_own(pretrained: str, quiet_trainer: Any) -> None:
    class Manual(SFTModule):
        def __init__(self, pretrained: str) -> None:
            super().__init__(pretrained)
            self.automatic_optimization = False

    class Own(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            self.manual_backward(-self(batch).total)
            optimizer.step()

    data = SFTDataModule(train=[{"prompt": "a", "completion": "b"}])
    with pytest.raises(InputError, match=r"Manual.automatic_optimization is False, .* write a training_step of"):
        quiet_trainer(max_steps=1).fit(Manual(pretrained), data)
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(Own(pretrained), data)
    assert trainer.global_step == 1
