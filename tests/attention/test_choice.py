"""Which attention a model gets."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_sft.attention.choice import probed
from lightning_sft.demos import tiny_model
from lightning_sft.pretrained import backbone_and_head
from lightning_sft.types import InputError


def choice(name: str, asked: str | None = None, **config: Any) -> tuple[str, str, bool]:
    model = tiny_model(name, **config)
    if asked in ("eager", "sdpa"):
        model.set_attn_implementation(asked)  # as it is when it has been loaded with it
    attention, findings = probed(model, *backbone_and_head(model), asked)
    assert model.config._attn_implementation == attention.name
    return attention.name, attention.why, findings.isolates_documents


def test_ours_goes_through_the_stock_attention_of_the_architecture() -> None:
    assert choice("llama")[0] == "per_document"
    assert choice("gemma3_text", sliding_window=4)[0] == "per_document"
    assert choice("llama")[2]


def test_stock_attention_on_request() -> None:
    assert choice("llama", "eager") == ("eager", "it was asked for", True)


def test_a_model_with_attention_of_its_own_kind_keeps_it_and_says_why() -> None:
    name, why, isolates = choice("bloom")
    assert not name.startswith("per_document")
    assert "attention of its own kind" in why
    assert not isolates
    with pytest.raises(InputError, match=r"per_document cannot be had for BloomForCausalLM.*Leave it out"):
        choice("bloom", "per_document")
