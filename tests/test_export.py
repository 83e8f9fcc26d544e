from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_sft.demos import tiny_tokenizer
from lightning_sft.export import export
from lightning_sft.pretrained import load_model
from lightning_sft.types import InputError


def test_plain_transformers_loads_it_with_equal_logits_and_the_chat_template(pretrained: str, tmp_path: Path) -> None:
    model, tokenizer = load_model(pretrained), tiny_tokenizer("{{ messages }}")
    out = export(model, tokenizer, tmp_path / "out")
    ids = torch.tensor([[1, 2, 3]])
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(plain(ids).logits, model.eval()(ids).logits)
    assert plain.config.use_cache is True
    assert model.config.use_cache is False
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ messages }}"
    assert list(out.glob("*.safetensors"))


def test_a_folder_with_something_in_it_is_not_touched(pretrained: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="is there already"):
        export(load_model(pretrained), tiny_tokenizer(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_fails_half_way_leaves_no_folder(pretrained: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained = None
    with pytest.raises(TypeError):
        export(load_model(pretrained), tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
