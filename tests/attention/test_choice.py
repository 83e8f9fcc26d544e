from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_sft import SFTModule
from lightning_sft.attention.choice import Attention, probed
from lightning_sft.attention.implementation import NAMES
from lightning_sft.demos import tiny_model, tiny_pretrained
from lightning_sft.pretrained import backbone_and_head, config_dict
from lightning_sft.probes import Findings
from lightning_sft.types import InputError


def choose(model: PreTrainedModel, asked: str | None = None) -> tuple[Attention, Findings]:
    return probed(model, *backbone_and_head(model), asked)


@pytest.mark.parametrize(
    ("model_type", "settings", "stock"),
    [("llama", {}, "sdpa"), ("gemma2", {}, "eager"), ("gpt_oss", {}, "eager"), ("opt", {"ffn_dim": 32}, "sdpa")],
)
def test_ours_is_chosen_where_it_keeps_documents_apart(model_type: str, settings: dict[str, Any], stock: str) -> None:
    model = tiny_model(model_type, **settings | {"word_embed_proj_dim": 16})
    chosen, findings = choose(model)
    assert chosen.name == model.config._attn_implementation == NAMES[stock]
    assert findings.isolates_documents


@pytest.mark.parametrize(("model_type", "why"), [("bloom", "of its own kind"), ("biogpt", "would see each other")])
def test_stock_attention_stays_where_ours_is_not_exact_and_the_reason_is_told(model_type: str, why: str) -> None:
    model = tiny_model(model_type)
    before = model.config._attn_implementation
    chosen, findings = choose(model)
    assert chosen.name == model.config._attn_implementation == before
    assert why in str(chosen)
    assert not findings.isolates_documents


def test_an_architecture_that_looks_into_its_mask_keeps_stock_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    forward = type(model.model.layers[0]).forward

    def looks(self: Any, hidden: Any, attention_mask: Any = None, **rest: Any) -> Any:
        return forward(self, hidden, None if attention_mask is None else attention_mask[:, :, :, :], **rest)

    monkeypatch.setattr(type(model.model.layers[0]), "forward", looks)
    chosen, findings = choose(model)
    assert chosen.name == model.config._attn_implementation == "sdpa"
    assert "does not take it (TypeError" in chosen.why
    assert findings.isolates_documents


@pytest.mark.parametrize("asked", ["sdpa", "eager"])
def test_what_is_asked_for_is_used(pretrained: str, asked: str) -> None:
    module = SFTModule(pretrained, attn_implementation=asked)
    module.configure_model()
    assert module.model is not None
    assert module.attention is not None
    assert module.model.config._attn_implementation == asked == module.attention.name


def test_ours_can_be_asked_for_and_is_refused_where_it_cannot_be_had(pretrained: str, tmp_path: Path) -> None:
    module = SFTModule(pretrained, attn_implementation="per_document")
    module.configure_model()
    assert module.attention is not None
    assert module.attention.name == "per_document"
    biogpt = tiny_pretrained(tmp_path / "biogpt", "biogpt")
    with pytest.raises(InputError, match=r"attn_implementation=per_document is not available for BioGpt.* Leave it out"):
        SFTModule(biogpt, attn_implementation="per_document").configure_model()


def test_no_name_of_ours_is_written_anywhere(pretrained: str, tmp_path: Path) -> None:
    module = SFTModule(pretrained)
    module.configure_model()
    model = module.model
    assert model is not None
    assert model.config._attn_implementation == "per_document"
    assert "per_document" not in json.dumps([config_dict(model), module.hparams["hf_config"]])
    model.save_pretrained(tmp_path)
    assert not [path for path in tmp_path.glob("*.json") if "per_document" in path.read_text()]
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_generation_is_that_of_stock_attention(pretrained: str) -> None:
    module = SFTModule(pretrained)
    module.configure_model()
    assert module.model is not None
    prompts = torch.tensor([[258, 258, 5, 6, 7], [9, 8, 7, 6, 5]])
    given = {"attention_mask": (prompts != 258).long(), "max_new_tokens": 6, "do_sample": False}
    ours = module.model.eval().generate(prompts, **given)
    assert torch.equal(ours, AutoModelForCausalLM.from_pretrained(pretrained).eval().generate(prompts, **given))
