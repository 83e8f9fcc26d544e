"""A tiny model and tokenizer that need no download, for doctests, tests, bug reports and the quickstart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: 256 bytes and three special tokens, with a ChatML template.

    >>> tokenizer = tiny_tokenizer()
    >>> tokenizer.decode(tokenizer("naïve")["input_ids"]), len(tokenizer)
    ('naïve', 259)
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = chat_template
    return tokenizer


TINY: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
"""Config settings of a tiny model, with the vocabulary of :func:`tiny_tokenizer`."""


def tiny_model(model_type: str = "llama", seed: int = 0, **config: Any) -> PreTrainedModel:
    """A causal language model of two small layers with random weights, for :func:`tiny_tokenizer`.

    Args:
        model_type: Architecture of transformers, such as ``llama``.
        seed: Seed of the random weights.
        config: Config settings to override.

    >>> sum(p.numel() for p in tiny_model().parameters())
    13136
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **TINY | config))
    return model


def tiny_pretrained(folder: str | Path, model_type: str = "llama", seed: int = 0, **config: Any) -> str:
    """Save a tiny model and its tokenizer as a Hugging Face folder and return its path, for ``model.pretrained``."""
    tiny_model(model_type, seed, **config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)
