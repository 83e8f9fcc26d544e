from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lightning_sft import SFTModule
from lightning_sft.demos import CHATML, tiny_tokenizer
from lightning_sft.export.folder import export
from lightning_sft.io.disk import whole_folder
from lightning_sft.model.pretrained import load_exported, load_model
from lightning_sft.model.tuning.adapters import merge
from lightning_sft.types import InputError

IDS = torch.tensor([[1, 2, 3]])


class Always(torch.nn.Module):
    """A head for which one token is always the most likely."""

    def __init__(self, token: int) -> None:
        super().__init__()
        self.token = token

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*hidden.shape[:-1], 264)
        logits[..., self.token] = 1.0
        return logits


def test_plain_transformers_loads_it_with_equal_logits_and_the_chat_template(pretrained: str, tmp_path: Path) -> None:
    model, tokenizer = load_model(pretrained), tiny_tokenizer("{{ messages }}")
    out = export(model, tokenizer, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(plain(IDS).logits, model.eval()(IDS).logits)
    assert plain.config.use_cache is True
    assert model.config.use_cache is False
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ messages }}"
    assert list(out.glob("*.safetensors"))


@pytest.mark.parametrize("settings", [{}, {"new_tokens": ["<|new|>"]}])
def test_adapters_are_merged_before_or_refused(pretrained: str, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Their names say nothing to plain transformers, which would go on with random weights in their place."""
    pytest.importorskip("peft")
    module = SFTModule(pretrained, lora={"r": 2}, **settings)
    module.configure_model()
    with pytest.raises(InputError, match=r"has adapters.*HFExport.*merge\(model\)"):
        export(module.model, tiny_tokenizer(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    out = export(merge(module.model), tiny_tokenizer(), tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(plain(IDS).logits, module.model.eval()(IDS).logits)


def test_weights_are_split_into_files_of_the_given_size(pretrained_for_two: str, tmp_path: Path) -> None:
    model = load_model(pretrained_for_two)
    out = export(model, tiny_tokenizer(), tmp_path / "out", max_shard_size="20KB")
    shards = list(out.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert max(shard.stat().st_size for shard in shards) < 25_000
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(plain(IDS).logits, model.eval()(IDS).logits)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight  # tied, and stored once
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"]


def test_resized_embeddings_are_exported(pretrained: str, tmp_path: Path) -> None:
    model = load_model(pretrained)
    model.resize_token_embeddings(300, mean_resizing=False)
    plain = AutoModelForCausalLM.from_pretrained(export(model, tiny_tokenizer(), tmp_path / "out"))
    assert plain.config.vocab_size == 300
    assert torch.equal(plain(torch.tensor([[299]])).logits, model.eval()(torch.tensor([[299]])).logits)


def test_plain_generate_stops_where_training_teaches_it_to(pretrained: str, tmp_path: Path) -> None:
    """The template ends answers with another token than the one that the model knows as its end."""
    model, tokenizer = load_model(pretrained), tiny_tokenizer(CHATML.replace("'<|im_end|>\n'", "'<|pad|>\n'"))
    known, stop = model.generation_config.eos_token_id, tokenizer.pad_token_id
    published = GenerationConfig(eos_token_id=known, temperature=0.6, do_sample=True, top_p=0.9)
    out = export(model, tokenizer, tmp_path / "out", published)
    exported = GenerationConfig.from_pretrained(out)
    assert sorted(exported.eos_token_id) == sorted([known, stop])
    assert (exported.temperature, exported.top_p) == (0.6, 0.9)
    assert (published.eos_token_id, model.generation_config.eos_token_id) == (known, known)
    plain = load_exported(out)
    for token, length in ((known, 1), (stop, 1), (0, 8)):
        plain.lm_head = Always(token)
        assert plain.generate(IDS, max_new_tokens=8, do_sample=False).shape[1] == IDS.shape[1] + length


def test_settings_that_transformers_would_not_save_are_left_out_with_a_warning(pretrained: str, tmp_path: Path) -> None:
    published = GenerationConfig(eos_token_id=257, do_sample=False)
    published.temperature = 0.6  # as Llama 2 was published
    with pytest.warns(UserWarning, match="is invalid, so only its special tokens are saved"):
        out = export(load_model(pretrained), tiny_tokenizer(), tmp_path / "out", published)
    assert GenerationConfig.from_pretrained(out).eos_token_id == 257


def test_a_folder_with_something_in_it_is_not_touched(pretrained: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="already exists"):
        export(load_model(pretrained), tiny_tokenizer(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_fails_half_way_leaves_no_folder(pretrained: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained = None
    with pytest.raises(TypeError):
        export(load_model(pretrained), tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_there_before_it_is_whole(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("1")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "whole"]
    with whole_folder(tmp_path / "out", replace=True) as folder:
        (folder / "whole").write_text("2")
        assert (tmp_path / "out" / "whole").read_text() == "1"
    assert (tmp_path / "out" / "whole").read_text() == "2"
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "out", replace=True):
        raise RuntimeError
    assert (tmp_path / "out" / "whole").read_text() == "2"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_take_the_place_of_another_leaves_it_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "first").write_text("1")
    rename = Path.rename

    def fails(path: Path, target: Path) -> Path:
        if path.name == "unfinished":
            raise OSError("no space left")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="no space left"), whole_folder(tmp_path / "out", replace=True):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "first"]
