"""New tokens: their rows begin at the mean, are trained, alone if need be, and come back exactly."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.data.batches.collate import collate
from lightning_sft.demos import tiny_model, tiny_pretrained, tiny_tokenizer
from lightning_sft.main import main
from lightning_sft.model.tuning.adapters import Lora
from lightning_sft.types import Example, InputError
from tests.helpers.gradients import ROWS

NAMES = [f"<|{i}|>" for i in range(8)]  # the tiny tokenizer has 259 tokens, the tiny model 264 rows
IDS = list(range(259, 267))
LORA = pytest.mark.parametrize("lora", [None, Lora(r=4)], ids=["full", "lora"])
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


# turns begin and end with new tokens; a text that has one in it is refused
TEMPLATE = (
    "{% for m in messages %}{{ ('<|0|>' if m['role'] == 'user' else '<|1|>') + m['content'] + '<|2|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|1|>' }}{% endif %}"
)


@pytest.fixture
def template(tmp_path: Path) -> str:
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATE)
    return str(path)


def module_of(pretrained: str, lora: Lora | None = None, **settings: Any) -> Any:
    module = SFTModule(pretrained, lora=lora, new_tokens=NAMES, **settings)
    module.configure_model()
    return module


@LORA
@TIED
def test_rows_begin_at_the_mean_and_others_do_not_change(tmp_path: Path, lora: Any, tied: bool) -> None:
    pretrained = tiny_pretrained(tmp_path, tie_word_embeddings=tied)
    before = AutoModelForCausalLM.from_pretrained(pretrained)
    model = module_of(pretrained, lora).model
    assert model.config.vocab_size == 267
    assert module_of(pretrained, lora).num_embeddings == 267
    for name in ("get_input_embeddings", "get_output_embeddings"):
        new, old = getattr(model, name)().weight, getattr(before, name)().weight
        assert torch.equal(new[:259], old[:259])
        assert torch.allclose(new[IDS], old[:259].mean(0).expand(8, -1), atol=1e-7)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


@TIED
def test_gradients_of_new_rows_are_those_of_the_whole_matrix(tmp_path: Path, tied: bool) -> None:
    pretrained = tiny_pretrained(tmp_path, tie_word_embeddings=tied)
    example = Example([5, 259, 260, 7, 261, 259, 9], [0, 1.0, 2.0, 0, 1.0, 1.0, 1.0])
    alone, whole = module_of(pretrained, Lora()), module_of(pretrained)
    for module in (alone, whole):
        module(collate([example])).total.backward()
    for name in ("get_input_embeddings", "get_output_embeddings"):
        rows, matrix = getattr(alone.model, name)(), getattr(whole.model, name)()
        assert matrix.weight.grad[IDS].abs().max() > 1e-3
        assert torch.allclose(rows.new_rows.grad, matrix.weight.grad[IDS], atol=1e-6)
        assert rows.weight.grad is None


def test_scaled_embeddings_scale_new_rows_too(tmp_path: Path) -> None:
    pretrained = tiny_pretrained(tmp_path, "gemma3_text", sliding_window=8)
    module = module_of(pretrained, Lora())
    embeddings = module.model.get_input_embeddings()
    assert embeddings.embed_scale == 4.0
    found = embeddings(torch.tensor([[259, 3]]))
    assert torch.allclose(found[0, 0], embeddings.new_rows[0] * 4.0)


def test_embeddings_that_do_more_are_refused(pretrained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.nn.Embedding.forward
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda self, ids: plain(self, ids) + 1)
    with pytest.raises(InputError, match="more than a lookup table"):
        module_of(pretrained, Lora())


def test_adapters_on_the_same_matrices_are_refused(pretrained: str) -> None:
    for target in ("embed_tokens", "lm_head"):
        with pytest.raises(InputError, match="which cannot have adapters as well"):
            module_of(pretrained, Lora(targets=[target, "q_proj"]))


def test_tokens_that_are_known_keep_their_rows(pretrained: str) -> None:
    before = AutoModelForCausalLM.from_pretrained(pretrained).lm_head.weight
    module = SFTModule(pretrained, lora=Lora(), new_tokens=["<|im_end|>", "<|0|>"])
    module.configure_model()
    rows = module.model.lm_head.new_rows
    assert module.model.lm_head.new_ids.tolist() == [257, 259]
    assert torch.equal(rows[0], before[257])
    assert torch.allclose(rows[1], before[:259].mean(0), atol=1e-7)


@LORA
@TIED
def test_a_run_with_new_tokens_saves_and_exports_them_exactly(
    tmp_path: Path, lora: Any, tied: bool, quiet_trainer: Callable[..., Trainer], jsonl: Any, template: str
) -> None:
    pretrained = tiny_pretrained(tmp_path / "base", tie_word_embeddings=tied)
    rows = jsonl(ROWS)
    module = SFTModule(pretrained, lora=lora, new_tokens=NAMES, optimizer=partial(AdamW, lr=1e-2), warmup=0.0)
    data = SFTDataModule(train=rows, tokens_per_batch=200, chat_template=template)
    trainer = quiet_trainer(max_steps=3, max_epochs=-1, enable_checkpointing=True)
    trainer.fit(module, data)
    examples = data.splits["train"].examples
    assert {259, 260, 261} == {int(i) for e in examples for i in e.input_ids if i >= 256}
    assert all(e.input_ids[-1] == 261 and e.target_weights[-1] == 1 for e in examples)
    ckpt = trainer.checkpoint_callback.best_model_path
    loaded = SFTModule.load_from_checkpoint(ckpt, weights_only=True)
    state = module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    out = main(["export", "--ckpt", ckpt, "--out", str(tmp_path / "out"), "--rows", rows])
    exported, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = tokenizer("".join(NAMES) + "Say <|0|>", return_tensors="pt")["input_ids"]
    assert ids[0, :8].tolist() == IDS
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "Say "
    assert tokenizer.chat_template == TEMPLATE
    assert exported.generation_config.eos_token_id == [257, 261]
    assert torch.allclose(exported(ids).logits, module.eval().model(ids).logits, atol=1e-5)
    before = AutoModelForCausalLM.from_pretrained(pretrained).get_input_embeddings().weight
    after = exported.get_input_embeddings().weight
    assert (after[IDS[:3]] - before[:259].mean(0)).abs().max(-1).values.min() > 1e-3
    assert torch.equal(after[:259], before[:259]) == (lora is not None)


def test_a_base_model_without_a_template_is_given_one(
    tmp_path: Path, quiet_trainer: Callable[..., Trainer], jsonl: Any, template: str
) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer(None).save_pretrained(tmp_path / "base")
    module = SFTModule(str(tmp_path / "base"), lora=Lora(r=4), new_tokens=NAMES[:3])
    trainer = quiet_trainer(max_steps=1, enable_checkpointing=True)
    trainer.fit(module, SFTDataModule(train=ROWS, chat_template=template))
    ckpt = trainer.checkpoint_callback.best_model_path
    out = main(["export", "--ckpt", ckpt, "--out", str(tmp_path / "out"), "--rows", jsonl(ROWS)])
    asked = AutoTokenizer.from_pretrained(out).apply_chat_template(
        [{"role": "user", "content": "a"}], add_generation_prompt=True, return_dict=False
    )
    assert [asked[0], asked[-2], asked[-1]] == [259, 261, 260]


def test_another_tokenizer_is_refused(pretrained: str, quiet_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    other = tiny_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"added to the tokenizer of the model, but data\.tokenizer="):
        quiet_trainer().fit(SFTModule(pretrained, new_tokens=NAMES), SFTDataModule(train=ROWS, tokenizer=other))


def test_rows_encoded_without_the_tokens_are_not_taken_from_the_cache(
    pretrained: str, quiet_trainer: Callable[..., Trainer], jsonl: Any, tmp_path: Path
) -> None:
    rows = jsonl([{"prompt": "Say", "completion": "yes <|0|>"}])  # as plain bytes, or refused
    settings = {"train": rows, "cache": str(tmp_path / "cache"), "control_tokens": "refuse"}
    quiet_trainer(max_steps=1).fit(SFTModule(pretrained), SFTDataModule(**settings))
    with pytest.raises(InputError, match="contains the control token"):
        quiet_trainer(max_steps=1).fit(SFTModule(pretrained, new_tokens=NAMES[:1]), SFTDataModule(**settings))
