"""Counts the kernels and the bytes of a training step without doing its work.

Operators on large tensors are not computed: they give tensors of the right shape whose memory is never touched. What
decides which operators come next, as labels and positions, is small, and computed. So a step of any size is counted in
seconds, operator by operator, as a GPU would launch them but for attention, which is one operator here too.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.gpu import kinds

LARGE = 100_000
"""Elements of a tensor that is not computed: more than the tokens of a pack, fewer than their hidden states."""

_WRITES_ALONE = re.compile("copy_|fill_|zero_|normal_|uniform_|random_|trunc_normal_|new_.*|.*_like")

Counts = dict[str, tuple[int, int]]
"""Kernels and bytes by kind."""


def difference(more: Counts, fewer: Counts) -> Counts:
    """What one step has more than another.

    >>> difference({"matmul": (4, 100)}, {"matmul": (1, 30)})
    {'matmul': (3, 70)}
    """
    found = {k: (n - fewer.get(k, (0, 0))[0], b - fewer.get(k, (0, 0))[1]) for k, (n, b) in more.items()}
    return {kind: counted for kind, counted in found.items() if any(counted)}


def added(one: Counts, other: Counts) -> Counts:
    """The sum of two.

    >>> added({"matmul": (4, 100)}, {"matmul": (1, 30), "other": (1, 1)})
    {'matmul': (5, 130), 'other': (1, 1)}
    """
    pairs = {kind: (one.get(kind, (0, 0)), other.get(kind, (0, 0))) for kind in (*one, *other)}
    return {kind: (a[0] + b[0], a[1] + b[1]) for kind, (a, b) in pairs.items()}


class Counting(TorchDispatchMode):
    """Counts what operators read and write, and computes only what is small.

    Attributes:
        targets: Of the step that is counted.
        phase: Under which name operators are counted now; ``None`` for not at all.
        value: Of what is small and comes from what is large: differences of 0 satisfy the probes before the first
            step; a sum of 1 has a finite logarithm in a step.
        counts: Kernels and bytes by phase and kind.
        operators: Kernels and bytes by phase and name of the operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase: str | None = None
        self.value = 0.0
        self.targets = 0
        self.counts: dict[str, Counts] = defaultdict(dict)
        self.operators: dict[str, Counts] = defaultdict(dict)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute or pretend, and count."""
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        kind = kinds.of_operator(name)
        if kind == kinds.VIEW and not _is_factory(args, kwargs):
            return func(*args, **kwargs)
        out = (
            func(*args, **kwargs) if self._is_small(func, args, kwargs) else _pretended(func, args, kwargs, self.value)
        )
        if self.phase is not None and kind != kinds.VIEW:
            moved = _bytes_moved(func, name, args, kwargs, out)
            for found, key in ((self.counts[self.phase], kind), (self.operators[self.phase], name)):
                number, size = found.get(key, (0, 0))
                found[key] = (number + 1, size + moved)
        return out

    def _is_small(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether to compute: no large floating-point tensor goes in or comes out."""
        if any(_is_large(x) for x in tree_leaves((args, kwargs))):
            return False
        if _is_factory(args, kwargs):
            size = next((x for x in args if isinstance(x, (list, tuple, torch.Size))), ())
            return torch.Size(size).numel() < LARGE if all(isinstance(n, int) for n in size) else True
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not any(x.is_floating_point() for x in inputs) or func._schema.is_mutable:
            return True
        return not any(_is_large(x) for x in tree_leaves(_on_meta(func, args, kwargs)))


def _is_large(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() >= LARGE


def _is_factory(args: Any, kwargs: Any) -> bool:
    return not any(isinstance(x, Tensor) for x in tree_leaves((args, kwargs)))


def _on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operator gives, as tensors without memory."""
    if func._schema.name == "aten::index":  # a mask gives as many rows as it is true: its values are needed
        args = (args[0], [place for mask in args[1] for place in _places(mask)])
    args, kwargs = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs))
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("meta")}
    return func(*args, **kwargs)


def _pretended(func: Any, args: Any, kwargs: Any, value: float) -> Any:
    """The result of an operator, uncomputed; of what it writes to, what is small has a value."""
    returns = func._schema.returns
    for tensor in _written(func, args, kwargs):
        if tensor.numel() < LARGE and tensor.is_floating_point():
            tensor.fill_(value)
    if not returns:
        return None
    if all(r.alias_info is not None and r.alias_info.is_write for r in returns):
        values = _written(func, args, kwargs)[: len(returns)]  # they are returned in their order
        return values[0] if len(values) == 1 else tuple(values)
    return tree_map(lambda x: _unfilled(x, value) if isinstance(x, Tensor) else x, _on_meta(func, args, kwargs))


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operator writes to."""
    given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
    names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [x for x in tree_leaves([given.get(name) for name in names]) if isinstance(x, Tensor)]


def _places(index: Tensor | None) -> list[Tensor | None]:
    return list(index.nonzero(as_tuple=True)) if index is not None and index.dtype == torch.bool else [index]


def _unfilled(like: Tensor, value: float) -> Tensor:
    """Memory that is never touched where there is much of it; where there is little, it has a value."""
    if like.numel() < LARGE:
        return torch.full(like.shape, value, dtype=like.dtype)
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)


def _bytes_moved(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> int:
    """What an operator reads and writes: its arguments, and its results or, without these, what it changes in place."""
    written = tree_leaves(out)
    if not func._schema.returns:
        written = _written(func, args, kwargs)
    read = tree_leaves((args[1:] if re.fullmatch(_WRITES_ALONE, name) else args, kwargs))
    return sum(_bytes(x) for x in (*read, *written) if isinstance(x, Tensor))


def _bytes(tensor: Tensor) -> int:
    """Of its elements; one that is repeated by a stride of 0 counts once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size()


@contextmanager
def inductor_graphs() -> Iterator[list[Counts]]:
    """Collects the counts of each graph that inductor makes for training while this is open.

    Graphs without gradients, as of probes, are left out.
    """
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    found: list[Counts] = []
    original = GraphLowering.codegen

    def codegen(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if not self.is_inference:
            found.append(_scheduled(self.scheduler.nodes))
        return result

    torch._dynamo.reset()
    with patch.object(GraphLowering, "codegen", codegen), config.patch({"force_disable_caches": True}):
        yield found


def _scheduled(nodes: Any) -> Counts:
    """Kernels and bytes of a scheduled graph by kind; what is fused is elementwise, reductions within it too."""
    from torch._inductor.ir import MultiOutput
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode

    found: Counts = {}
    for node in nodes:
        if isinstance(node, NopKernelSchedulerNode) or isinstance(getattr(node, "node", None), MultiOutput):
            continue  # no kernels
        kind = kinds.ELEMENTWISE
        if isinstance(node, ExternKernelSchedulerNode):
            overload = getattr(node.node, "op_overload", None)
            kind = kinds.OTHER if overload is None else kinds.of_operator(overload._schema.name.partition("::")[2])
        number, size = found.get(kind, (0, 0))
        found[kind] = (number + 1, size + int(node.get_read_write_buffers_sizes()))
    return found
