"""What is logged of an optimiser step beside its loss: how much was computed, how fast, and what has been seen."""

from __future__ import annotations

import sys
import time
import warnings
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.throughput import _plugin_to_compute_dtype, get_available_flops
from torch import Tensor

from lightning_sft.types import Batch

SEEN = "lightning_sft_seen"
"""Under which key a checkpoint has the numbers of tokens and targets that the run has seen."""

NUM_COUNTS = 4
"""How many numbers :meth:`StepFigures.counts` gives."""

_STEPS = 10  # that speeds are a mean of


class StepFigures:
    """Counts what optimiser steps compute, and measures their time.

    Nothing here waits for the device: counts are known from the shapes of batches, and are summed over ranks in the one
    reduction that a step has anyway. Times are those between the ends of steps, reading data included; validations, and
    what follows them until the next micro-batch, are not.
    """

    def __init__(self) -> None:
        self.restored: Sequence[float] | None = None  # the state of a checkpoint
        self._before: Sequence[float] = (0.0, 0.0)
        self._done = torch.zeros(3, dtype=torch.float64, device="cpu")  # tokens, targets and pairs of this process
        self._marks: deque[tuple[float, Tensor]] = deque(maxlen=_STEPS + 1)
        self._paused = 0.0
        self._pause: float | None = None

    def begin(self, trainer: Any, model: Any) -> None:
        """Begin to measure; called before the first step.

        Args:
            trainer: That of Lightning.
            model: Of transformers.
        """
        self._before, self.restored = self.restored or (0.0, 0.0), None
        self._done = torch.zeros(3, dtype=torch.float64, device="cpu")
        self._peak = peak_rate(trainer)
        self._flops = flops(model) if self._peak else None
        self._capacity = getattr(trainer.datamodule, "positions_per_batch", None)
        self._marks.clear()
        self._paused, self._pause = 0.0, None
        self._marks.append((time.perf_counter(), self._done))

    def pause(self) -> None:
        """Stop the time until :meth:`go_on`, unless it is stopped already."""
        self._pause = self._pause or time.perf_counter()

    def go_on(self) -> None:
        """Go on measuring, where the time was stopped."""
        if self._pause is not None:
            self._paused, self._pause = self._paused + time.perf_counter() - self._pause, None

    def counts(self, window: Sequence[Batch]) -> Tensor:
        """``[tokens, pairs of tokens that attend, micro-batches that are not empty, positions]`` of a rank's step.

        Args:
            window: Its micro-batches.
        """
        tokens = pairs = filled = positions = 0
        for batch in window:
            rows, width = batch.input_ids.shape
            lengths = batch.lengths or (width,) * rows
            tokens, pairs = tokens + sum(lengths), pairs + sum(n * (n + 1) // 2 for n in lengths)
            filled, positions = filled + (sum(lengths) > 0), positions + rows * width
        return torch.tensor([tokens, pairs, filled, positions], dtype=torch.float64, device="cpu")

    def close(self, trainer: Any, counts: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The figures at the end of a step.

        Args:
            trainer: That of Lightning.
            counts: Those of :meth:`counts`, summed over ranks.
            targets: Target tokens of all ranks.
        """
        tokens, pairs, filled, positions = counts.unbind()
        self._done = self._done.to(counts) + torch.stack([tokens, targets, pairs])
        now = time.perf_counter() - self._paused
        then, before = self._marks[0]
        self._marks.append((now, self._done))
        tokens_now, targets_now, pairs_now = (self._done - before.to(counts)).unbind()
        seconds = now - then
        found = {
            "tokens_per_second": tokens_now / seconds,
            "targets_per_second": targets_now / seconds,
            "fill": tokens / (filled * self._capacity if self._capacity else positions),
            "tokens_seen": self._done[0] + self._before[0],
            "targets_seen": self._done[1] + self._before[1],
            "peak_memory_gib": counts.new_tensor(peak_memory(trainer.strategy.root_device) / 2**30),
        }
        if self._flops is not None and self._peak:
            per_token, per_target, per_pair = self._flops
            computed = tokens_now * per_token + targets_now * per_target + pairs_now * per_pair
            found["share_of_peak"] = computed / (seconds * self._peak * trainer.world_size)
        return found

    def state(self) -> list[float]:
        """Tokens and targets seen, for a checkpoint."""
        return [before + done for before, done in zip(self._before, self._done[:2].tolist(), strict=True)]


def flops(model: Any) -> tuple[float, float, float] | None:
    """Floating-point operations of a training step for a token, for a target, and for a pair of tokens that attend.

    A matrix of n numbers takes 2n in the forward pass, 2n for the gradient of its input, and, where it is trained, 2n
    for its own. The head is applied to targets alone. A pair takes 12 times the width of all heads in each layer. What
    is computed once more for gradient checkpointing does not count. ``None`` where experts take turns.

    Args:
        model: Of transformers.
    """
    config = model.config.get_text_config()
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return None
    ends = {id(p) for end in (model.get_input_embeddings(), model.get_output_embeddings()) for p in end.parameters()}
    head = list(model.get_output_embeddings().parameters())
    inner = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in ends]
    per_token, per_target = (
        float(sum(_numel(p) * (6 if p.requires_grad else 4) for p in own)) for own in (inner, head)
    )
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return per_token, per_target, 12.0 * config.num_hidden_layers * config.num_attention_heads * width


def peak_rate(trainer: Any) -> float | None:
    """Floating-point operations that a device can do in a second at the trainer's precision, where Lightning knows."""
    name = getattr(trainer.strategy, "compute_dtype", None)  # that of fsdp2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of chips that Lightning does not know: there is no figure then
        dtype = getattr(torch, name) if name else _plugin_to_compute_dtype(trainer.precision_plugin)
        return get_available_flops(trainer.strategy.root_device, dtype)


def peak_memory(device: torch.device) -> int:
    """Most bytes that were allocated at a time: on a GPU by torch, else the most the process had in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _numel(parameter: Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
