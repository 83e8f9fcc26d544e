"""What compiled layers keep for their backward pass, without compiling them.

``torch.compile`` traces the forward and backward pass of a layer into one graph and cuts it where the fewest bytes cross:
what is cheap is computed again. Here the same graph is cut by the same partitioner, and both halves are run op by op on
shapes. What kernels fuse is therefore allocated for a moment that a GPU never allocates; of one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from lightning_sft.sharding import layers


def compile_on_paper(model: nn.Module) -> None:
    """Let each layer of a model keep and allocate what it would compiled; layers that are alike are traced once.

    Layers that cannot be traced on shapes, as those that choose experts, stay as they are.

    Args:
        model: Of transformers, changed in place; its tensors are fake.
    """
    traced: dict[Any, Callable[..., Any]] = {}
    for layer in layers(model):
        shapes = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
        layer.forward = _Compiled(layer, traced, (type(layer), shapes))


class _Compiled:
    """The forward pass of a layer, traced at its first call."""

    def __init__(self, layer: nn.Module, traced: dict[Any, Callable[..., Any]], kind: Any) -> None:
        self._layer, self._eager, self._traced, self._kind = layer, layer.forward, traced, kind

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        named = {**dict(self._layer.named_parameters()), **dict(self._layer.named_buffers())}
        if self._kind not in self._traced:
            self._traced[self._kind] = self._trace(named, args, kwargs)
        return self._traced[self._kind](named, args, kwargs)

    def _trace(self, named: dict[str, Tensor], args: Any, kwargs: Any) -> Callable[..., Any]:
        from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
        from torch._inductor.decomposition import select_decomp_table

        def pure(named: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
            with nn.utils.stateless._reparametrize_module(self._layer, named):
                return self._eager(*args, **kwargs)

        function = aot_function(
            pure,
            fw_compiler=lambda graph, _: make_boxed_func(graph),
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )
        with _disable_current_modes(), torch.enable_grad():
            function(named, args, kwargs)
        return function
