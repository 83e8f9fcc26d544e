"""MLPs in tiles: each computes some tokens at a time, and again in the backward pass, so that one tile is in memory.

An MLP maps each token by itself, y_t = f(x_t), so the tokens of a batch can be cut anywhere. The forward pass keeps the
input alone; for each tile, the backward pass computes f again with its graph, and sums the gradients of parameters over
tiles in float32 or wider. Where a layer is recomputed too (:mod:`lightning_sft.model.recompute`), its recomputation
ends at the input of the MLP, so each tile is computed twice in a step, not three times.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_sft.head.chunks import slices
from lightning_sft.machine.contexts import blocks
from lightning_sft.types import InputError


def tile_mlps(model: PreTrainedModel, tile_size: int | None) -> None:
    """Compute the MLPs of a model's layers in tiles, in place; mixtures of experts and parameters are left as they are.

    Args:
        model: Model of transformers, with or without adapters.
        tile_size: Maximum number of tokens in a tile; ``None`` changes nothing.

    Raises:
        InputError: Under ZeRO-3, which frees parameters behind each call of a layer.
    """
    if tile_size is None:
        return
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise InputError("model.mlp_tile_size is not available under ZeRO-3. Use trainer.strategy=fsdp2.")
    of_layers = [[child for child in layer.children() if _is_mlp(child)] for layer in blocks(model)]
    for mlp in (mlp for found in of_layers for mlp in found):
        mlp.__class__ = type(f"Tiled{type(mlp).__name__}", (TiledMLP, type(mlp)), {"tile_size": tile_size})
    num_tiled = sum(map(bool, of_layers))
    where = f"{num_tiled} of the {len(of_layers)} layers of {type(model).__name__} have an MLP to compute in tiles"
    if num_tiled == 0:
        rank_zero_warn(f"model.mlp_tile_size has no effect: {where}; experts are not split.")
    elif num_tiled < len(of_layers):
        rank_zero_info(f"model.mlp_tile_size: {where}; experts are not split.")


def compiled_parts(layer: nn.Module) -> list[nn.Module]:
    """The modules to compile of a layer: itself or, if its MLP is in tiles, which torch does not trace, its parts."""
    parts = list(layer.children())
    return parts if any(isinstance(part, TiledMLP) for part in parts) else [layer]


def _is_mlp(module: nn.Module) -> bool:
    """Whether a module maps each token by itself, as its class says, and all tokens by the same parameters."""
    if not type(module).__name__.endswith("MLP") or any("expert" in name for name, _ in module.named_modules()):
        return False
    arguments = inspect.signature(module.forward).parameters.values()
    return sum(argument.default is argument.empty for argument in arguments) == 1


class TiledMLP(nn.Module):
    """Base class that :func:`tile_mlps` adds to the class of an MLP.

    It replaces ``__call__``, so hooks, adapters, compiled and patched forward methods all see one tile at a time.
    """

    tile_size: int

    def __call__(self, states: Tensor) -> Any:
        """Output of the MLP for hidden states ``[..., H]``."""
        if states.shape[:-1].numel() <= self.tile_size:
            return super().__call__(states)
        trained = [p for p in self.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
        kept: list[Any] = []
        if torch.is_grad_enabled() and (states.requires_grad or trained):
            states = states if states.requires_grad else states.detach().requires_grad_()
            states = _Kept.apply(states, kept)  # type: ignore[no-untyped-call]  # untyped in torch
        tiled: Any = _Tiled
        return tiled.apply(super().__call__, self.tile_size, kept, states, *trained)


class _Kept(torch.autograd.Function):
    """Keeps the input of the MLP, before its output is computed: the recomputation of a layer stops here."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, kept: list[Any]) -> Tensor:
        ctx.save_for_backward(states)
        kept.append(ctx)
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Tiled(torch.autograd.Function):
    """A function of each token, tile by tile."""

    @staticmethod
    def forward(ctx: Any, function: Any, size: int, kept: list[Any], states: Tensor, *trained: Tensor) -> Tensor:
        ctx.function, ctx.size, ctx.kept, ctx.trained = function, size, kept, trained
        ctx.modes = _Modes(states.device) if kept else None
        rows = _rows(states)
        first, *others = slices(rows.shape[1], size, even=False)
        found: Tensor = function(rows[:, first])
        out = found.new_empty(*rows.shape[:2], found.shape[-1])
        out[:, first] = found
        for tile in others:
            out[:, tile] = found = function(rows[:, tile])
        return out.view(*states.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("MLPs in tiles have no second derivatives. Call backward without create_graph=True.")
        sums: list[Tensor | None] = [None] * len(ctx.trained)
        [states] = ctx.kept[0].saved_tensors
        rows, of_out = _rows(states), _rows(gradient)
        of_states = torch.empty_like(states, memory_format=torch.contiguous_format)  # whose rows are a view
        with ctx.modes.restored():
            for tile in slices(rows.shape[1], ctx.size, even=False):
                own = rows[:, tile].detach().requires_grad_()
                new = torch.autograd.grad(ctx.function(own), [own, *ctx.trained], of_out[:, tile], allow_unused=True)
                _rows(of_states)[:, tile] = new[0]
                sums = [_added(total, more) for total, more in zip(sums, new[1:], strict=True)]
                del own, new  # before the next
        of_trained = (None if s is None else s.to(p.dtype) for s, p in zip(sums, ctx.trained, strict=True))
        return (None, None, None, of_states, *of_trained)


def _rows(states: Tensor) -> Tensor:
    """Hidden states ``[..., H]`` as one row, ``[1, T, H]``."""
    return states.reshape(1, -1, states.shape[-1])


def _added(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if more is None:
        return total
    if total is None:
        return more.to(torch.promote_types(more.dtype, torch.float32))
    return total.add_(more)


class _Modes:
    """Autocast and the random state of a forward pass, for the passes that compute it again.

    Args:
        device: Device that it runs on, beside the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._kind, self._devices = device.type, [] if device.type in ("cpu", "meta") else [device]
        self._states = [torch.get_rng_state(), *(self._module.get_rng_state(device) for device in self._devices)]
        enabled = torch.amp.is_autocast_available(self._kind) and torch.is_autocast_enabled(self._kind)
        self._autocast = torch.get_autocast_dtype(self._kind) if enabled else None

    @property
    def _module(self) -> Any:
        return torch.get_device_module(self._kind)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Context with these modes, and with gradients."""
        devices: Sequence[Any] = self._devices
        with torch.random.fork_rng(devices, device_type=self._kind if devices else "cuda"), torch.enable_grad():
            torch.set_rng_state(self._states[0])
            for device, state in zip(devices, self._states[1:], strict=True):
                self._module.set_rng_state(state, device)
            with torch.autocast(self._kind, self._autocast, enabled=self._autocast is not None):
                yield
