"""Learning-rate schedules: the factor on the base learning rate at each optimizer step, or a scheduler of torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.cli import LRSchedulerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from lightning_sft.training.monitors import VALIDATE, check_monitor
from lightning_sft.training.trainer import total_steps
from lightning_sft.types import InputError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

NamedSchedule = Literal["cosine", "linear", "constant", "wsd"]
Schedule = NamedSchedule | LRSchedulerCallable

WARMUP = 0.03  # steps of warm-up of a named schedule, as a share of all
_NEVER = 2**62  # optimizer steps between those of a scheduler that Lightning leaves alone


def learning_rate_factor(step: int, total: int, schedule: NamedSchedule = "cosine", warmup: float = WARMUP) -> float:
    """Linear warm-up to 1, then the schedule down to 0 at ``total``; ``constant`` stays at 1.

    ``wsd`` (warm-up, stable, decay) stays at 1 and falls linearly over the last fifth of the steps.

    Args:
        step: Index of the optimizer step about to be taken, from 0.
        total: Total number of optimizer steps.
        schedule: The shape after the warm-up.
        warmup: Steps of warm-up as a share of ``total``.

    >>> [round(learning_rate_factor(step, 10, "linear", warmup=0.2), 3) for step in (0, 1, 2, 6, 9, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.125, 0.0]
    """
    rising = math.ceil(warmup * total)
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    falling = total - rising if schedule != "wsd" else math.ceil(total / 5)
    left = min(1.0, max(0, total - step) / max(1, falling))  # from 1 down to 0
    return 0.5 * (1 - math.cos(math.pi * left)) if schedule == "cosine" else left


def named_scheduler(optimizer: Optimizer, schedule: NamedSchedule, warmup: float, total: int) -> LambdaLR:
    """Scheduler of a named schedule; the first factor is set when training starts.

    Args:
        optimizer: Optimizer whose learning rates are scaled.
        schedule: The shape after the warm-up.
        warmup: Steps of warm-up as a share of ``total``.
        total: Total number of optimizer steps.
    """
    scheduler = LambdaLR(optimizer, lambda step: learning_rate_factor(step, total, schedule, warmup))
    for group in optimizer.param_groups:  # a schedule of a subclass begins at the rate that was asked for
        group["lr"] = deepcopy(group["initial_lr"])
    return scheduler


def with_scheduler(
    optimizer: Optimizer, make: LRSchedulerCallable, trainer: Trainer, warmup: float = WARMUP
) -> OptimizerLRScheduler:
    """The optimizer with a scheduler of torch, which Lightning steps after each optimizer step.

    ``ReduceLROnPlateau`` is stepped by :func:`step_plateau` instead, on its ``monitor`` if it has one, else on
    ``val/loss``.

    Args:
        optimizer: Optimizer whose learning rates are scheduled.
        make: Function that makes the scheduler from the optimizer.
        trainer: The Lightning trainer.
        warmup: What was asked for with a named schedule in mind; it has no effect here, which is said.

    Raises:
        InputError: For a ``ReduceLROnPlateau`` without validation data, or settings that the scheduler does not take.
    """
    if warmup not in (0, WARMUP):
        rank_zero_warn(
            f"model.warmup={warmup:g} has no effect beside a scheduler of torch. Give the scheduler a warm-up of its "
            "own, such as a SequentialLR that begins with a LinearLR."
        )
    try:
        scheduler = make(optimizer)
    except (ValueError, TypeError, KeyError) as error:  # KeyError of an optimizer without momentum
        raise InputError(f"model.schedule: the scheduler does not take its optimizer or settings: {error}.") from error
    if not hasattr(scheduler, "step"):
        raise InputError(
            f"model.schedule has made an object of type {type(scheduler).__name__}; expected a scheduler of torch. "
            "Give a name, or a function of the optimizer, as functools.partial(torch.optim.lr_scheduler.StepLR, "
            "step_size=9)."
        )
    config: Any = {"scheduler": scheduler, "interval": "step"}
    if isinstance(scheduler, ReduceLROnPlateau):
        if not trainer.enable_validation:
            raise InputError(f"model.schedule=ReduceLROnPlateau is stepped after each validation: {VALIDATE}.")
        monitor = getattr(scheduler, "monitor", "val/loss")
        check_monitor(trainer, "model.schedule=ReduceLROnPlateau", monitor)
        config |= {"monitor": monitor, "frequency": _NEVER}
    return {"optimizer": optimizer, "lr_scheduler": config}


def check_length(trainer: Trainer) -> None:
    """Refuse schedulers of torch that end before the fit, as ``OneCycleLR`` does with an error.

    Args:
        trainer: The Lightning trainer, with its optimizers restored where it resumes.

    Raises:
        InputError: When one has fewer steps than the fit.
    """
    for config in trainer.lr_scheduler_configs:
        by_step = config.interval == "step"
        needed = (total_steps(trainer, may_be_endless=True) if by_step else trainer.max_epochs or 0) // config.frequency
        for scheduler, steps in _with_parts(config.scheduler, needed):
            given = getattr(scheduler, "total_steps", None)  # of a OneCycleLR
            if isinstance(given, int) and given < steps:
                raise InputError(
                    f"{type(scheduler).__name__} ends after total_steps={given}, but the fit has {steps} "
                    f"{'optimizer steps' if by_step else 'epochs'} for it. Set total_steps to that, or limit the fit "
                    "(trainer.max_steps)."
                )
            half = getattr(scheduler, "T_max", None)  # of a CosineAnnealingLR, which rises again after it
            if isinstance(half, int) and 0 < half < steps:
                rank_zero_warn(
                    f"{type(scheduler).__name__} is at its lowest learning rate after T_max={half}, and rises again: "
                    f"the fit has {steps} {'optimizer steps' if by_step else 'epochs'} for it. Set T_max to that, or "
                    "use model.schedule=cosine, which takes the length of the fit."
                )


def _with_parts(scheduler: Any, steps: int) -> Iterator[tuple[Any, int]]:
    """A scheduler and those that it consists of, each with how often it is stepped."""
    yield scheduler, steps
    begins = [0, *getattr(scheduler, "_milestones", ())]  # of a SequentialLR; a ChainedScheduler steps all at once
    ends = [*begins[1:], steps]
    for number, part in enumerate(getattr(scheduler, "_schedulers", ())):
        own = min(ends[number], steps) - begins[number] if len(begins) > 1 else steps
        yield from _with_parts(part, own)


def step_plateau(trainer: Trainer) -> None:
    """Step a ``ReduceLROnPlateau`` of :func:`with_scheduler` after a validation.

    Lightning counts micro-batches of an epoch instead, and misses validations within an optimizer step, at times, or
    at the end of a stream; at the end of an epoch it steps after the checkpoint is saved.

    Raises:
        InputError: When its metric was not logged.
    """
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and config.frequency == _NEVER:
            logged = trainer.callback_metrics
            if config.monitor not in logged:
                known = ", ".join(sorted(logged))
                raise InputError(
                    f"ReduceLROnPlateau: the metric {config.monitor!r} was not logged. Logged are {known}."
                )
            trainer.lightning_module.lr_scheduler_step(config.scheduler, logged[config.monitor])
