"""Memory allocators: glibc's, which can keep freed memory, and torch's on CUDA, whose segments can grow."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import MutableMapping

import torch
from torch.torch_version import TorchVersion

KEEPS = {-1: 2**31 - 1, -4: 0}
"""Arguments of ``mallopt`` under which freed memory stays with the process: ``M_TRIM_THRESHOLD``, ``M_MMAP_MAX``."""

_SETS = "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"

_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # since torch 2.9, and before


def is_set() -> bool:
    """Whether the environment configures the allocator."""
    return any(name.startswith(_SETS) for name in os.environ)


def keep_freed_memory() -> bool:
    """Have the allocator use freed memory again instead of handing it back to the system.

    Each page that comes back from the system is cleared first: where that is slow, it is a fifth of a training step.

    Returns:
        Whether it does so now. It is left alone where it is not glibc's, or the user's environment has set it.
    """
    mallopt = None if os.name == "nt" else getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or is_set():
        return False
    return all(mallopt(parameter, value) == 1 for parameter, value in KEEPS.items())


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
