"""Recurrent layers over packed documents: each document is computed as if it were alone.

Mamba mixers, gated delta nets and short convolutions carry a state from token to token, across the borders of
documents. Their kernels for GPUs take these borders as an argument; elsewhere a layer is run on batches of documents of
similar length. No architecture is named: such a layer owns a causal convolution, and the probes measure the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_sft.machine.host_copy import without_waiting
from lightning_sft.model.attention import masks

KEYWORD = "packed_documents"
"""Keyword argument that hands a :class:`Layout` to recurrent layers. transformers passes unknown ones on to them."""

_SHARE = 0.75  # of the longest document of a batch that its shortest has at least
_PACKAGES = ("causal_conv1d", "fla", "mamba_ssm")  # of the kernels that transformers uses where they are installed
_MARK = "_lightning_sft_recurrent"  # attribute of a backbone whose recurrent layers take the keyword


class Layout:
    """Packed documents as batches of one document a row, for layers that cannot be told where documents begin.

    Documents of a batch have similar lengths. The shorter ones are padded on the right, which changes nothing in a
    causal layer, with their own last token, so that padding has ordinary values.

    Args:
        lengths: Number of tokens of each document, in row-major order.
        device: Device of the tokens.

    >>> layout = Layout([2, 4, 3])
    >>> [batch.tolist() for batch in layout.batches], layout.places.tolist()
    ([[[2, 3, 4, 5], [6, 7, 8, 8]], [[0, 1]]], [8, 9, 0, 1, 2, 3, 4, 5, 6])
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.lengths, self.device = list(lengths), device

    @cached_property
    def batches(self) -> list[Tensor]:
        """For each batch the indices of its tokens, ``[documents, longest]``, in the tokens of all rows."""
        return [without_waiting(index, self.device) for index, _ in self._made]

    @cached_property
    def places(self) -> Tensor:
        """Place of each token among those of all batches end to end, ``[T]``."""
        places, first = torch.empty(sum(self.lengths), dtype=torch.int64, device="cpu"), 0
        for index, is_real in self._made:
            places[index[is_real]] = first + is_real.flatten().nonzero()[:, 0]
            first += index.numel()
        return without_waiting(places, self.device)

    @cached_property
    def borders(self) -> dict[str, Tensor]:
        """What kernels take instead: number of the document of each token, ``[1, T]``, and cumulative lengths."""
        lengths = torch.tensor(self.lengths, device="cpu")
        numbers = torch.arange(len(self.lengths), dtype=torch.int32, device="cpu").repeat_interleave(lengths)[None]
        bounds = torch.tensor([0, *accumulate(self.lengths)], device="cpu")
        numbers, bounds = (without_waiting(x, self.device) for x in (numbers, bounds))
        torch._dynamo.maybe_mark_dynamic(bounds, 0)  # else the second batch recompiles all layers
        return {"seq_idx": numbers, "cu_seq_lens_q": bounds}

    def prepare(self) -> None:
        """Compute the tensors that layers read, so that compiled layers do not."""
        _ = self.batches, self.places, self.borders

    @cached_property
    def _made(self) -> list[tuple[Tensor, Tensor]]:
        """For each batch, on the CPU, the indices of its tokens and which of them are not padding."""
        made, batches = [], list[list[int]]()
        for number in sorted(range(len(self.lengths)), key=lambda n: -self.lengths[n]):
            if not batches or self.lengths[number] < _SHARE * self.lengths[batches[-1][0]]:
                batches.append([])
            batches[-1].append(number)
        ends = list(accumulate(self.lengths))
        for batch in batches:
            steps = torch.arange(self.lengths[batch[0]], device="cpu")
            end, length = (torch.tensor([x[n] for n in batch], device="cpu")[:, None] for x in (ends, self.lengths))
            made.append((end - length + torch.minimum(steps, length - 1), steps < length))
        return made


def separate(backbone: nn.Module) -> list[str]:
    """Make the recurrent layers of a backbone take a :class:`Layout`, in place, and return the names of their classes.

    Without the keyword they run as before.
    """
    found = [module for module in backbone.modules() if any(isinstance(part, nn.Conv1d) for part in module.children())]
    for layer in found:
        if not isinstance(layer.forward, _Separated):
            layer.forward = _Separated(layer.forward)
    setattr(backbone, _MARK, bool(found))
    return sorted({type(layer).__name__ for layer in found})


def is_separated(backbone: nn.Module) -> bool:
    """Whether recurrent layers of a backbone take the keyword."""
    return bool(getattr(backbone, _MARK, False))


def by_class(backbone: nn.Module) -> list[list[nn.Module]]:
    """The separated layers of a backbone, those of each class together."""
    found: dict[type, list[nn.Module]] = {}
    for module in backbone.modules():
        if isinstance(module.forward, _Separated):
            found.setdefault(type(module), []).append(module)
    return list(found.values())


def has_kernels(device: torch.device) -> bool:
    """Whether transformers runs recurrent layers by kernels on a device; these do not run on CPUs."""
    return device.type == "cuda" and any(map(find_spec, _PACKAGES))


def pass_borders(layer: nn.Module) -> None:
    """Make a separated layer pass the borders of documents to its kernels."""
    cast(_Separated, layer.forward).passes_borders = True


def passes(layer: nn.Module) -> bool:
    """Whether a separated layer passes the borders of documents to its kernels."""
    return cast(_Separated, layer.forward).passes_borders


def described(backbone: nn.Module) -> str:
    """How the separated layers of a backbone keep documents apart."""
    ways = {False: "computes documents of similar length together", True: "passes their borders to its kernels"}
    layers = [layer for layer, *_ in by_class(backbone)]
    return "; ".join(f"{type(x).__name__} {ways[cast(_Separated, x.forward).passes_borders]}" for x in layers)


def arguments(backbone: nn.Module) -> dict[str, Layout]:
    """Keyword arguments of a backbone within :func:`~lightning_sft.model.attention.masks.rows_of_documents`."""
    rows = masks.current()
    if rows is None or not is_separated(backbone) or rows.are_documents:
        return {}
    layout = Layout(rows.spans, rows.positions.device)
    layout.prepare()
    return {KEYWORD: layout}


class _Separated:
    """Forward pass of a recurrent layer, ``[B, N, H]`` to ``[B, N, H]``, with or without a :class:`Layout`.

    Args:
        own: The layer's own forward pass.
    """

    def __init__(self, own: Callable[..., Any]) -> None:
        self.own, self.passes_borders = own, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layout: Layout | None = kwargs.pop(KEYWORD, None)
        if layout is None:
            return self.own(*args, **kwargs)
        if not self.passes_borders:
            return _each(self.own, layout, args, kwargs)
        rows = _rows(args, kwargs)
        args, kwargs = tree_map(lambda x: x.flatten(0, 1)[None] if _is_of(rows, x) else x, (args, kwargs))
        out = self.own(*args, **kwargs, **layout.borders)
        return tree_map(lambda x: x[0].unflatten(0, rows) if _is_of((1, rows.numel()), x) else x, out)


# not compiled, since lengths vary between batches
@torch.compiler.disable  # type: ignore[untyped-decorator]  # untyped in torch
def _each(own: Callable[..., Any], layout: Layout, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    rows = _rows(args, kwargs)
    outputs = []
    for index in layout.batches:

        def batch(x: Any, index: Tensor = index) -> Any:
            return _taken(x, index.flatten(), index.shape) if _is_of(rows, x) else x

        of_batch, named = tree_map(batch, (args, kwargs))
        outputs.append(own(*of_batch, **named))

    def whole(*parts: Any) -> Any:
        if not _is_of(layout.batches[0].shape, parts[0]):
            return parts[0]
        return torch.cat([part.flatten(0, 1) for part in parts]).index_select(0, layout.places).unflatten(0, rows)

    return tree_map(whole, *outputs)


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Size:
    """Number of rows, and of tokens in each, that a layer is called with."""
    states: Tensor = args[0] if args else kwargs["hidden_states"]
    return torch.Size(states.shape[:2])


def _is_of(shape: tuple[int, ...], x: Any) -> bool:
    """Whether something is a tensor with a value for each token of rows of this shape."""
    return isinstance(x, Tensor) and x.shape[:2] == shape


def _taken(x: Tensor, index: Tensor, shape: tuple[int, ...]) -> Tensor:  # [B, N, ...] -> [*shape, ...]
    taken: Tensor = x.flatten(0, 1).index_select(0, index).unflatten(0, shape)
    return taken
