"""With what optimizer and schedule a loaded checkpoint was trained, compared with those of a new fit from it.

A checkpoint holds the hyperparameters of its module, and no code: neither its optimizer nor a scheduler of torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_sft.checkpoints.reading import RUN_INFO_KEY
from lightning_sft.checkpoints.run_info import optimizer_facts

_SHOWN = ("lr", "weight_decay")  # settings that are named whether or not they differ


class TrainedWith:
    """What a checkpoint says of the optimizer and the schedule that it was trained with.

    Args:
        checkpoint: Loaded checkpoint.
    """

    def __init__(self, checkpoint: Mapping[str, Any]) -> None:
        of_run, of_module = checkpoint.get(RUN_INFO_KEY) or {}, checkpoint.get("hyper_parameters") or {}
        self.optimizer: dict[str, Any] = dict(of_run.get("optimizer") or {})
        self.has_own_scheduler = "warmup" in of_module and "schedule" not in of_module

    def warn_of_default_optimizer(self, optimizer: Optimizer) -> None:
        """Warn of the default optimizer in a fit from the checkpoint, where it was trained with another one.

        Args:
            optimizer: The default optimizer.
        """
        before, now = self.optimizer, optimizer_facts(optimizer)
        different = [name for name in before if name not in now or before[name] != now[name]]
        if not different:
            return
        if before["class"] == now["class"]:
            settings = [name for name in before if name in different and name != "class"]
        else:
            settings = [name for name in _SHOWN if name in before]
        kind = str(before["class"])
        given = ", ".join(f"{name}={before[name]}" for name in settings)
        path = f"torch.optim.{kind}" if hasattr(torch.optim, kind) else kind
        make = f"optimizer=functools.partial({path}, {given})" if " and " not in kind else "optimizers=[...], its parts"
        rank_zero_warn(
            f"The checkpoint was trained with {_said(before, settings)}, and this fit uses the default optimizer, "
            f"{_said(now, settings)}: a checkpoint does not hold its optimizer. To train as before, load it with "
            f"{make}. To resume its run, pass it as trainer.fit(..., ckpt_path=...) too."
        )

    def warn_of_default_schedule(self, schedule: str, warmup: float) -> None:
        """Warn of a named schedule in a fit from the checkpoint, where it was trained with a scheduler of torch.

        Args:
            schedule: Name of the schedule.
            warmup: Warm-up, as a share of the steps.
        """
        if self.has_own_scheduler:
            rank_zero_warn(
                "The checkpoint was trained with a scheduler of torch, which no checkpoint holds, and this fit uses "
                f"schedule={schedule!r} with warmup={warmup:g}. To train as before, load it with schedule=..., a "
                "function that makes the scheduler from the optimizer; to have what is used, with its name."
            )


def _said(facts: Mapping[str, Any], names: list[str]) -> str:
    given = ", ".join(f"{name}={facts[name]}" for name in names if name in facts)
    return f"{facts['class']}({given})"
