"""Activations that compiled layers save for the backward pass, determined without compiling them.

``torch.compile`` traces forward and backward of a layer into one graph and partitions it to minimize saved bytes, with
cheap operations recomputed. Here the same partitioner cuts the same graph, and both halves run op by op on shapes.
Intermediates that kernels would fuse are thus allocated for a moment, one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel

from lightning_sft.machine.compiler import KEEP_LESS
from lightning_sft.model.parallel.sharding import layers
from lightning_sft.model.tiles import compiled_parts


def compile_on_paper(model: PreTrainedModel) -> None:
    """Make each layer of a model save and allocate what it would if compiled; identical layers are traced once.

    Layers that cannot be traced on shapes, such as some mixtures of experts, are not changed. Neither are checkpointed
    layers, which save only their input, compiled or not.

    Args:
        model: Model of transformers with fake tensors, changed in place.
    """
    traced: dict[Any, Callable[..., Any] | None] = {}
    for part in (part for layer in layers(model) for part in compiled_parts(layer)):
        shapes = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in part.named_parameters())
        part.forward = _Compiled(part, traced, (type(part), shapes))


class _Compiled:
    """The forward pass of a layer, traced at the first call of an identical one."""

    def __init__(self, layer: nn.Module, traced: dict[Any, Callable[..., Any] | None], kind: Any) -> None:
        self._layer, self._eager, self._traced, self._kind = layer, layer.forward, traced, kind

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if getattr(self._layer, "gradient_checkpointing", False):
            return self._eager(*args, **kwargs)
        named = dict(self._layer.named_parameters()) | dict(self._layer.named_buffers())
        if self._kind not in self._traced:
            self._traced[self._kind] = self._trace(named, args, kwargs)
        function = self._traced[self._kind]
        return self._eager(*args, **kwargs) if function is None else function(named, args, kwargs)

    def _trace(self, named: dict[str, Tensor], args: Any, kwargs: Any) -> Callable[..., Any] | None:
        from torch._functorch._aot_autograd.utils import make_boxed_func
        from torch._functorch.aot_autograd import aot_function
        from torch._functorch.partitioners import min_cut_rematerialization_partition
        from torch._inductor.decomposition import select_decomp_table

        def pure(named: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
            with nn.utils.stateless._reparametrize_module(self._layer, named):
                return self._eager(*args, **kwargs)

        function: Callable[..., Any] = aot_function(
            pure,
            fw_compiler=lambda graph, _: make_boxed_func(graph),
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )
        try:
            with _disable_current_modes(), torch.enable_grad(), torch._functorch.config.patch(KEEP_LESS):
                function(named, args, kwargs)
        except RuntimeError:  # it asks for values, or with torch 2.10 for addresses: it runs as written
            return None
        return function
