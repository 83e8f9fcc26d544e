"""Checkpoints of the trained parameters without the base: megabytes instead of gigabytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_sft.model.parallel.sharding import entries, is_sharded
from lightning_sft.model.tuning.packed import unpacked
from lightning_sft.model.tuning.quantization import is_packed
from lightning_sft.types import InputError

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

ADAPTERS_KEY = "adapters"
_SETTINGS = ("lora", "new_tokens", "quantize")
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "use_cache", "quantization_config")


def samples(model: nn.Module, count: int = 8) -> Tensor:
    """A few entries of every parameter that is not quantized: a cheap fingerprint of the weights.

    Args:
        model: Pretrained model without adapters. If it is sharded, every rank calls this.
        count: Number of entries per parameter.
    """
    packed = {id(forward.layer.weight) for forward in unpacked(model).values()}
    floating = [p.detach() for p in model.parameters() if p.is_floating_point() and id(p) not in packed]
    plain = (p for p in floating if is_sharded(p) or not is_traceable_wrapper_subclass(p))
    return torch.cat([entries(p, range(0, p.numel(), max(1, p.numel() // count))[:count]) for p in plain])


def shrink(checkpoint: dict[str, Any], module: nn.Module, base: Tensor) -> None:
    """Reduce a checkpoint to the trained tensors, and record a fingerprint of the base.

    Args:
        checkpoint: Checkpoint of the module with unsharded tensors; ranks other than 0 may have none of them.
        module: Module with adapters.
        base: Fingerprint of the pretrained weights, see :func:`samples`.
    """
    kept = _kept(module)
    checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in kept}
    checkpoint[ADAPTERS_KEY] = {
        "shapes": {name: list(value.shape) for name, value in kept.items()},
        "base": _plain(base),
    }


def check(checkpoint: dict[str, Any], module: LightningModule, base: Tensor | None) -> None:
    """Refuse a checkpoint that does not match the module; torch cannot check this, since the base is missing.

    Args:
        checkpoint: Checkpoint of any module; its tensors may already have been loaded and removed.
        module: Module whose model has been configured.
        base: Fingerprint of the module's base, see :func:`samples`; ``None`` without adapters.

    Raises:
        InputError: When it was written with other adapters, with another base, or without adapters.
    """
    saved, found = checkpoint.get("hyper_parameters", {}), checkpoint.get(ADAPTERS_KEY)
    if base is None:
        if found is not None or saved.get("lora"):
            raise InputError(f"The checkpoint is from a run with adapters, {_shown(saved)}. Use the same settings.")
        return
    if not saved.get("lora"):
        raise InputError(
            "The checkpoint is from a run without adapters, but model.lora is set. Remove model.lora to resume it; "
            "to train adapters on its result, export it (lightning-sft export) and use it as model.pretrained."
        )
    given = None if found is None else {name: tuple(shape) for name, shape in found["shapes"].items()}
    if found is None and "state_dict" in checkpoint:  # full, from a strategy that cannot load a partial one
        given = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
    wanted = _kept(module) if found is not None else module.state_dict()
    expected = {name: tuple(value.shape) for name, value in wanted.items()}
    packed = tuple(name for name, parameter in module.named_parameters() if is_packed(parameter))
    if found is None and given is not None:  # sharded checkpoints omit quantized weights
        given, expected = (
            {name: shape for name, shape in shapes.items() if not name.startswith(packed)}
            for shapes in (given, expected)
        )
    if given is not None and given != expected:
        names = sorted(name for name in given.keys() | expected.keys() if given.get(name) != expected.get(name))
        raise InputError(
            f"The checkpoint does not match the model: {names[0]} is {given.get(names[0], 'missing')} in the file "
            f"and {expected.get(names[0], 'missing')} here ({len(names)} mismatches in all). It is from a run with "
            f"{_shown(saved)}. Use the same settings, including model.frozen and model.trained."
        )
    if found is not None:
        _check_base(_tensor(found["base"]), base, saved.get("hf_config") or {}, module)


def complete(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Add the module's own base to the state to load, so that no key is missing."""
    if ADAPTERS_KEY in checkpoint and "state_dict" in checkpoint:
        for name, parameter in module.named_parameters(remove_duplicate=False):
            checkpoint["state_dict"].setdefault(name, parameter)


def _check_base(saved: Tensor, base: Tensor, config: dict[str, Any], module: LightningModule) -> None:
    config, now = _lasting(config), _lasting(module.hparams.get("hf_config") or {})
    differs = [key for key in config.keys() & now.keys() if config[key] != now[key]]
    if differs:
        changes = ", ".join(f"{key}: {config[key]} then, {now[key]} now" for key in sorted(differs))
        raise InputError(
            f"The base {module.pretrained!r} is not the one the adapters were trained on: {changes}. {_REMEDY}"
        )
    if saved.shape != base.shape or not _same(saved, base):
        raise InputError(f"The weights of {module.pretrained!r} are not those the adapters were trained on. {_REMEDY}")


def _lasting(config: Any) -> Any:
    """A configuration, also those of parts in it, without what a run may change."""
    if not isinstance(config, dict):
        return config
    return {key: _lasting(value) for key, value in config.items() if key not in _VOLATILE}


_REMEDY = "Set model.pretrained to the original base; its path may have changed."


def _plain(base: Tensor) -> dict[str, Any]:
    """A tensor as plain values, which remain when a checkpoint is read without its tensors."""
    return {"dtype": str(base.dtype).removeprefix("torch."), "values": base.tolist()}


def _tensor(plain: dict[str, Any]) -> Tensor:
    return torch.tensor(plain["values"], dtype=getattr(torch, plain["dtype"]))


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two fingerprints are equal; in different dtypes, up to the rounding of the coarser one."""
    if a.dtype == b.dtype:
        return torch.equal(a, b)
    error = max(torch.finfo(a.dtype).eps, torch.finfo(b.dtype).eps)
    return torch.allclose(a.double(), b.double(), rtol=error, atol=1e-7)


def _kept(module: nn.Module) -> dict[str, Tensor]:
    """Trained parameters and persistent buffers, such as running statistics."""
    trained = {n: p for n, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    saved = module.state_dict().keys()
    return trained | {n: b for n, b in module.named_buffers(remove_duplicate=False) if n in saved}


def _shown(saved: dict[str, Any]) -> str:
    return ", ".join(f"model.{name}={saved[name]}" for name in _SETTINGS if saved.get(name))
