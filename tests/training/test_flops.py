"""Operations that are counted from parameters and configurations, beside those that torch counts and sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from lightning_sft.demos import tiny_model
from lightning_sft.model.tuning.adapters import Lora, inject
from lightning_sft.training.flops import Flops, flops

SIZE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16}
SIZE |= {"num_key_value_heads": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 32}
LATENT |= {
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
ATTENTION: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gpt2": {},
    "mistral": {"sliding_window": 5},
    "gemma2": {"sliding_window": 5},
    "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    "gpt_oss": {"sliding_window": 5, **EXPERTS},
    "llama4_text": {"attention_chunk_size": 5, "no_rope_layers": [1, 1, 1, 0], **EXPERTS},
    "mixtral": EXPERTS,
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "deepseek_v3": LATENT | {"moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1},
}
RECURRENT: dict[str, dict[str, Any]] = {
    "mamba": {},
    "mamba2": {"num_heads": 8, "expand": 2},
    "falcon_mamba": {},
    "rwkv": {},
    "xlstm": {"num_heads": 4},
}
HYBRID: dict[str, dict[str, Any]] = {
    "recurrent_gemma": {"attention_window_size": 5},
    "qwen3_next": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1},
}


def model_of(name: str) -> PreTrainedModel:
    more = (ATTENTION | RECURRENT | HYBRID)[name]
    model = tiny_model(name, **SIZE | more, experts_implementation="eager")
    if name in ATTENTION | HYBRID:
        model.set_attn_implementation("eager")
    return model


def counted(model: PreTrainedModel, length: int) -> dict[str, int]:
    """Operations of forward and backward, by kernel; all positions are targets."""
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(length)[None], use_cache=False).logits.sum().backward()
    return {str(kernel).removeprefix("aten."): n for kernel, n in counter.get_flop_counts()["Global"].items()}


def of_matrices(counts: dict[str, int]) -> int:
    return counts.get("mm", 0) + counts.get("addmm", 0)


def pairs_seen(model: PreTrainedModel, lengths: list[int]) -> int:
    """Weights of attention that are not 0, of all heads and layers, over documents."""
    seen = 0
    for length in lengths:
        found: Any = model.eval()(input_ids=torch.arange(length)[None], use_cache=False, output_attentions=True)
        seen += sum(int((weights > 0).sum()) for weights in found.attentions if weights is not None)
    return seen


@pytest.mark.parametrize("name", [name for name in ATTENTION if name != "llama4_text"])
def test_of_a_token_and_a_target_they_are_those_that_torch_counts(name: str) -> None:
    model, length = model_of(name), 40
    found = flops(model)
    assert found is not None
    assert length * (found.per_token + found.per_target) == pytest.approx(of_matrices(counted(model, length)), rel=1e-3)


@pytest.mark.parametrize("name", ATTENTION)
def test_pairs_are_those_that_attend_in_each_document(name: str) -> None:
    model, lengths = model_of(name), [1, 3, 11, 23]
    found = flops(model)
    assert found is not None
    width = (16 + 8 + 32) if name == "deepseek_v3" else 2 * 16
    assert found.of_pairs(lengths) == 6 * width * pairs_seen(model, lengths)


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3"])
def test_a_pair_costs_what_torch_counts(name: str) -> None:
    """Eager attention takes all pairs of queries and keys, also those that it masks then."""
    model, length = model_of(name), 40
    found = flops(model)
    assert found is not None
    expected = length**2 * sum(found.per_pair.values())
    assert counted(model, length)["bmm"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", RECURRENT | HYBRID)
def test_of_recurrent_layers_the_matrices_count(name: str) -> None:
    model, length = model_of(name), 64
    found = flops(model)
    assert found is not None
    assert length * (found.per_token + found.per_target) == pytest.approx(of_matrices(counted(model, length)), rel=0.07)


@pytest.mark.parametrize(("name", "layers"), [*((name, 0) for name in RECURRENT), ("recurrent_gemma", 1), ("jamba", 2)])
def test_recurrent_layers_have_no_pairs(name: str, layers: int) -> None:
    found = flops(model_of(name))
    assert found is not None
    assert sum(found.per_pair.values()) == layers * 6 * 2 * 4 * 16


@pytest.mark.parametrize("frozen", ["mlp", "embed_tokens"])
def test_frozen_matrices_have_no_gradient_of_their_own(frozen: str) -> None:
    model = model_of("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = frozen not in name
    found = flops(model)
    assert found is not None
    assert 40 * (found.per_token + found.per_target) == pytest.approx(of_matrices(counted(model, 40)), rel=1e-3)


def test_adapters_are_trained_on_a_frozen_model() -> None:
    model = model_of("llama")
    inject(model, Lora(r=4))
    found = flops(model)
    assert found is not None
    counts = of_matrices(counted(model, 40))  # torch takes no gradient of the embeddings, which are the first input
    assert 40 * (found.per_token + found.per_target) == pytest.approx(counts, rel=0.05)


def test_embeddings_of_positions_are_not_multiplied() -> None:
    short, long = (tiny_model("gpt2", **SIZE, n_positions=n) for n in (64, 256))
    assert flops(short) == flops(long)


def test_architectures_whose_attention_is_not_known_have_no_count() -> None:
    model = model_of("llama")
    model.config.layer_types = ["indexed_attention"] * 4
    assert flops(model) is None
    model = model_of("mixtral")
    model.config.num_experts_per_tok = 0
    assert flops(model) is None


def test_a_window_and_a_chunk_bound_the_pairs() -> None:
    for kind in ("sliding", "chunked"):
        cost = Flops(0.0, 0.0, {(kind, 4): 1.0})  # type: ignore[dict-item]  # kind is one of the literals
        for length in range(20):
            first = (lambda i: max(0, i - 3)) if kind == "sliding" else (lambda i: i // 4 * 4)
            assert cost.of_pairs([length]) == sum(i - first(i) + 1 for i in range(length))
