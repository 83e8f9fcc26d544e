"""Helpers of the tests of the likelihood: a case of any size, and what may be allocated or computed on its way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_sft.types import IGNORE


def large_case(
    targets: int, vocabulary: int = 48, width: int = 32, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, nn.Linear, Tensor]:
    """Hidden states of many targets, a head that is not far from uniform, and labels."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, targets + 3, width, generator=generator).to(dtype).requires_grad_()
    head = nn.Linear(width, vocabulary, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(vocabulary, width, generator=generator) / width**0.5)
    labels = torch.randint(vocabulary, (1, targets + 3), generator=generator)
    labels[0, [0, 5, -1]] = IGNORE
    return hidden, head, labels


class Operations(TorchDispatchMode):
    """Every operation that is run while it is entered, and the new tensors of one shape that they give."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.seen, self.made = shape, [], []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        self.seen.append(func)
        new = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given]
        self.made += [(func, tensor.dtype) for tensor in new if tensor.shape == self.shape]
        return result
