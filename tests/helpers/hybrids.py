"""Tiny models with recurrent layers, and a way to compute them in float64 throughout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_DELTA |= {"layer_types": ["linear_attention", "full_attention"]}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_EXPERTS |= {"shared_expert_intermediate_size": 16, "experts_implementation": "eager"}  # grouped_mm has no float64
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32, "mamba_d_state": 8, "mamba_n_groups": 1}
_MAMBA |= {"mamba_expand": 2, "mamba_chunk_size": 8}

HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": _DELTA,
    "qwen3_next": _DELTA | _EXPERTS,
    "falcon_h1": _MAMBA,
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "expand": 2,
        "chunk_size": 8,
    },
    "granitemoehybrid": _MAMBA | _EXPERTS | {"layer_types": ["mamba", "attention"]},
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "qwen3_5_moe_text": _DELTA | _EXPERTS,
    "olmo_hybrid": _DELTA,
    "kimi_linear": _EXPERTS
    | {"layer_types": ["linear_attention", "full_attention"], "linear_head_dim": 8, "linear_num_heads": 2}
    | {"kv_lora_rank": 8, "v_head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "num_key_value_heads": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"attention_window_size": 5},
    "mamba2": {"num_heads": 4, "head_dim": 8, "expand": 2, "n_groups": 1, "state_size": 8, "chunk_size": 8},
    "zamba2": {
        "mamba_d_state": 8,
        "mamba_headdim": 8,
        "n_mamba_heads": 4,
        "hybrid_layer_ids": [1],
        "layers_block_type": ["mamba", "hybrid"],
        "num_mem_blocks": 1,
        "use_mem_rope": True,
    },
}
"""Settings of tiny models, by architecture; the first six are those of Qwen, Falcon, Nemotron, Granite and Bamba."""

LEAKY: dict[str, tuple[dict[str, Any], str]] = {
    "jamba": (
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1},
        "JambaMambaMixer",
    ),
    "minimax": (_EXPERTS, "MiniMaxLightningAttention"),
    "mamba": ({}, "MambaMixer"),
    "rwkv": ({}, "RwkvSelfAttention"),
    "opt": ({"ffn_dim": 32, "word_embed_proj_dim": 16}, "OPTAttention"),
}
"""Models whose documents see each other with stock attention, with their settings and the layer where they do."""


@contextmanager
def all_in_float64() -> Iterator[None]:
    """What transformers casts to float32 within its layers is computed in float64, so that errors stand out."""
    with patch.object(torch, "float32", torch.float64), patch.object(Tensor, "float", Tensor.double):
        yield
