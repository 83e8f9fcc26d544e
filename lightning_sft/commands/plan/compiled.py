"""What compiled layers keep for their backward pass, without compiling them.

``torch.compile`` traces the forward and backward pass of a layer into one graph and cuts it where the fewest bytes
cross: what is cheap is computed again. Here the same graph is cut by the same partitioner, and both halves run op by op
on shapes. So what kernels fuse is allocated for a moment, which a GPU never does; it is of one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel

from lightning_sft.machine.contexts import KEEP_LESS
from lightning_sft.model.parallel.sharding import layers


def compile_on_paper(model: PreTrainedModel) -> None:
    """Let each layer of a model keep and allocate what it would compiled; layers that are alike are traced once.

    Layers that cannot be traced on shapes, as some that choose experts, stay as they are. So do layers that are
    computed again in the backward pass: they keep their input, compiled or not.

    Args:
        model: Of transformers, changed in place; its tensors are fake.
    """
    traced: dict[Any, Callable[..., Any] | None] = {}
    for layer in layers(model):
        shapes = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
        layer.forward = _Compiled(layer, traced, (type(layer), shapes))


class _Compiled:
    """The forward pass of a layer, traced at the first call of one like it."""

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
        except (DataDependentOutputException, DynamicOutputShapeException):
            return None
        return function
