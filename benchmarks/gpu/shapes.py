"""Random models: the shapes that are measured, and small models of the architectures that are checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Shape:
    """A published model's dimensions, which random weights are given.

    Args:
        name: The published model.
        config: Its dimensions, as in ``transformers.AutoConfig``.
        length: Tokens of a pack, and so of an optimizer step.
        lora: Rank of the adapters; ``None`` trains all weights.
    """

    name: str
    config: Mapping[str, Any]
    length: int
    lora: int | None = None

    @property
    def slug(self) -> str:
        """Its name on the command line and in folders."""
        return self.name.lower().replace(" ", "-")

    def tiny(self) -> Shape:
        """The same architecture small enough for two steps on a CPU."""
        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 264}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}
        return replace(self, config={**self.config, **small, **heads}, length=256, lora=self.lora and 2)


def _config(model_type: str, *sizes: int, tied: bool = True) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names = (*names, "head_dim", "vocab_size")
    return {"model_type": model_type, **dict(zip(names, sizes, strict=True)), "tie_word_embeddings": tied}


SHAPES = {
    shape.slug: shape
    for shape in (
        Shape("Qwen2.5-0.5B", _config("qwen2", 896, 4864, 24, 14, 2, 64, 151936), 16384),
        Shape("Qwen3-0.6B", _config("qwen3", 1024, 3072, 28, 16, 8, 128, 151936), 8192),
        Shape("Llama-3.2-1B", _config("llama", 2048, 8192, 16, 32, 8, 64, 128256), 16384),
        Shape("Llama-3.1-8B LoRA", _config("llama", 4096, 14336, 32, 32, 8, 128, 128256, tied=False), 4096, lora=16),
    )
}

_WINDOW = {"sliding_window": 48}
_EXPERTS = {"num_experts_per_tok": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": _WINDOW,
    "gemma2": {"query_pre_attn_scalar": 32, **_WINDOW},
    "gemma3_text": {"query_pre_attn_scalar": 32, **_WINDOW},
    "phi3": {},
    "olmo2": {},
    "granite": {"logits_scaling": 4.0},
    "cohere": {},
    "gpt_oss": {"num_local_experts": 4, **_EXPERTS, **_WINDOW},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 128, **_EXPERTS},
    "smollm3": {},
    "starcoder2": {},
}
"""Architectures that are checked, with what makes each of them differ: windows, soft-caps, scales, sinks, experts."""

_SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
_QUICK = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 264}


def architecture(name: str, quick: bool) -> dict[str, Any]:
    """The configuration of a small model of an architecture; of a tiny one if ``quick``."""
    config = {"model_type": name, **_SMALL, **ARCHITECTURES[name], **(_QUICK if quick else {})}
    return config | ({"query_pre_attn_scalar": 8} if quick and "query_pre_attn_scalar" in config else {})


def built_config(config: Mapping[str, Any], tokenizer: Any) -> Any:
    """A configuration of transformers with a tokenizer's special tokens, and with room for all of its tokens."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    size = max(config["vocab_size"], -(-len(tokenizer) // 8) * 8)
    return AutoConfig.for_model(**{**special, "max_position_embeddings": 32768, **config, "vocab_size": size})


def write_model(
    folder: Path, config: Mapping[str, Any], tokenizer: Any, device: str | None = None, seed: int = 0
) -> str:
    """Write a Hugging Face folder, unless it exists, and return its path.

    Args:
        folder: Where to write it.
        config: The model's configuration.
        tokenizer: Its tokenizer.
        device: Where random weights are drawn, in bfloat16, to be saved as such; ``None`` writes no weights.
        seed: Seed of the weights.
    """
    if (folder / "tokenizer_config.json").exists():
        return str(folder)
    built = built_config(config, tokenizer)
    if device is None:
        built.save_pretrained(folder)
    else:
        torch.manual_seed(seed)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(built, dtype=torch.bfloat16)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def prepared(name: str, models: str, tokenizer: str, device: str, quick: bool) -> tuple[Shape, str]:
    """A shape that is measured, and its folder: with weights where adapters need a base, else without.

    Args:
        name: Of the shape, as a slug.
        models: Folder of the folders.
        tokenizer: Folder of the tokenizer.
        device: Where weights are drawn.
        quick: Whether the tiny form is wanted.
    """
    shape = SHAPES[name].tiny() if quick else SHAPES[name]
    folder = Path(models) / (shape.slug + ("-tiny" if quick else ""))
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    return shape, write_model(folder, shape.config, loaded, device if shape.lora else None)
