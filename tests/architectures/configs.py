"""Tiny configurations of causal language models of transformers, of all kinds of layers.

Windows, chunks and states are shorter than the documents that they are run on, so that a document crosses each of them.
"""

from __future__ import annotations

import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedTokenizerFast

from lightning_sft.demos import tiny_tokenizer
from lightning_sft.demos.tiny import TINY
from tests.helpers.composites import COMPOSITES

_BOTH_KINDS = ["sliding_attention", "full_attention"]
_WINDOW = {"sliding_window": 8, "layer_types": _BOTH_KINDS}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "decoder_sparse_step": 1,
}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
_LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 2,
}
_DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_SSD = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_n_groups": 1}
_OF_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256, "n_ctx": 256, "rotary_dim": 8}

DENSE: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "ministral": _WINDOW,
    "ministral3": {"sliding_window": 8},
    "qwen2": _WINDOW | {"use_sliding_window": True},
    "qwen3": {},
    "gemma": {},
    "gemma2": _WINDOW | {"query_pre_attn_scalar": 8, "initializer_range": 0.3, "attn_logit_softcapping": 0.5},
    "gemma3_text": _WINDOW | {"query_pre_attn_scalar": 8},
    "gemma3n_text": _WINDOW
    | {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 264,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.5, 0.0],
        "pad_token_id": 263,  # its embedding is 0 at first, and so the gradient of its norm NaN
    },
    "gemma4_text": _WINDOW
    | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 264, "global_head_dim": 8},
    "vaultgemma": _WINDOW,
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": 8},
    "olmo": {},
    "olmo2": {},
    "olmo3": _WINDOW,
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.125},
    "cohere2": _WINDOW | {"logit_scale": 0.125},
    "stablelm": {},
    "starcoder2": {"sliding_window": 8},
    "glm": {},
    "glm4": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "exaone4": _WINDOW,
    "seed_oss": {},
    "helium": {},
    "nemotron": {},
    "persimmon": {},
    "arcee": {},
    "apertus": {},
    "bitnet": {},
    "diffllama": {"num_key_value_heads": 2},
    "cwm": _WINDOW,
    "jais2": {},
    "nanochat": {},
    "hyperclovax": {},
    "minicpm3": _LATENT | {"head_dim": None, "num_key_value_heads": 2},
    "youtu": _LATENT | {"pad_token_id": None},  # loading sets the embedding of a padding token to 0
    "gpt2": _OF_GPT2,
    "gpt_bigcode": _OF_GPT2,
    "gptj": _OF_GPT2,
    "codegen": _OF_GPT2 | {"n_head": 4, "rotary_dim": 4, "head_dim": None},
    "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_neox": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 1, "head_dim": None},
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 256},
    "bloom": {"n_layer": 2, "n_head": 2},
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 32},
    "xglm": {"d_model": 16, "ffn_dim": 32, "num_layers": 2, "attention_heads": 2, "pad_token_id": 1},
    "biogpt": {},
    "openai-gpt": _OF_GPT2,
    "modernbert-decoder": _WINDOW | {"local_attention": 8},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": _LOCAL,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "olmoe": _EXPERTS,
    "flex_olmo": _EXPERTS,
    "gpt_oss": _WINDOW | _LOCAL,
    "deepseek_v2": _ROUTED | _LATENT,
    "deepseek_v3": _ROUTED | _LATENT | {"head_dim": 8},
    "glm4_moe": _ROUTED,
    "glm4_moe_lite": _ROUTED | _LATENT | {"mlp_layer_types": ["dense", "sparse"]},
    "granitemoe": _LOCAL,
    "granitemoeshared": _LOCAL | {"shared_intermediate_size": 16},
    "phimoe": _LOCAL | {"sliding_window": 8},
    "llama4_text": _LOCAL
    | {
        "intermediate_size_mlp": 32,
        "moe_layers": [1],
        "attention_chunk_size": 8,
        "layer_types": ["chunked_attention", "full_attention"],
    },
    "dots1": _ROUTED | {"num_key_value_heads": 2} | _WINDOW,
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_num_shared_experts": 1,
    },
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "minimax_m2": _LOCAL | {"rotary_dim": 8},
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8},
    "afmoe": _EXPERTS | _WINDOW | {"num_dense_layers": 1, "num_shared_experts": 1},
    "longcat_flash": _ROUTED
    | _LATENT
    | {"num_layers": 1, "zero_expert_num": 2, "moe_topk": 2, "ffn_hidden_size": 32, "expert_ffn_hidden_size": 16},
    "exaone_moe": _EXPERTS | _WINDOW | {"mlp_layer_types": ["dense", "sparse"], "num_shared_experts": 1},
    "solar_open": _ROUTED,
    "cohere2_moe": _EXPERTS | _WINDOW,
    "dbrx": {
        "d_model": 16,
        "n_heads": 2,
        "n_layers": 2,
        "max_seq_len": 256,
        "ffn_config": {"ffn_hidden_size": 16, "hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 1, "rope_theta": 10_000.0, "clip_qkv": 8.0},
    },
    "deepseek_v32": _ROUTED
    | _LATENT
    | {
        "head_dim": 8,
        "index_topk": 4,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "mlp_layer_types": ["dense", "sparse"],
    },
}
HYBRID: dict[str, dict[str, Any]] = {
    "qwen3_next": _EXPERTS | _DELTA,
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": _EXPERTS | _DELTA,
    "olmo_hybrid": _DELTA,
    "kimi_linear": _ROUTED
    | _LATENT
    | {
        "num_local_experts": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "linear_head_dim": 8,
        "linear_num_heads": 2,
    },
    "falcon_h1": {"mamba_d_ssm": 32} | _SSD,
    "nemotron_h": _ROUTED
    | {
        "layers_block_type": ["mamba", "moe", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 16,
    },
    "granitemoehybrid": _LOCAL | _SSD | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    "bamba": _SSD | {"attn_layer_indices": [1]},
    "jamba": _EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "num_key_value_heads": 2}
    | {"layers_block_type": ["mamba", "hybrid", "hybrid"], "num_hidden_layers": 3}
    | {"mamba_dt_rank": 4, "use_mamba_kernels": False},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "mamba_d_state": 8, "n_mamba_heads": 4, "chunk_size": 8}
    | {"num_key_value_heads": 2, "adapter_rank": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": _EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 8, "lru_width": 16},
    "minimax": _LOCAL | {"layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 4, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "falcon_mamba": {"state_size": 8},
    "rwkv": {"attention_hidden_size": 16, "context_length": 256},
    "xlstm": {"num_heads": 2, "chunk_size": 16},
}
ARCHITECTURES = {
    "dense": DENSE,
    "experts": EXPERTS,
    "hybrid and recurrent": HYBRID,
    "with a language model inside": COMPOSITES,
}


def config_of(model_type: str) -> Any:
    """The tiny configuration of an architecture, without dropout and noise, which would make each step another."""
    if model_type in COMPOSITES:
        return AutoConfig.for_model(model_type, **deepcopy(COMPOSITES[model_type]))
    given = next(kind[model_type] for kind in ARCHITECTURES.values() if model_type in kind)
    config = AutoConfig.for_model(
        model_type, **{name: value for name, value in (TINY | given).items() if value is not None}
    )
    for name, value in vars(config).items():
        if ("drop" in name or "jitter" in name) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def auto_class(pretrained: str | Path) -> Any:
    """The class of transformers that loads the whole of a tiny model."""
    is_composite = AutoConfig.from_pretrained(pretrained).model_type in COMPOSITES
    return AutoModelForMultimodalLM if is_composite else AutoModelForCausalLM


def save(model_type: str, folder: Path, dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast | None = None) -> str:
    """Write a tiny model with random weights and a tokenizer, and return its path.

    Args:
        model_type: Architecture, one of :data:`ARCHITECTURES`.
        folder: Folder to write.
        dtype: Dtype of the weights.
        tokenizer: Tokenizer, of which the model gets the size; by default :func:`tiny_tokenizer`, which has 259 tokens.
    """
    config = config_of(model_type)
    if tokenizer is not None:
        text = config.get_text_config()
        text.max_position_embeddings = 1024  # of templates with a long system turn
        for name in ("vocab_size", "vocab_size_per_layer_input"):
            if hasattr(text, name):
                setattr(text, name, len(tokenizer))
    auto: Any = AutoModelForMultimodalLM if model_type in COMPOSITES else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(config)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Casting complex values")  # of a buffer of Llama 4 that is not saved
        model.to(dtype).save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return str(folder)
