"""Tiny random checkpoints of images and text, with the files of a processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM

from lightning_sft.demos import tiny_model, tiny_tokenizer
from lightning_sft.export.kept import PROCESSOR_FILES

_OF_LLAMA = ("architectures", "rope_parameters", "layer_types", "model_type")


def _text(kind: str, **more: Any) -> dict[str, Any]:
    known = {name: value for name, value in tiny_model().config.to_dict().items() if name not in _OF_LLAMA}
    return known | {"model_type": kind, **more}


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2], **more}}


_SIZE = {"hidden_size": 16, "intermediate_size": 16, "patch_size": 4}
_LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
_QWEN = {"depth": 1, "num_heads": 2, "out_hidden_size": 16}
_QWEN_IDS = {"image_token_id": 290, "video_token_id": 291, "vision_start_token_id": 292, "vision_end_token_id": 293}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2} | {
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_EXPERTS = {"intermediate_size_mlp": 32, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_layers": [1]}
_GEMMA4 = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 264, "global_head_dim": 8} | {
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
}

COMPOSITES: dict[str, dict[str, Any]] = {
    "qwen3_5": {
        "text_config": _text("qwen3_5_text", **_HYBRID),
        "vision_config": _SIZE | _QWEN | {"num_position_embeddings": 16},
        **_QWEN_IDS,
    },
    "qwen2_5_vl": {"text_config": _text("qwen2_5_vl_text", **_rope()), "vision_config": _SIZE | _QWEN, **_QWEN_IDS},
    "qwen3_vl": {
        "text_config": _text("qwen3_vl_text", **_rope(mrope_interleaved=True)),
        "vision_config": _SIZE | _QWEN | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **_QWEN_IDS,
    },
    "gemma3": {"text_config": _text("gemma3_text"), "vision_config": _SIZE | _LAYERS, "mm_tokens_per_image": 4},
    "gemma4": {
        "text_config": _text("gemma4_text", **_GEMMA4),
        "vision_config": _SIZE | _LAYERS | {"num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16},
        "audio_config": None,
    },
    "mistral3": {
        "text_config": _text("mistral"),
        "vision_config": _SIZE | _LAYERS | {"model_type": "pixtral", "head_dim": 8},
    },
    "llama4": {
        "text_config": _text("llama4_text", **_EXPERTS),
        "vision_config": _SIZE
        | _LAYERS
        | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    },
    "smolvlm": {"text_config": _text("llama"), "vision_config": _SIZE | _LAYERS, "scale_factor": 2},
}
"""For each model type the arguments of its configuration."""


def composite(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> str:
    """Write a tiny model of images and text, and return its path.

    Args:
        folder: Folder to write.
        kind: Model type, see :data:`COMPOSITES`.
        dtype: Dtype of the stored weights.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForMultimodalLM.from_config(AutoConfig.for_model(kind, **COMPOSITES[kind]), dtype=dtype)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    for name in PROCESSOR_FILES:
        (folder / name).write_text(json.dumps({"of": name}) + "\n")
    return str(folder)
