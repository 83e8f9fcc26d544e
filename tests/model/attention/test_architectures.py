"""Packed documents through our attention, beside each document alone through the eager attention of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from lightning_sft.data.batches.collate import collate
from lightning_sft.demos import tiny_model
from lightning_sft.model.attention import per_document as implementation
from lightning_sft.model.attention.operator import packed_attention
from lightning_sft.model.attention.per_document import NAMES
from lightning_sft.model.backbone import backbone_and_head, hidden_states
from lightning_sft.model.pretrained import config_dict
from lightning_sft.types import Example

Lengths = st.lists(st.integers(1, 23), min_size=1, max_size=6)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "phi3": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 5, "attn_logit_softcapping": 0.5, "initializer_range": 0.3},
    "gemma3_text": {"sliding_window": 4},
    "cohere2": {"sliding_window": 3},
}

IN_FLOAT64 = ("llama", "qwen3", "gpt2", "phi3", "mistral")  # the others have norms or positions in float32
NO_SDPA = ("gemma2", "sdpa")  # it would leave out the soft-cap, and transformers refuses it


def model_of(name: str, attention: str, **more: Any) -> PreTrainedModel:
    model = tiny_model(name, **ARCHITECTURES[name], **more).double().train()
    model.set_attn_implementation(attention)
    return model


def examples(lengths: list[int]) -> list[Example]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [Example(torch.randint(256, (n,), generator=generator).tolist(), [1.0] * n) for n in lengths]


def computed(model: PreTrainedModel, rows: list[list[Example]]) -> tuple[Tensor, list[Tensor]]:
    """Hidden states of all documents end to end, and the gradient of a sum over them."""
    backbone, _ = backbone_and_head(model)
    found = []
    for row in rows:
        batch = collate(row)
        found.append(hidden_states(backbone, batch.input_ids, batch.position_ids)[0, : sum(map(len, row))])
    hidden = torch.cat(found)
    weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    return hidden.detach(), list(torch.autograd.grad((hidden * weights).sum(), parameters))


def test_the_soft_cap_changes_what_is_computed() -> None:
    rows = [examples([9, 14])]
    capped, free = (
        computed(tiny_model("gemma2", **ARCHITECTURES["gemma2"] | cap).double(), rows)[0]
        for cap in ({"attn_implementation": "eager"}, {"attn_implementation": "eager", "attn_logit_softcapping": None})
    )
    assert (capped - free).abs().max() > 0.01 * free.abs().max()


def furthest(got: tuple[Tensor, list[Tensor]], wanted: tuple[Tensor, list[Tensor]]) -> float:
    off = max(float((a - b).abs().max()) for a, b in zip(got[1], wanted[1], strict=True))
    largest = max(float(b.abs().max()) for b in wanted[1])
    return max(off / largest, float((got[0] - wanted[0]).abs().max() / wanted[0].abs().max()))


@pytest.mark.parametrize(("name", "stock"), [(n, s) for n in ARCHITECTURES for s in NAMES if (n, s) != NO_SDPA])
@settings(max_examples=5)
@given(lengths=Lengths)
def test_states_and_gradients_are_those_of_each_document_alone(name: str, stock: str, lengths: list[int]) -> None:
    packed = computed(model_of(name, NAMES[stock]), [examples(lengths)])
    alone, eager = (computed(model_of(name, by), [[one] for one in examples(lengths)]) for by in (stock, "eager"))
    assert furthest(packed, alone) <= (1e-12 if name in IN_FLOAT64 else 1e-6)
    assert furthest(packed, eager) <= (1e-12 if name == "gpt2" else 1e-5)  # softmax is in float32 in all but gpt2's


def test_the_measure_would_see_documents_that_see_each_other() -> None:
    model, lengths = model_of("llama", "sdpa"), [5, 9]
    joined = Example([i for example in examples(lengths) for i in example.input_ids], [1.0] * 14)
    alone = computed(model, [[example] for example in examples(lengths)])
    assert furthest(computed(model, [[joined]]), alone) > 0.01


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_the_operator_gets_all_documents_of_a_layer_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[int], int]] = []

    def spy(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: Tensor, *others: Any) -> Any:
        calls.append((bounds.tolist(), int(longest)))
        return packed_attention(query, key, value, bounds, longest, *others)

    monkeypatch.setattr(implementation, "packed_attention", spy)
    computed(model_of(name, "per_document"), [examples([5, 1, 8])])
    assert calls == [([0, 5, 6, 14], 8)] * 2  # two layers


def test_document_by_document_a_layer_is_given_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, Any]] = []
    stock = implementation.sdpa_attention_forward

    def spy(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
        seen.append((query.shape[2], key.shape[2], mask))
        return stock(module, query, key, value, mask, **more)

    monkeypatch.setattr(implementation, "one_call", lambda device: None)
    monkeypatch.setattr(implementation, "sdpa_attention_forward", spy)
    computed(model_of("llama", "per_document"), [examples([5, 1, 8])])
    assert seen == [(5, 5, None), (1, 1, None), (8, 8, None)] * 2  # two layers


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it on whatever it traces
def test_recomputed_and_compiled_layers_give_the_same() -> None:
    plain, recomputed = model_of("mistral", "per_document"), model_of("mistral", "per_document")
    recomputed.activation_checkpointing_enable()
    rows = [examples([9, 3, 14])]
    assert furthest(computed(recomputed, rows), computed(plain, rows)) == 0
    compiled = model_of("mistral", "per_document")
    for layer in compiled.model.layers:
        layer.compile(backend="eager", dynamic=True)
    assert furthest(computed(compiled, rows), computed(plain, rows)) <= 1e-12


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_generation_and_padded_rows_are_those_of_stock_attention(name: str) -> None:
    ours, stock = (model_of(name, attention).eval() for attention in ("per_document", "sdpa"))
    ids = torch.randint(256, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    answers = [
        model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=cache, pad_token_id=0)
        for model in (ours, stock)
        for cache in (True, False)
    ]
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    with torch.no_grad():
        a, b = (model(input_ids=ids, attention_mask=mask).logits[mask.bool()] for model in (ours, stock))
    assert torch.allclose(a, b)


def test_what_is_saved_does_not_name_our_attention(tmp_path: Any) -> None:
    model = model_of("llama", "per_document")
    model.save_pretrained(tmp_path)
    assert not any("per_document" in path.read_text() for path in tmp_path.glob("*.json"))
    assert "per_document" not in str(config_dict(model))
