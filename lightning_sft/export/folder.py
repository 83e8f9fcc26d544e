"""Writing trained weights as a Hugging Face folder that plain transformers loads."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import reduce
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightning_sft.data.tokens.chat_template import ChatTemplate
from lightning_sft.data.tokens.template_config import for_inference
from lightning_sft.io.disk import whole_folder
from lightning_sft.model.tuning.adapters import has_adapters
from lightning_sft.types import InputError


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path,
    generation: GenerationConfig | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Write weights (safetensors), configs, tokenizer and chat template atomically.

    Args:
        model: Unsharded model; its adapters, if it has any, must be merged.
        tokenizer: Tokenizer with the chat template of the training.
        out: Folder that does not exist yet, or is empty.
        generation: Generation config; by default the model's. The stop token of the chat template is added.
        max_shard_size: Maximum size of a weight file, such as ``5GB``.

    Returns:
        Path of the folder.

    Raises:
        InputError: When the folder is not empty, or the model has adapters, which plain transformers would not load.
    """
    if has_adapters(model):
        raise InputError(
            "The model has adapters, which plain transformers would not load from there. Export its "
            "checkpoint (lightning-sft export), train with the callback HFExport, which merges a copy, or merge this "
            "model: lightning_sft.model.tuning.adapters.merge(model)."
        )
    with whole_folder(out) as folder:
        write(model, tokenizer, folder, generation, max_shard_size)
    return Path(out)


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    generation: GenerationConfig | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write the same files into a folder that may have others, see :func:`export`."""
    with _for_inference(model, tokenizer, generation):
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    for_inference(tokenizer).save_pretrained(folder)


def write_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, generation: GenerationConfig | None = None
) -> None:
    """Write the same files but for the weights, see :func:`export`."""
    with _for_inference(model, tokenizer, generation):
        model.config.dtype = model.dtype
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
    for_inference(tokenizer).save_pretrained(folder)


@contextmanager
def _for_inference(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None
) -> Iterator[None]:
    """The model's configs have a cache, which is disabled in training, and the stop token of the training."""
    before = model.config.use_cache, model.generation_config
    model.config.use_cache, model.generation_config = True, _stopping(generation or model.generation_config, tokenizer)
    try:
        yield
    finally:
        model.config.use_cache, model.generation_config = before


def widest_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype that holds all weights without rounding; transformers loads a folder in a single dtype."""
    return reduce(torch.promote_types, {p.dtype for p in model.parameters() if p.is_floating_point()})


def set_aside(folder: Path, out: Path) -> Path:
    """Keep an unfinished folder under the first free name of ``OUT.failed``, ``OUT.failed-2``, ....

    Args:
        folder: Unfinished folder of :func:`whole_folder`.
        out: Path that it was meant for.

    Returns:
        The new path.
    """
    names = (out.with_name(f"{out.name}.failed{number}") for number in ("", *(f"-{i}" for i in range(2, 10_000))))
    kept = next(path for path in names if not os.path.lexists(path))
    return folder.rename(kept)


def _stopping(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The generation config with the stop token of the training, and a padding token."""
    generation, stop_ids = deepcopy(generation), ChatTemplate.of(tokenizer).stop_ids
    known = generation.eos_token_id
    stops = sorted({*(known if isinstance(known, list) else [known]), *stop_ids} - {None})
    generation.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
    try:
        generation.validate(strict=True)
    except ValueError as error:  # some published configs have settings that transformers refuses to save
        warnings.warn(
            f"The generation config of the pretrained model is invalid, so only its special tokens are saved: {error}",
            stacklevel=2,
        )
        kept = {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return GenerationConfig(**kept)
    return generation
