"""Settings of the trainer that Lightning does not take, refused in their own names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from lightning_sft.io.closest import did_you_mean
from lightning_sft.training.trainer import num_devices
from lightning_sft.types import InputError


@contextmanager
def refused_by_name(settings: Mapping[str, Any]) -> Iterator[None]:
    """Context in which a trainer is made: whatever Lightning raises about its settings is one refusal.

    Args:
        settings: Arguments of the trainer.

    Raises:
        InputError: With what is wrong, before anything is made where that can be known.
    """
    _check_devices(settings)
    check_names(settings)
    if settings.get("accelerator") in ("gpu", "cuda") and not (torch.cuda.is_available() or _is_apple(settings)):
        raise InputError(
            f"trainer.accelerator is {settings['accelerator']}, and torch finds no GPU here: lightning-sft doctor says "
            "more. Set it to cpu, or to auto for what there is."
        )
    try:
        yield
    except InputError:
        raise
    except (TypeError, ValueError, ImportError, RuntimeError, MisconfigurationException) as error:
        raise InputError(f"Lightning makes no trainer with these settings (trainer.*): {error}") from error


def check_names(settings: Mapping[str, Any]) -> None:
    """Refuse a strategy or an accelerator that Lightning does not have, whether its devices are here or not.

    Args:
        settings: Arguments of the trainer.

    Raises:
        InputError: With the name that may be meant.
    """
    _check_name("strategy", settings.get("strategy"), StrategyRegistry.available_strategies(), "ddp, fsdp2")
    _check_name(
        "accelerator", settings.get("accelerator"), [*AcceleratorRegistry.available_accelerators(), "gpu"], "cpu, gpu"
    )


def _check_devices(settings: Mapping[str, Any]) -> None:
    """Refuse a number of devices that is none, and on a CPU one that only other devices have."""
    devices, accelerator = settings.get("devices"), settings.get("accelerator")
    num_devices(SimpleNamespace(**settings))
    is_on_cpu = accelerator == "cpu" or (accelerator == "auto" and not _has_device())
    if is_on_cpu and str(devices) != "auto" and not str(devices).isdecimal():
        raise InputError(
            f"trainer.devices is {devices}; on a CPU, expected the number of processes. Set it to 1, or to auto."
        )


def _check_name(key: str, name: Any, known: Iterable[str], examples: str) -> None:
    if isinstance(name, str) and name.lower() not in (*known, "auto"):
        closest = did_you_mean([name], known)
        raise InputError(f"trainer.{key} is {name}; expected one that Lightning has, as {examples} or auto.{closest}")


def _has_device() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def _is_apple(settings: Mapping[str, Any]) -> bool:
    return settings["accelerator"] == "gpu" and torch.backends.mps.is_available()
