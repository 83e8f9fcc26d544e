"""Modes of torch that are left as they were: of a module, and of what is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def evaluating(module: Any) -> Iterator[None]:
    """Evaluation mode without gradients, at the precision of the trainer; afterwards all modes are what they were.

    Compiled layers run as they are written: each new length of an answer would be compiled anew.

    Args:
        module: A Lightning module with a trainer.
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        precision = module.trainer.precision_plugin.forward_context()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), precision:
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors are of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
