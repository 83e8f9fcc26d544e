"""Dtype of the frozen base under adapters: bfloat16 if that rounds nothing, or on request.

Under ``bf16-mixed`` every matmul reads its matrix in bfloat16. A frozen float32 base gains nothing from its other 16
bits but takes twice the memory, and autocast also keeps a bfloat16 copy for the backward pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

BaseDtype = Literal["bfloat16", "float32"]


def base_dtype(
    asked: BaseDtype | None, autocast: torch.dtype | None, is_stored_in_bfloat16: Callable[[], bool]
) -> torch.dtype:
    """Choose the dtype to load a base in.

    The default is bfloat16 if matmuls compute in bfloat16 and all weights are stored in it, so that the values are the
    same in either dtype: a checkpoint of the run can be resumed and exported in both.

    Args:
        asked: Dtype requested by the user, or ``None``.
        autocast: Dtype of autocast, or ``None``.
        is_stored_in_bfloat16: Function that tells whether all weights are stored in bfloat16; called only if needed.

    >>> base_dtype("bfloat16", None, bool), base_dtype(None, torch.bfloat16, bool)
    (torch.bfloat16, torch.float32)
    """
    if asked is not None:
        return torch.bfloat16 if asked == "bfloat16" else torch.float32
    fits = autocast is torch.bfloat16 and is_stored_in_bfloat16()
    return torch.bfloat16 if fits else torch.get_default_dtype()


def is_stored_in_bfloat16(pretrained: str) -> bool:
    """Whether every floating-point tensor of a model's safetensors files is bfloat16, according to their headers.

    Args:
        pretrained: A hub name, whose files are downloaded if they are not cached; a folder; or a GGUF file.
    """
    found: set[str] = set()
    for path in weight_files(pretrained):
        with safe_open(path, framework="pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118, not a mapping
    return {dtype for dtype in found if dtype.startswith(("F", "BF"))} == {"BF16"}


def weight_files(pretrained: str) -> list[str]:
    """The safetensors files that transformers loads, in its order: one file, or the shards of an index."""
    source = str(Path(pretrained).expanduser()) if pretrained.startswith("~") else pretrained
    for name in () if source.endswith(".gguf") else (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        try:
            path = str(cached_file(source, name))
            if name == SAFE_WEIGHTS_NAME:
                return [path]
            shards = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"].values()
            return [str(cached_file(source, shard)) for shard in sorted(set(shards))]
        except OSError:  # no such file or model, which loading reports
            continue
    return []
