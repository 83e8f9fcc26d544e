"""The head applied to one chunk of targets at a time, with gradients summed over chunks in float32.

The matmuls of a plain linear head are written out to control dtypes, copies and accumulation: the matrix is cast once,
matmuls accumulate in float32 where torch supports it, and a chunk's gradient overwrites its logits.
Any other head (an adapter on it, hooks, packed weights) is differentiated by autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_sft.machine.contexts import autocast_dtype
from lightning_sft.types import InputError

Head = nn.Module | Tensor

ON_CPU = 512  # default number of targets whose logits are in memory at a time
_MOST = 8192
_SHARE = 1 / 64  # of a device's memory, for the logits of a chunk
_BLOCK = 2**18  # entries that a CPU converts at a time: 1 MB in float32
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class LinearHead:
    """``states @ weight.T + bias``, a chunk of states at a time.

    Args:
        weight: Weight of the head, ``[V, H]``.
        bias: Bias of the head, ``[V]``, or ``None``.
        states: Hidden states of all targets, ``[T, H]``.
        trained: Subset of weight and bias that needs a gradient.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, states: Tensor, trained: Sequence[Tensor]) -> None:
        self._autocast = _autocast_dtype(weight)
        self._states, self._is_differentiated = states, states.requires_grad or bool(trained)
        self.of_states = _sum_for(states, len(states)) if states.requires_grad else None
        self.of_trained = [_sum_for(parameter, len(states)) for parameter in trained]
        found = {id(parameter): total for parameter, total in zip(trained, self.of_trained, strict=True)}
        self._of_weight, self._of_bias = found.get(id(weight)), found.get(id(bias))
        self._weight, self._bias = self._cast(weight), None if bias is None else self._cast(bias)

    def forward(self, chunk: slice) -> tuple[Tensor, Tensor | None]:
        """Logits of a chunk, ``[chunk, V]``, and the buffer for their gradient: the logits themselves."""
        raw = F.linear(self._cast(self._states[chunk]), self._weight, self._bias)
        return raw, raw if self._is_differentiated else None

    def backward(self, chunk: slice, gradient: Tensor) -> None:
        """Accumulate the gradients of states and parameters from the gradient of a chunk's logits, ``[chunk, V]``."""
        beta = 0 if chunk.start == 0 else 1  # sums begin uninitialized
        if self.of_states is not None:
            _multiply(self.of_states[chunk], gradient, self._weight, beta=0)
        if self._of_weight is not None:
            _multiply(self._of_weight, gradient.T, self._cast(self._states[chunk]), beta)
        if self._of_bias is not None:
            total = gradient.sum(0, dtype=self._of_bias.dtype)
            self._of_bias.add_(total) if beta else self._of_bias.copy_(total)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor if self._autocast is None else tensor.to(self._autocast)


class AnyHead:
    """A head that autograd differentiates, a chunk of states at a time.

    Args:
        head: Function from states ``[chunk, H]`` to logits ``[chunk, V]``.
        states: Hidden states of all targets, ``[T, H]``.
        trained: Parameters of the head that need a gradient.
    """

    def __init__(self, head: Callable[[Tensor], Tensor], states: Tensor, trained: Sequence[Tensor]) -> None:
        self._head, self._states, self._trained = head, states, trained
        self.of_states = _sum_for(states, len(states)) if states.requires_grad else None
        self.of_trained = [] if len(states) else [_sum_for(parameter, 0) for parameter in trained]
        self._graph: tuple[Tensor, list[Tensor]] | None = None

    def forward(self, chunk: slice) -> tuple[Tensor, Tensor | None]:
        """Logits of a chunk, ``[chunk, V]``, and a separate buffer for their gradient: autograd may need the logits."""
        some = self._states[chunk].detach().requires_grad_(self._states.requires_grad)
        inputs = [*([some] if some.requires_grad else []), *self._trained]
        with torch.set_grad_enabled(bool(inputs)):
            raw = self._head(some)
        if not inputs:
            return raw, None
        self._graph = raw, inputs
        return raw.detach(), torch.empty_like(raw)

    def backward(self, chunk: slice, gradient: Tensor) -> None:
        """Accumulate the gradients of states and parameters from the gradient of a chunk's logits, ``[chunk, V]``."""
        assert self._graph is not None
        (raw, inputs), self._graph = self._graph, None
        new = list(torch.autograd.grad(raw, inputs, gradient))
        if self.of_states is not None:
            self.of_states[chunk] = new.pop(0)
        if not self.of_trained:
            self.of_trained = [more.to(_at_least_float32(more.dtype)) for more in new]
        else:
            self.of_trained = [total.add_(more) for total, more in zip(self.of_trained, new, strict=True)]


def on_chunks(head: Head, states: Tensor, trained: Sequence[Tensor]) -> LinearHead | AnyHead:
    """The head, ready for one chunk of states ``[T, H]`` after another."""
    if isinstance(head, Tensor):
        return (
            AnyHead(partial(F.linear, weight=head), states, trained)
            if is_traceable_wrapper_subclass(head)
            else LinearHead(head, None, states, trained)
        )
    if _is_plain(head):
        return LinearHead(head.weight, head.bias, states, trained)
    return AnyHead(head, states, trained)


def slices(total: int, most: int, even: bool) -> Iterator[slice]:
    """Slices of at most ``most`` that make up ``range(total)``: as even as possible, or full ones and a remainder."""
    num = -(-total // most)
    bounds = [-(-total * i // num) for i in range(num + 1)] if even and num else [*range(0, total, most), total]
    yield from map(slice, bounds, bounds[1:])


def scaled(gradient: Tensor | None, dtype: torch.dtype, factor: Tensor) -> Tensor | None:
    """A gradient times a factor, and only then rounded; in place unless the graph is retained."""
    if gradient is None:
        return None
    return (gradient * factor if _keeps_graph() else gradient.mul_(factor)).to(dtype)


def check_chunk_size(chunk_size: int | None) -> None:
    """Refuse an invalid chunk size.

    Raises:
        InputError: When it is neither ``None`` nor a positive integer.
    """
    if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size >= 1):
        raise InputError(
            f"chunk_size={chunk_size!r} must be a positive integer, as 512. Leave it out for one that fits the device."
        )


def automatic_chunk_size(head: Head, states: Tensor) -> int:
    """Default number of targets whose logits are in memory at a time, see :func:`fitting_chunk_size`."""
    if states.device.type == "cpu":
        return ON_CPU
    vocabulary = head.shape[0] if isinstance(head, Tensor) else getattr(head, "out_features", states.shape[-1])
    itemsize = (_autocast_dtype(states) or states.dtype).itemsize
    return fitting_chunk_size(_total_memory(states.device), vocabulary, itemsize)


def fitting_chunk_size(memory: float, vocabulary: int, itemsize: int) -> int:
    """A power of two of targets, from 512 to 8,192, whose logits take at most 1/64 of a device's memory if they can.

    Free memory is ignored: rounding depends on the chunks, and a resumed run has to round identically.

    >>> fitting_chunk_size(80 * 2**30, vocabulary=152_000, itemsize=2)
    4096
    """
    most = int(memory * _SHARE / (vocabulary * itemsize))
    return min(max(ON_CPU, 1 << max(0, most.bit_length() - 1)), _MOST)


@cache
def _total_memory(device: torch.device) -> float:
    """Total memory of a device in bytes; 0 if torch does not report it."""
    try:
        return float(torch.get_device_module(device).get_device_properties(device).total_memory)
    except (AttributeError, AssertionError, RuntimeError):  # Apple's; a device that is not here
        return 0.0


def _keeps_graph() -> bool:
    """Whether the backward pass under way was called with ``retain_graph``; yes, where torch does not tell."""
    ask: Any = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    return bool(ask())


def _is_plain(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a head is its matrix and nothing else."""
    return (
        type(head) is nn.Linear
        and "forward" not in vars(head)
        and not any(getattr(head, hooks) for hooks in _HOOKS)
        and not is_traceable_wrapper_subclass(head.weight)  # packed, or sharded
    )


def _autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Dtype that autocast would cast a matmul with this tensor to; ``None`` if it is off."""
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return None
    return autocast_dtype(tensor.device)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _sum_for(tensor: Tensor, num: int) -> Tensor:
    """Buffer for the gradient of a tensor; uninitialized if ``num`` > 0, else zeros."""
    make = torch.empty_like if num else torch.zeros_like
    return make(tensor, dtype=_at_least_float32(tensor.dtype), requires_grad=False)


def _multiply(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """``total = beta · total + a @ b``, where ``total`` may be float32 and the others half precision."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif a.is_cuda and _multiplies_into_float32(a.device, a.dtype):
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, beta=beta, out=total)
    else:
        product = a @ b
        rows = max(1, _BLOCK // product.shape[1]) if a.is_cpu else len(product)  # a CPU copies what it has to convert
        for old, new in zip(total.split(rows), product.split(rows), strict=True):
            old.copy_(new) if beta == 0 else old.add_(new)


@cache
def _multiplies_into_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a half-precision matmul can accumulate into a float32 matrix, by trying it: recent torch on CUDA."""
    a, total = torch.ones(16, 16, device=device, dtype=dtype), torch.ones(16, 16, device=device)
    dtype_out: Any = getattr(torch.ops.aten.addmm, "dtype_out", None)
    try:
        dtype_out(total, a, a, torch.float32, beta=1, out=total)
        return bool((total == 17).all())
    except (TypeError, RuntimeError):
        return False
