"""Trained weights to a Hugging Face folder that plain transformers loads."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_sft.types import InputError


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: str | Path) -> Path:
    """Write weights (safetensors), configuration, tokenizer and chat template; all of it, or nothing.

    Args:
        model: The model, on one process.
        tokenizer: With the chat template that it was trained with.
        out: A folder that does not exist yet, or is empty.

    Raises:
        InputError: When the folder has something in it.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already. Give a new folder, or remove it first.")
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    trains_without_cache, model.config.use_cache = model.config.use_cache, True  # inference wants it
    try:
        model.save_pretrained(unfinished)
    finally:
        model.config.use_cache = trains_without_cache
    tokenizer.save_pretrained(unfinished)
    if out.exists():
        out.rmdir()
    unfinished.rename(out)
    return out
