"""Attention of packed documents on GPUs in half precision: FlashAttention kernels, all documents in one call.

torch has long had FlashAttention 2 as ``aten::_flash_attention_forward``, with windows, dropout and grouped heads; its
public ``varlen_attn`` calls the same and is newer, so it is not used. FlashAttention 3 is faster on Hopper, and the
package flash_attn is the fallback if torch was built without FlashAttention. No kernel is trusted: each is compared
with reference attention once per process.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from lightning_sft.model.attention.documents import Documents, OneCall
from lightning_sft.model.attention.operator import packed_attention, packed_attention_backward

_LARGEST_HEAD = 256
_SMALL_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))  # compute capabilities of consumer cards: less shared memory


@dataclass(frozen=True)
class Kernel:
    """An implementation of the operator, which takes the operator's arguments with ``longest`` as an integer.

    Args:
        name: Common name of the kernel.
        forward: Function from queries, keys, values, bounds, longest, window, scale, dropout to the operator's results.
        backward: Function from the arguments of the operator's backward pass to the three gradients.
        drops_out: Whether the kernel supports dropout.
    """

    name: str
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    drops_out: bool = True


@packed_attention.register_kernel("cuda")
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: Tensor,
    window: int,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`~lightning_sft.model.attention.operator.packed_attention`."""
    kernel = chosen(query.device, dropout)
    return kernel.forward(query, key, value, bounds, int(longest), window, scale, dropout)


@packed_attention_backward.register_kernel("cuda")
def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sums: Tensor, random_state: Tensor,
    bounds: Tensor, longest: Tensor, window: int, scale: float, dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`~lightning_sft.model.attention.operator.packed_attention_backward`."""
    kernel, saved = chosen(query.device, dropout), (query, key, value, out, log_sums, random_state)
    return kernel.backward(grad_out.contiguous(), *saved, bounds, int(longest), window, scale, dropout)


def one_call(device: torch.device) -> OneCall | None:
    """What the operator supports on a GPU, or ``None`` if no kernel works there."""
    found = [kernel for _, kernel in kernels(device).values() if kernel is not None]
    if not found:
        return None
    small = torch.cuda.get_device_capability(device) in _SMALL_MEMORY
    return OneCall((torch.bfloat16, torch.float16), _LARGEST_HEAD, any(k.drops_out for k in found), small)


def chosen(device: torch.device, dropout: float = 0.0) -> Kernel:
    """The first kernel that works on a GPU, and supports dropout if there is any."""
    found = (kernel for _, kernel in kernels(device).values() if kernel is not None)
    return next(kernel for kernel in found if kernel.drops_out or not dropout)


@cache
def kernels(device: torch.device) -> dict[str, tuple[str | None, Kernel | None]]:
    """All kernels in order of preference, each as a pair of the reason why it is unusable, and the kernel if it is not.

    Args:
        device: Device to check; without a GPU, that is every kernel's reason.
    """
    made = {"flash_attn 3": _flash_attn_3, "torch's flash attention": _torchs, "flash_attn 2": _flash_attn_2}
    found: dict[str, tuple[str | None, Kernel | None]] = {}
    for name, make in made.items():
        try:
            kernel = make(_capability(device))
            _check(kernel, device)
            found[name] = None, kernel
        except _UnusableError as error:
            found[name] = str(error), None
    return found


class _UnusableError(Exception):
    """A kernel cannot be used, for the reason in the message."""


def _capability(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda" or not torch.cuda.is_available():
        raise _UnusableError("it needs a GPU visible to torch")
    if torch.version.cuda is None:
        raise _UnusableError("it needs an NVIDIA GPU")
    return torch.cuda.get_device_capability(device)


def _check(kernel: Kernel, device: torch.device) -> None:
    """Compare a kernel with reference attention: grouped heads, windows, two documents, forward and backward.

    Raises:
        _UnusableError: When it fails or computes something else.
    """
    for window in (0, 5):
        hooks = saved_tensors_hooks(lambda x: x, lambda x: x)  # gradient checkpointing must not count them
        with _disable_current_modes(), torch.enable_grad(), hooks:
            generator = torch.Generator("cpu").manual_seed(0)
            given = [torch.randn(24, heads, 64, generator=generator, device="cpu") for heads in (4, 2, 2, 4)]
            q, k, v, upstream = (x.to(device, torch.bfloat16) for x in given)
            documents = Documents([17, 7], device=device)
            here, number = torch.arange(24, device="cpu"), torch.tensor([0] * 17 + [1] * 7, device="cpu")
            distance = here[:, None] - here
            seen = (number[:, None] == number) & (distance >= 0) & (distance < (window or 24))
            exact = q_, k_, v_ = tuple(x.float().transpose(0, 1)[None].requires_grad_() for x in (q, k, v))
            wanted = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=seen.to(device), scale=0.3, enable_gqa=True)
            right = torch.autograd.grad(wanted, exact, upstream.float().transpose(0, 1)[None])
            settings = documents.bounds, 17, window, 0.3, 0.0
            try:
                out, *rest = kernel.forward(q, k, v, *settings)
                mine = kernel.backward(upstream, q, k, v, out, *rest, *settings)
            except (AttributeError, RuntimeError, TypeError, ValueError) as error:
                raise _UnusableError(f"it fails on this GPU ({type(error).__name__}: {error})") from error
            for own, theirs in zip((out, *mine), (wanted, *right), strict=True):
                if not torch.allclose(own.float(), theirs[0].transpose(0, 1), atol=0.05, rtol=0.05):
                    raise _UnusableError("its results are wrong on this GPU")


def _left(window: int) -> int:  # preceding tokens that a token attends to; -1 for all
    return window - 1 if window else -1


def _torchs(capability: tuple[int, int]) -> Kernel:
    if capability < (8, 0):
        raise _UnusableError("it needs compute capability 8.0 or above")
    if not torch.backends.cuda.is_flash_attention_available():
        raise _UnusableError("this torch was built without it")

    def run(
        q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, window: int, scale: float, dropout: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        sizes = {"scale": scale, "window_size_left": _left(window), "window_size_right": 0}
        out, log_sums, random_state, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, bounds, bounds, longest, longest, dropout, not window, False, **sizes
        )
        return out, log_sums, random_state

    def differentiate(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, random_state: Tensor,
        bounds: Tensor, longest: int, window: int, scale: float, dropout: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        sizes = {"scale": scale, "window_size_left": _left(window), "window_size_right": 0}
        saved, unused = (q, k, v, out, log_sums, bounds, bounds, longest, longest), q.new_empty(0)
        gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
            grad_out, *saved, dropout, not window, random_state, unused, **sizes
        )
        return gradients

    return Kernel("torch's flash attention", run, differentiate)


def _flash_attn_3(capability: tuple[int, int]) -> Kernel:
    if capability[0] != 9:
        raise _UnusableError("it needs compute capability 9.0")
    _package("flash_attn_interface")
    operators = torch.ops.flash_attn_3

    def options(bounds: Tensor, longest: int, window: int, scale: float) -> dict[str, Any]:
        varlen = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": longest, "max_seqlen_k": longest}
        sizes = {"window_size_left": _left(window), "window_size_right": 0 if window else -1}
        return {**varlen, **sizes, "softmax_scale": scale, "is_causal": not window}

    def run(
        q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, window: int, scale: float, dropout: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, log_sums, *_ = operators.fwd(q, k, v, **options(bounds, longest, window, scale))
        return out, log_sums.contiguous(), torch.zeros(2, dtype=torch.uint64, device=q.device)

    def differentiate(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, random_state: Tensor,
        bounds: Tensor, longest: int, window: int, scale: float, dropout: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        exactly = torch.are_deterministic_algorithms_enabled()
        more = options(bounds, longest, window, scale) | {"dq": dq, "dk": dk, "dv": dv, "deterministic": exactly}
        operators.bwd(grad_out, q, k, v, out, log_sums, **more)
        return dq, dk, dv

    return Kernel("flash_attn 3", run, differentiate, drops_out=False)


def _flash_attn_2(capability: tuple[int, int]) -> Kernel:
    if capability < (8, 0):
        raise _UnusableError("it needs compute capability 8.0 or above")
    package = _package("flash_attn.flash_attn_interface")

    def options(bounds: Tensor, longest: int, window: int, scale: float, dropout: float) -> dict[str, Any]:
        varlen = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": longest, "max_seqlen_k": longest}
        sizes = {"window_size_left": _left(window), "window_size_right": 0 if window else -1}
        others = {"softmax_scale": scale, "causal": not window, "dropout_p": dropout}
        return {**varlen, **sizes, **others, "softcap": 0.0, "alibi_slopes": None}

    def run(
        q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, window: int, scale: float, dropout: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        more = options(bounds, longest, window, scale, dropout)
        out, log_sums, _, random_state = package._flash_attn_varlen_forward(q, k, v, **more)
        if random_state is None:
            random_state = torch.zeros(2, dtype=torch.int64, device=q.device)
        return out, log_sums, random_state.view(torch.uint64)

    def differentiate(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, random_state: Tensor,
        bounds: Tensor, longest: int, window: int, scale: float, dropout: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        exactly = torch.are_deterministic_algorithms_enabled()
        more = options(bounds, longest, window, scale, dropout) | {"deterministic": exactly, "rng_state": random_state}
        package._flash_attn_varlen_backward(grad_out, q, k, v, out, log_sums, dq, dk, dv, **more)
        return dq, dk, dv

    return Kernel("flash_attn 2", run, differentiate)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise _UnusableError(f"package {str(error.name).partition('.')[0]} is not installed") from None
    except Exception as error:  # packages built for another torch or CUDA may raise anything
        raise _UnusableError(f"package {name.partition('.')[0]} cannot be imported ({error})") from error
