"""Metrics of an optimizer step beside its loss: throughput, MFU, and the tokens seen so far."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from lightning_sft.machine.peak_rates import peak_rate
from lightning_sft.training.flops import Flops, flops
from lightning_sft.training.trainer import datamodule_of
from lightning_sft.types import Batch

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from transformers import PreTrainedModel

SEEN_KEY = "lightning_sft_seen"
"""Checkpoint key of the numbers of tokens and targets that the run has seen."""

NUM_COUNTS = 4
"""Length of the tensor that :meth:`StepMetrics.counts` returns."""

_STEPS = 10  # window of the mean that rates are computed over
_OLD_KEYS = {"fill": "packing_efficiency", "share_of_peak": "mfu"}  # are logged too, for one release


class StepMetrics:
    """Counts what optimizer steps compute, and measures their time.

    Nothing here waits for the device: counts are known from the shapes of batches, and are summed over ranks in the one
    reduction that a step has anyway; :meth:`close` takes its result on the host. Times are measured between the ends of
    steps and include data loading, but not validation and anything after it until the next micro-batch.
    """

    def __init__(self) -> None:
        self.restored: Sequence[float] | None = None  # the state of a checkpoint
        self._before: Sequence[float] = (0.0, 0.0)
        self._done = _nothing()  # tokens, targets and operations of attention since begin
        self._peak: float | None = None
        self._flops: Flops | None = None
        self._capacity: int | None = None
        self._marks: deque[tuple[float, Tensor]] = deque(maxlen=_STEPS + 1)
        self._paused = 0.0
        self._pause: float | None = None

    def begin(self, trainer: Trainer, model: PreTrainedModel | None) -> None:
        """Begin to measure; called before the first step.

        Args:
            trainer: Lightning trainer.
            model: Transformers model.
        """
        self._before, self.restored = self.restored or (0.0, 0.0), None
        self._done = _nothing()
        self._peak = peak_rate(trainer)
        self._flops = flops(cast("PreTrainedModel", model)) if self._peak else None  # configure_model has loaded it
        self._capacity = getattr(datamodule_of(trainer), "positions_per_batch", None)
        self._marks.clear()
        self._paused, self._pause = 0.0, time.perf_counter()  # until the first batch
        self._marks.append((time.perf_counter(), self._done))

    def pause(self) -> None:
        """Pause the timer until :meth:`resume`, unless it is already paused."""
        self._pause = self._pause or time.perf_counter()

    def resume(self) -> None:
        """Resume the timer after :meth:`pause`."""
        if self._pause is not None:
            self._paused, self._pause = self._paused + time.perf_counter() - self._pause, None

    def counts(self, window: Sequence[Batch]) -> Tensor:
        """``[tokens, operations of attention, micro-batches that are not empty, positions]`` of a rank's step.

        Args:
            window: Micro-batches of the step on this rank.
        """
        tokens = filled = positions = 0
        attention = 0.0
        for batch in window:
            rows, width = batch.input_ids.shape
            lengths = batch.lengths or (width,) * rows
            tokens, filled, positions = tokens + sum(lengths), filled + (sum(lengths) > 0), positions + rows * width
            attention += self._flops.of_pairs(lengths) if self._flops else 0.0
        return torch.tensor([tokens, attention, filled, positions], dtype=torch.float64, device="cpu")

    def close(self, trainer: Trainer, counts: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The metrics at the end of a step.

        Args:
            trainer: Lightning trainer.
            counts: Result of :meth:`counts` summed over ranks, ``[4]``, float64 on the host.
            targets: Number of target tokens of all ranks, a scalar, float64 on the host.
        """
        counts, targets = counts.to(self._done), targets.to(self._done)
        tokens, attention, filled, positions = counts.unbind()
        self._done = self._done + torch.stack([tokens, targets, attention])
        now = time.perf_counter() - self._paused
        then, before = self._marks[0]
        self._marks.append((now, self._done))
        tokens_now, targets_now, attention_now = (self._done - before).unbind()
        seconds = now - then
        found = {
            "tokens_per_second": tokens_now / seconds,
            "targets_per_second": targets_now / seconds,
            "packing_efficiency": tokens / (filled * self._capacity if self._capacity else positions),
            "tokens_seen": self._done[0] + self._before[0],
            "targets_seen": self._done[1] + self._before[1],
            "peak_memory_gib": counts.new_tensor(peak_memory(trainer.strategy.root_device) / 2**30),
        }
        if self._flops is not None and self._peak:
            computed = tokens_now * self._flops.per_token + targets_now * self._flops.per_target + attention_now
            found["mfu"] = computed / (seconds * self._peak * trainer.world_size)
        return found | {old: found[name] for old, name in _OLD_KEYS.items() if name in found}

    def state(self) -> list[float]:
        """Tokens and targets seen, for a checkpoint."""
        return [before + done for before, done in zip(self._before, self._done[:2].tolist(), strict=True)]


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: allocated by torch on a GPU, else the peak resident set size of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _nothing() -> Tensor:
    return torch.zeros(3, dtype=torch.float64, device="cpu")
