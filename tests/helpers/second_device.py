"""A second device on a machine that has none: it computes on the CPU, and is as strict as a GPU.

It is torch's PrivateUse1 backend under the name ``second``, written in Python: a tensor there holds one of the CPU. As
on a GPU, no operation takes tensors of both devices (but for numbers of no dimension), a generator of the CPU draws
nothing there, and a device context has factory functions make their tensors there. So a whole ``Trainer.fit`` runs on
it with real values, and a fault that a GPU would show, shows on a CPU.

It also counts waits: operations whose result the host needs before it can go on, as ``.item()``, ``.cpu()``, a boolean
index or ``nonzero()``. On a GPU each of them empties the queue of kernels.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import backend_registration as registration

from lightning_sft import types

NAME = "second"
PACKAGE = Path(__file__).parents[2] / "lightning_sft"

_WAIT = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive"}
_FACTORIES = ("arange", "arange.start", "arange.start_step", "linspace", "eye", "eye.m", "randperm", "tril_indices")
_IN_16_BITS = ("linear", "mm", "matmul", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention", "_grouped_mm")

_is_on = False
_refuses_float64 = False
_waits: Counter[str] | None = None


class Held(Tensor):
    """A tensor of the second device."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Held:
        if _refuses_float64 and held.dtype == torch.float64:
            raise TypeError(f"Cannot convert a tensor to float64 on {NAME}, which has none, like Apple's MPS")
        facts = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, **facts, device=torch.device(NAME, 0))
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"Held({self.held})"

    def tolist(self) -> Any:  # which torch refuses for subclasses
        _wait("tolist")
        return self.held.tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:  # in a checkpoint, it is one of the CPU with a note where it was
        facts = self.dtype, str(self.device), self.requires_grad
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, (self.held.clone(), *facts)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


@contextmanager
def second_device() -> Iterator[torch.device]:
    """While it lasts there is a second device; afterwards torch again says that it has no accelerator."""
    global _is_on
    if not _libraries:
        pytest.skip(f"torch {torch.__version__} knows no devices that are written in Python")
    _is_on = True
    try:
        yield torch.device(NAME, 0)
    finally:
        _is_on = False


@contextmanager
def without_float64() -> Iterator[None]:
    """While it lasts, the second device has no float64, as Apple's MPS has none, and the library knows that of both."""
    global _refuses_float64
    _refuses_float64 = True
    types._WITHOUT_FLOAT64.add(NAME)
    try:
        yield
    finally:
        _refuses_float64 = False
        types._WITHOUT_FLOAT64.discard(NAME)


@contextmanager
def counted_waits() -> Iterator[Counter[str]]:
    """Where the host waits for the second device: how often, by operation and line of the package."""
    global _waits
    before, _waits = _waits, Counter()
    try:
        yield _waits
    finally:
        _waits = before


class SecondAccelerator(Accelerator):
    """The second device as Lightning knows devices."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing."""

    def teardown(self) -> None:
        """Nothing."""

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return _is_on

    @staticmethod
    def name() -> str:
        return NAME


def on_second(precision: str = "32-true") -> dict[str, Any]:
    """Arguments that have a trainer train on the second device."""
    settings: dict[str, Any] = {"strategy": SingleDeviceStrategy(f"{NAME}:0", SecondAccelerator())}
    if precision.endswith("mixed"):
        return settings | {"plugins": [MixedPrecision(precision, NAME)]}  # type: ignore[arg-type]  # a literal, as above
    return settings | {"precision": precision}


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if (composed := function.decompose(*args, **kwargs)) is not NotImplemented:  # as autograd would have done
        return composed
    name = function.overloadpacket._qualified_op_name.removeprefix("aten::")
    if name in ("copy_", "_copy_from"):
        source, target = (args[1], args[0]) if name == "copy_" else args[:2]
        return _copy(source, target)
    if name == "_to_copy":
        return _moved(args[0], **kwargs)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    others = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, Held) and x.ndim]
    if others:
        raise RuntimeError(f"{name}: expected all tensors on the same device, found {NAME}:0 and {others[0].device}")
    if generator := kwargs.get("generator"):
        raise RuntimeError(f"{name}: expected a '{NAME}' device type for generator but found '{generator.device}'")
    if name in _WAIT or (name.startswith("index") and _is_boolean(args[1])):
        _wait(name)
    plain = [torch.device("cpu") if isinstance(x, torch.device) else _inner(x) for x in leaves]
    args, kwargs = pytree.tree_unflatten(plain, spec)
    result = function(*args, **kwargs)
    known = {id(x.held): x for x in leaves if isinstance(x, Held)}
    assert all(x.shape == x.held.shape for x in known.values()), f"{function} has resized its output"
    return pytree.tree_map(
        lambda x: known[id(x)] if id(x) in known else Held(x) if isinstance(x, Tensor) else x, result
    )


def _is_boolean(indices: Any) -> bool:
    return isinstance(indices, (list, tuple)) and any(x is not None and x.dtype == torch.bool for x in indices)


def _inner(x: Any) -> Any:
    return x.held if isinstance(x, Held) else x


def _copy(source: Tensor, target: Tensor) -> Tensor:
    if isinstance(source, Held) and not isinstance(target, Held):
        _wait("copy_")
    _inner(target).copy_(_inner(source))
    return target


def _moved(x: Tensor, device: Any = None, **kwargs: Any) -> Tensor:
    to = x.device if device is None else torch.device(device)
    if isinstance(x, Held) and to.type != NAME:
        _wait("_to_copy")
    found: Tensor = torch.ops.aten._to_copy(_inner(x), **kwargs)
    return Held(found) if to.type == NAME else found


def _wait(name: str) -> None:
    if _waits is not None:
        own = [frame for frame in traceback.extract_stack() if PACKAGE in Path(frame.filename).parents]
        where = f"{Path(own[-1].filename).relative_to(PACKAGE)}:{own[-1].name}" if own else "elsewhere"
        _waits[f"{name} in {where}"] += 1


class _Backend(getattr(registration, "_DummyBackendModule", object)):  # type: ignore[misc]  # torch has it, or not
    def is_available(self) -> bool:
        return _is_on

    def is_initialized(self) -> bool:
        return _is_on

    def device_count(self) -> int:
        return int(_is_on)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> Tensor:  # what is drawn there is drawn by the CPU's generator
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


class _Hook(getattr(registration, "_DummyPrivateUse1Hook", object)):  # type: ignore[misc]  # torch has it, or not
    def is_available(self) -> bool:
        return _is_on


_libraries: list[torch.library.Library] = []  # their kernels are there as long as they are


def register() -> None:
    """Tell torch of the device; before the first backward pass of the process, which counts the devices there are."""
    if _libraries or not hasattr(registration, "_setup_privateuseone_for_python_backend"):
        return
    registration._setup_privateuseone_for_python_backend(NAME, _Backend(), _Hook())
    aten, any_namespace = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    _libraries.extend([aten, any_namespace])
    any_namespace.fallback(lambda function, *args, **kwargs: _run(function, args, kwargs), "PrivateUse1")
    any_namespace.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    aten.impl("_copy_from", lambda source, target, non_blocking=False: _copy(source, target), "PrivateUse1")
    for name in ("empty.memory_format", "empty_strided", *_FACTORIES):
        packet, _, overload = name.partition(".")
        aten.impl(name, _factory(getattr(getattr(torch.ops.aten, packet), overload or "default")), "PrivateUse1")
    for name in _IN_16_BITS:
        aten.impl(name, _autocast(getattr(torch.ops.aten, name)), "AutocastPrivateUse1")


def _factory(function: Any) -> Callable[..., Tensor]:
    def make(*args: Any, device: Any = None, pin_memory: Any = None, layout: Any = None, **kwargs: Any) -> Tensor:
        return Held(function(*args, **kwargs, device="cpu"))

    return make


def _autocast(function: Any) -> Callable[..., Any]:
    def lower(x: Any) -> Any:
        is_wide = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(torch.get_autocast_dtype(NAME)) if is_wide else x

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(NAME, enabled=False):
            return function(*pytree.tree_map(lower, args), **pytree.tree_map(lower, kwargs))

    return call
