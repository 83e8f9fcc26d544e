"""Models and tensors of ``cuda:0`` on a machine without a GPU: only shapes, devices and dtypes are there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


class WithoutCuda(TorchFunctionMode):
    """Some methods of a tensor on ``cuda:0`` ask for a CUDA that a build for CPUs lacks: they go another way."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], torch.Tensor) and args[0].device.type == "cuda":
            if function is torch.Tensor.__getitem__:
                here = tree_map(lambda x: x.to("cpu") if isinstance(x, torch.Tensor) else x, args)
                return function(*here).to("cuda:0")
            if function is torch.Tensor.__setitem__:
                return torch.ops.aten.index_put_(args[0], [args[1]], args[2])
            if function is torch.Tensor.contiguous:
                return args[0].clone(memory_format=torch.contiguous_format)
        return function(*args, **kwargs or {})


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """While it lasts, mixed devices are an error, and so is a value that the host would need."""
    with FakeTensorMode() as mode, WithoutCuda(), torch.no_grad():
        yield mode


def to_cuda(module: nn.Module, mode: FakeTensorMode) -> None:
    """Give a module parameters and buffers of ``cuda:0``, in place."""
    for owner in module.modules():
        for name, value in [*owner._parameters.items(), *owner._buffers.items()]:
            if value is not None:
                faked = mode.from_tensor(value).to("cuda:0")
                is_parameter = name in owner._parameters
                setattr(owner, name, nn.Parameter(faked, requires_grad=False) if is_parameter else faked)
