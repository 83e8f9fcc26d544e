"""Trained weights to a Hugging Face folder that plain transformers loads."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import reduce
from pathlib import Path
from tempfile import mkdtemp

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightning_sft.data.tokens.chat_template import ChatTemplate
from lightning_sft.io.disk import sync
from lightning_sft.types import InputError


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path,
    generation: GenerationConfig | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Write weights (safetensors), configurations, tokenizer and chat template; all of it, or nothing.

    Args:
        model: The model, on one process.
        tokenizer: With the chat template that it was trained with.
        out: A folder that does not exist yet, or is empty.
        generation: How the model is to generate; as it is by default. The stop token of the chat template is added.
        max_shard_size: Of a file of weights, as ``5GB``.

    Raises:
        InputError: When the folder has something in it.
    """
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
    """The same into a folder that may have other files; see :func:`export`."""
    before = model.config.use_cache, model.generation_config
    model.config.use_cache = True  # training goes without, but inference wants it
    model.generation_config = _stopping(generation or model.generation_config, tokenizer)
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    finally:
        model.config.use_cache, model.generation_config = before
    tokenizer.save_pretrained(folder)


def widest_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype that holds all weights without rounding any: from a folder, transformers loads all in one."""
    return reduce(torch.promote_types, {p.dtype for p in model.parameters() if p.is_floating_point()})


@contextmanager
def whole_folder(out: str | Path, replace: bool = False) -> Iterator[Path]:
    """A folder that appears under its name when all of it is on the disk, or never.

    Args:
        out: Its name. What is written goes to a hidden folder of a new name beside it, which is removed at the end.
        replace: Whether a folder of that name gives way; without it, it must not exist, or be empty.

    Raises:
        InputError: When the folder has something in it.
    """
    out = Path(out)
    if not replace:
        check_is_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    own = Path(mkdtemp(prefix=f".{out.name}.", dir=out.parent))  # nothing of anybody else is in it
    unfinished, old = own / "unfinished", own / "old"
    unfinished.mkdir()
    try:
        yield unfinished
        sync([*unfinished.rglob("*"), unfinished])
        if out.exists():
            out.rename(old)
        try:
            unfinished.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
        sync([out.parent])
    finally:
        shutil.rmtree(own, ignore_errors=True)


def set_aside(folder: Path, out: Path) -> Path:
    """Keep an unfinished folder under the first free name of ``OUT.failed``, ``OUT.failed-2``, ....

    Args:
        folder: As :func:`whole_folder` gives it.
        out: The name that it would have got.
    """
    names = (out.with_name(f"{out.name}.failed{number}") for number in ("", *(f"-{i}" for i in range(2, 10_000))))
    kept = next(path for path in names if not os.path.lexists(path))
    return folder.rename(kept)


def check_is_free(out: Path) -> None:
    """Refuse to write where there is something already.

    Raises:
        InputError: When the folder has something in it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already. Give a new folder, or remove it first.")


def _stopping(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The configuration with the token at which training taught the model to stop, and one for padding."""
    generation, stop_id = deepcopy(generation), ChatTemplate.of(tokenizer).stop_id
    known = generation.eos_token_id
    stops = sorted({*(known if isinstance(known, list) else [known]), stop_id} - {None})
    generation.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
    try:
        generation.validate(strict=True)
    except ValueError as error:  # some models are published with settings that transformers does not save
        warnings.warn(
            f"The generation config of the pretrained model is not saved, but one with its stop tokens: {error}",
            stacklevel=2,
        )
        kept = {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return GenerationConfig(**kept)
    return generation
