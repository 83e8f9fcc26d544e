"""Counts the bytes that tensors would take while code runs on shapes only.

The code is the real one: a model's forward and backward pass, an optimizer's step. Floating-point tensors are fake
(torch's FakeTensorMode), so a model of any size needs no memory and no computation. Integer tensors are real, since the
shapes of a step depend on them: which positions have a target, which documents share a row.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_sft.types import InputError

Kind = Literal["weights", "gradients", "optimizer", "activations", "host"]
KINDS: tuple[Kind, ...] = ("weights", "gradients", "optimizer", "activations")
"""Kinds of memory of a device; ``host`` is what is kept in host memory for it."""

_aten = torch.ops.aten


class Meter(TorchDispatchMode):
    """Context in which floating-point tensors are fake and every allocation is counted.

    Args:
        shares: Share of each kind of memory on a device, such as ``{"optimizer": 0.25}`` if four share it; 1 by
            default.

    >>> with Meter() as meter:
    ...     layer = meter.made("weights", lambda: nn.Linear(1000, 1000, bias=False))
    ...     out = layer(torch.zeros(8, 1000))
    >>> meter.live["weights"], meter.live["activations"]  # the input is gone, but for backward: 8 · 1000 floats each
    (4000000, 64000)
    """

    def __init__(self, shares: Mapping[str, float] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.shares: dict[str, float] = {**dict.fromkeys(KINDS, 1.0), "host": 0.0, **(shares or {})}
        self._fake = FakeTensors(allow_non_fake_inputs=True)
        self._blocks: dict[int, int] = {}  # address of a storage -> number of its block
        self._size: list[int] = []  # of each block
        self._kind: list[Kind] = []  # of each block, as reclassified
        self._trace: list[tuple[int, bool]] = []  # block, and whether it is allocated (else freed)
        self.live: Counter[Kind] = Counter()
        self.peaks: dict[str, Counter[Kind]] = {}  # live bytes at the peak of each moment
        self._moment = ""
        self._new: Kind = KINDS[-1]

    def moment(self, name: str, new: Kind = "activations") -> None:
        """Start or resume a phase, whose peak is recorded under this name.

        Args:
            name: Name of the phase; empty to record nothing.
            new: Kind of new allocations, until reclassified.
        """
        self._moment, self._new = name, new
        self._note()

    def made(self, kind: Kind, make: Callable[[], Any]) -> Any:
        """Call a function and classify the tensors that remain alive.

        Args:
            kind: Kind of the tensors that remain after the call.
            make: Function to call.

        Returns:
            The result of ``make``.
        """
        first = len(self._size)
        with self:
            result = make()
        for block in sorted(self._blocks.values()):
            if block >= first:
                self._call(block, kind)
        return result

    @contextmanager
    def making(self, kind: Kind) -> Iterator[None]:
        """Context in which new allocations are of a kind."""
        before, self._new = self._new, kind
        try:
            yield
        finally:
            self._new = before

    def call(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Classify tensors."""
        for tensor in tensors:
            block = self._blocks.get(tensor.untyped_storage()._cdata)
            if block is not None:
                self._call(block, kind)

    def follow_gradients(self, model: nn.Module) -> None:
        """Classify gradients of a model's parameters as soon as they are ready."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda p: self.call([] if p.grad is None else [p.grad], "gradients")
                )

    def total(self, of: Mapping[Kind, int]) -> float:
        """Bytes on a device, given bytes by kind."""
        return sum(self.shares[kind] * size for kind, size in of.items())

    def events(self) -> Iterator[tuple[int, int]]:
        """All allocations and frees in order, see :mod:`lightning_sft.commands.plan.allocator`."""
        for block, comes in self._trace:
            yield block, round(self._size[block] * self.shares[self._kind[block]]) if comes else -1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on shapes, or for real if all its inputs are integers."""
        given = tree_leaves((args, kwargs))
        num_fakes = sum(isinstance(value, FakeTensor) for value in given)
        if (
            num_fakes and func is _aten.index.Tensor
        ):  # by a mask, which is real, so the number of selected entries is known
            args = (args[0], [i for index in args[1] for i in _positions(index)])
        if num_fakes and num_fakes < sum(isinstance(value, Tensor) for value in given):
            args, kwargs = tree_map_only(Tensor, self._faked, (args, kwargs))
        result = self._run(func, args, kwargs or {}, given)
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._track(value)
        return result

    def _run(self, func: Any, args: Any, kwargs: Any, given: list[Any]) -> Any:
        try:
            if func is _aten._grouped_mm.default:  # torch implements its shapes for bfloat16 only
                return _grouped(*args, **kwargs)
            if any(isinstance(value, FakeTensor) for value in given):
                result = func(*args, **kwargs)
                if func is _aten.topk.default:  # balance the experts
                    chosen = torch.arange(result[1].numel()).view(result[1].shape) % args[0].shape[-1]
                    return type(result)((result[0], chosen)) if type(result) is not tuple else (result[0], chosen)
                return result
            if any(isinstance(value, Tensor) for value in given):
                return func(*args, **kwargs)
            with self._fake:
                result = func(*args, **kwargs)
            return result if isinstance(result, Tensor) and result.is_floating_point() else func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise InputError(
                f"The memory of this model cannot be predicted: its shapes depend on values ({func}), which are not "
                "computed here. Try `lightning-sft fit` with trainer.max_steps=3."
            ) from error

    def _faked(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self._fake.from_tensor(tensor)

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if (address := storage._cdata) in self._blocks:
            return
        block = len(self._size)
        self._blocks[address] = block
        self._size.append(storage.nbytes())
        self._kind.append(self._new)
        self._trace.append((block, True))
        self.live[self._new] += self._size[block]
        weakref.finalize(storage, self._gone, address).atexit = False
        self._note()

    def _gone(self, address: int) -> None:
        block = self._blocks.pop(address)
        self._trace.append((block, False))
        self.live[self._kind[block]] -= self._size[block]

    def _call(self, block: int, kind: Kind) -> None:
        self.live[self._kind[block]] -= self._size[block]
        self.live[kind] += self._size[block]
        self._kind[block] = kind

    def _note(self) -> None:
        # of equal peaks the last, since optimizer state is classified only after its first step
        if self._moment and self.total(self.live) >= self.total(self.peaks.get(self._moment, {})):
            self.peaks[self._moment] = self.live.copy()


def _positions(index: Tensor | None) -> list[Tensor | None]:
    return [index] if index is None or index.dtype != torch.bool else list(index.nonzero(as_tuple=True))


def _grouped(a: Tensor, b: Tensor, groups: Tensor, *_: Any, **__: Any) -> Tensor:
    """Output of a grouped matmul, or of its gradients."""
    if a.dim() == b.dim() == 2:
        return a.new_empty(len(groups), a.shape[0], b.shape[1])
    return a.new_empty(*a.shape[:-1], b.shape[-1]) if a.dim() == 2 else a.new_empty(a.shape[1], b.shape[-1])
