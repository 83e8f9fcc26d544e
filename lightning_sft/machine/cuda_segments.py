"""torch's allocator on CUDA: segments that grow, so that blocks of many sizes leave no holes between them."""

from __future__ import annotations

import sys
from collections.abc import MutableMapping

import torch
from torch.torch_version import TorchVersion

_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # since torch 2.9, and before


def expand_segments(environment: MutableMapping[str, str]) -> bool:
    """Ask for ``expandable_segments``, unless the user has asked the allocator for anything.

    Micro-batches of varying length, as padded ones, validation and generation, otherwise leave memory reserved in
    pieces that the next length does not fit into. Packs of one size gain little by it. torch reads the variable when it
    first allocates on a GPU, and processes that are started inherit it.

    Args:
        environment: Environment of this process, before CUDA is used.

    Returns:
        Whether it was asked for: on Linux with a build of torch for CUDA only.

    >>> expand_segments({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"})
    False
    """
    if sys.platform != "linux" or torch.version.cuda is None or any(name in environment for name in _NAMES):
        return False
    environment[_NAMES[0] if torch.__version__ >= TorchVersion("2.9") else _NAMES[1]] = "expandable_segments:True"
    return True
