"""Learning-rate schedules: the factor on the base learning rate at each optimizer step."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant", "wsd"]


def learning_rate_factor(step: int, total: int, schedule: Schedule = "cosine", warmup: float = 0.03) -> float:
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
