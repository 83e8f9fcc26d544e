from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_sft import SFTDataModule, SFTModule, datamodule
from lightning_sft.demos import CHATML, tiny_pretrained, tiny_tokenizer
from lightning_sft.training.checks import check_ids, keeps_documents_apart
from lightning_sft.types import InputError

ROWS = [{"prompt": f"Say {i}", "completion": f"{i} it is"} for i in range(12)]

Make = Callable[..., Trainer]


def weights(data: SFTDataModule) -> list[float]:
    return [weight for example in data.splits["train"].examples for weight in example.target_weights if weight]


def test_a_data_module_that_is_used_again_plans_for_the_new_trainer(
    pretrained: str, quiet_trainer: Make, rows: list[dict[str, str]]
) -> None:
    data = SFTDataModule(train=rows, tokens_per_batch=100)
    for accumulate in (1, 2, 3):
        trainer = quiet_trainer(accumulate_grad_batches=accumulate)
        trainer.fit(SFTModule(pretrained), data)
        assert data.train_dataloader().plan.accumulate == accumulate
        assert trainer.global_step == data.steps_per_epoch


def test_and_encodes_anew_for_another_model_or_normalization_but_not_for_the_same(
    pretrained: str, tmp_path: Path, quiet_trainer: Make, rows: list[dict[str, str]]
) -> None:
    data = SFTDataModule(train=rows)
    quiet_trainer().fit(SFTModule(pretrained), data)
    first, examples = data.splits["train"], weights(data)
    quiet_trainer().fit(SFTModule(pretrained), data)
    assert data.splits["train"] is first
    quiet_trainer().fit(SFTModule(pretrained, normalize="sequence"), data)
    assert sum(weights(data)) < sum(examples)
    other = tiny_pretrained(tmp_path / "other")
    tiny_tokenizer("x" + CHATML).save_pretrained(other)
    quiet_trainer().fit(SFTModule(other), data)
    assert data.splits["train"].lengths.sum() > first.lengths.sum()


def test_padding_for_a_model_that_leaks_does_not_stay_for_one_that_does_not(
    pretrained: str, tmp_path: Path, quiet_trainer: Make, rows: list[dict[str, str]]
) -> None:
    leaky = tiny_pretrained(tmp_path / "bloom", "bloom")
    data = SFTDataModule(train=rows)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet_trainer(max_steps=1).fit(SFTModule(leaky), data)
    assert data.packing == "padded"
    quiet_trainer(max_steps=1).fit(SFTModule(pretrained), data)
    assert data.packing == "packed"


@pytest.mark.parametrize(("max_steps", "num_rows"), [(1, 8), (-1, 14)])
def test_a_stream_says_what_it_left_out_also_when_the_training_ends_first(
    pretrained: str,
    quiet_trainer: Make,
    rows: list[dict[str, str]],
    capsys: pytest.CaptureFixture[str],
    max_steps: int,
    num_rows: int,
) -> None:
    bad = {"prompt": "a", "completion": 7}
    data = SFTDataModule(train=[bad, *rows, bad], streaming=True, buffer_rows=4, invalid_rows="skip")
    quiet_trainer(max_steps=max_steps).fit(SFTModule(pretrained, schedule="constant"), data)
    said = capsys.readouterr().out
    assert said.count("Read of the stream") == 1
    assert f"Read of the stream: {num_rows} rows" in said
    assert f"of {num_rows} rows cannot be used" in said


@pytest.mark.parametrize("streaming", [False, True])
def test_packs_that_are_filled_up_as_on_a_gpu_give_the_same_figures(
    pretrained: str,
    monkeypatch: pytest.MonkeyPatch,
    quiet_trainer: Make,
    rows: list[dict[str, str]],
    streaming: bool,
) -> None:
    figures, shapes = [], set()
    for full in (False, True):
        monkeypatch.setattr(datamodule, "on_cuda", lambda trainer, full=full: full)
        data = SFTDataModule(train=rows, val=rows, tokens_per_batch=100, streaming=streaming)
        trainer = quiet_trainer(max_steps=3, val_check_interval=1)
        trainer.fit(SFTModule(pretrained), data)
        figures.append(trainer.callback_metrics)
        if full:
            batches = [*trainer.train_dataloader, *trainer.val_dataloaders]
            shapes = {batch.input_ids.shape for batch in batches}
    assert shapes == {(1, 100)}
    for name in ("train/loss", "train/tokens_seen", "train/targets_seen", "val/loss", "val/loss_position/1"):
        torch.testing.assert_close(figures[1][name], figures[0][name], rtol=1e-5, atol=1e-6)


def test_ids_without_an_embedding_are_refused_where_the_module_says_how_many_it_has() -> None:
    check_ids(SimpleNamespace(num_embeddings=8), "train", 7, "a")
    check_ids(SimpleNamespace(), "train", 8, "a")
    check_ids(None, "train", 8, "a")
    with pytest.raises(InputError, match=r"data.val has the token id 8, but the model has embeddings for 8"):
        check_ids(SimpleNamespace(num_embeddings=8), "val", 8, "a")


def test_documents_are_packed_where_nothing_speaks_against_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert keeps_documents_apart(None)
        assert keeps_documents_apart(SimpleNamespace(isolates_documents=True))
    with pytest.warns(UserWarning, match="does not say"):
        assert keeps_documents_apart(SimpleNamespace())
    with pytest.warns(UserWarning, match="see each other"):
        assert not keeps_documents_apart(SimpleNamespace(isolates_documents=False))


@pytest.mark.parametrize("name", ["train", "val", "test", "predict"])
@pytest.mark.parametrize("streaming", [False, True])
def test_loaders_of_data_that_have_not_been_read_say_what_to_pass(pretrained: str, name: str, streaming: bool) -> None:
    data = SFTDataModule(ROWS, ROWS, ROWS, ROWS, tokenizer=pretrained, cache=None, streaming=streaming)
    loader = getattr(data, f"{name}_dataloader")
    with pytest.raises(InputError, match=r"not been read\. .*fit\(module, datamodule=data\), not its loaders"):
        loader()
    data.setup("validate" if name in ("train", "test") else "test")
    if name != "predict":
        with pytest.raises(InputError, match="have not been read"):
            loader()
    data.setup({"train": "fit", "val": "validate"}.get(name, name))
    assert len(list(loader())) > 0


@pytest.mark.parametrize(("verb", "word"), [("validate", "validation"), ("test", "test"), ("fit", "training")])
def test_a_verb_without_its_data_says_which(pretrained: str, quiet_trainer: Any, verb: str, word: str) -> None:
    data = SFTDataModule(val=None if verb == "validate" else ROWS, cache=None)
    name = {"validate": "val", "fit": "train"}.get(verb, verb)
    with pytest.raises(InputError, match=rf"There is no {word} data: set data\.{name} to"):
        getattr(quiet_trainer(), verb)(SFTModule(pretrained), data)


def test_a_share_of_the_training_data_can_be_validated(pretrained: str, quiet_trainer: Any) -> None:
    data = SFTDataModule([{**row, "prompt": f"{row['prompt']} {i}"} for row in ROWS for i in range(9)], val="30%")
    [metrics] = quiet_trainer().validate(SFTModule(pretrained), data, verbose=False)
    assert metrics["val/loss"] > 0
