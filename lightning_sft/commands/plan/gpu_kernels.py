"""Stand-ins that allocate and save what a GPU does: FlashAttention, the fused likelihood, copies to the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, modeling_utils

from lightning_sft import objective
from lightning_sft.commands.plan.meter import Meter
from lightning_sft.head import chunks as chunked_head
from lightning_sft.machine.contexts import computed_in
from lightning_sft.model.parallel.context import Context

ATTENTION = "kernel_on_paper"
"""Name of the stand-in attention in transformers; its layers get no mask."""


_context: ContextVar[Context | None] = ContextVar("context", default=None)


@contextmanager
def on_paper(meter: Meter, context: Context | None) -> Iterator[None]:
    """Context in which a step allocates as on a GPU: fused softmax, float32 accumulation by the matmul, host memory.

    Args:
        meter: Meter of the step.
        context: Ranks that share rows, or ``None``.
    """
    ours: dict[tuple[Any, str], Any] = {
        (objective, "fuses"): lambda raw: True,
        (chunked_head, "_multiply"): lambda total, a, b, beta: None,
        (modeling_utils, "save_on_cpu"): lambda **_: _on_host(meter),
    }
    token = _context.set(context)
    before = {(module, name): getattr(module, name) for module, name in ours}
    try:
        for (module, name), function in ours.items():
            setattr(module, name, function)
        yield
    finally:
        _context.reset(token)
        for (module, name), function in before.items():
            setattr(module, name, function)


def _on_host(meter: Meter) -> torch.autograd.graph.saved_tensors_hooks:
    """Context in which saved tensors are copied to host memory, and back when they are needed."""

    def pack(tensor: Tensor) -> Tensor:
        with meter.making("host"):
            return torch.empty_like(tensor)

    return torch.autograd.graph.saved_tensors_hooks(pack, torch.empty_like)


@torch.library.custom_op("lightning_sft_planning::flash", mutates_args=())
def _flash(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Output ``[B, N, heads, head size]`` and, in float32, the log-sum-exp of each row of scores ``[B, heads, N]``."""
    rows, heads, length, _ = query.shape
    out = query.new_empty(rows, length, heads, value.shape[-1])
    return out, query.new_empty(rows, heads, length, dtype=torch.float32)


@torch.library.custom_op("lightning_sft_planning::flash_backward", mutates_args=())
def _flash_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; temporary buffers of FlashAttention 2 are allocated and freed.

    These are the query's gradient in float32, and gradients of grouped keys and values for each query head.
    """
    kept = [query.new_empty(query.shape, dtype=torch.float32), torch.empty_like(log_sums)]
    if query.shape[1] != key.shape[1]:
        kept += [query.new_empty(*query.shape[:-1], x.shape[-1]) for x in (key, value)]
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


_flash.register_fake(_flash._init_fn)
_flash_backward.register_fake(_flash_backward._init_fn)


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = _flash_backward(grad_out, *ctx.saved_tensors)
    return gradients


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


_flash.register_autograd(_backward, setup_context=_keep)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **settings: Any
) -> tuple[Tensor, None]:
    """Attention of a layer, ``[B, heads, N, head size]`` to ``[B, N, heads, head size]``, in the autocast dtype."""
    context, dtype = _context.get(), computed_in(query)
    if context is None:
        return _flash(*(x.to(dtype) for x in (query, key, value)))[0], None
    keys = [context.repeated(states, query.shape[1]) for states in (key, value)]
    out, _ = _flash(*(context.to_heads(states).to(dtype) for states in (query, *keys)))
    return context.to_tokens(out), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, _no_mask)
