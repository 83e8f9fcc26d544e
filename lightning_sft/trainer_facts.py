"""What the library asks of Lightning's trainer, in one place."""

from __future__ import annotations

import math
from typing import Any

from lightning_sft.types import InputError


def data_parallel(trainer: Any) -> tuple[int, int]:
    """Rank and size of the data-parallel group: not those of the world, where tensors are parallel too.

    Args:
        trainer: The Lightning trainer, or ``None`` for a single process.
    """
    shares = None if trainer is None else trainer.distributed_sampler_kwargs
    return (shares["rank"], shares["num_replicas"]) if shares else (0, 1)


def planned_limit(num_micro_batches: int, limit: int | float) -> int:
    """How many micro-batches ``limit_train_batches`` leaves: an int is a number, a float a share.

    >>> planned_limit(10, 3), planned_limit(10, 1.0), planned_limit(10, 0.25)
    (3, 10, 2)
    """
    return min(num_micro_batches, limit) if isinstance(limit, int) else int(num_micro_batches * limit)


def total_steps(trainer: Any, *, may_be_endless: bool = False) -> int:
    """Optimiser steps of the whole fit: the fewer of ``max_steps`` and what the data module has planned for its epochs.

    Raises:
        InputError: When neither gives an end, and there has to be one.
    """
    ends = [int(trainer.max_steps)] if trainer.max_steps > 0 else []
    per_epoch = getattr(trainer.datamodule, "steps_per_epoch", None)
    if per_epoch is not None and (trainer.max_epochs or 0) > 0:
        ends.append(int(per_epoch) * int(trainer.max_epochs))
    if ends:
        return min(ends)
    total = trainer.estimated_stepping_batches  # reads the user's own loader: ours has answered already
    if total > 0 and math.isfinite(total):
        return int(total)
    if may_be_endless:
        return 1
    raise InputError(
        "A learning-rate schedule needs an end: set trainer.max_steps or max_epochs, or schedule=constant."
    )
