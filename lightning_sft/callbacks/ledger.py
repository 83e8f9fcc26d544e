"""The ledger: which samples each optimiser step has consumed, and what came of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info

from lightning_sft.arguments import Count, check_arguments
from lightning_sft.plain import plain
from lightning_sft.trainer_facts import gather, is_between_steps
from lightning_sft.types import Batch, InputError

NAME = "samples.jsonl"


class SampleLedger(Callback):
    """Writes one line an optimiser step to ``samples.jsonl``: its loss, and the samples of all ranks.

    A run that goes on from a checkpoint cuts off the lines of steps after it, which are going to be taken once more: so
    the ledger is that of a run that was never killed. It is written before each checkpoint, never behind one.

    Args:
        dirpath: Folder of the ledger; that of the logger by default, or the trainer's ``default_root_dir``.
        every_n_steps: Steps that ranks keep to themselves before they put them together.
    """

    def __init__(self, dirpath: str | Path | None = None, every_n_steps: Count = 10) -> None:
        check_arguments(SampleLedger, locals())
        self.dirpath, self.every_n_steps = plain(dirpath), every_n_steps
        self._lines: list[dict[str, Any]] = []  # of steps that are not written yet; without the other ranks' samples
        self._samples: list[list[list[str]]] = []  # this rank's, of each of these steps and its micro-batches
        self._window: list[Batch] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the file, and cut off what is going to be done once more."""
        self._lines, self._samples, self._window = [], [], []
        folder = trainer.strategy.broadcast(self.dirpath or trainer.log_dir or trainer.default_root_dir)
        self.path = Path(folder, NAME)
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            last = cut_off(self.path, trainer.global_step)
            if last < trainer.global_step:
                rank_zero_info(f"{self.path} has no lines of steps {last + 1} to {trainer.global_step}.")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep a micro-batch of the step under way."""
        self._window.append(Batch.of(batch))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note a step that has been taken."""
        if not is_between_steps(trainer):
            return
        window, self._window = self._window, []
        loss = trainer.callback_metrics.get("train/loss")
        self._samples.append([[name for name in one.provenance if name != "padding"] for one in window])
        self._lines.append(
            {
                "step": trainer.global_step,
                "epoch": trainer.current_epoch,
                "micro_batch": batch_idx + 1 - len(window),
                "accumulate": trainer.accumulate_grad_batches,
                "seed": getattr(pl_module, "_seed", None),
                "loss": None if loss is None else loss.item(),
                "normalizer": window[0].normalizer,
            }
        )
        if len(self._lines) >= self.every_n_steps:
            self._write(trainer)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """What a checkpoint has seen is on the disk before it is."""
        self._write(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write what is left."""
        self._write(trainer)

    def _write(self, trainer: Any) -> None:
        lines, samples, self._lines, self._samples = self._lines, self._samples, [], []
        if not lines:  # on any rank
            return
        of_steps = zip(*gather(trainer, samples), strict=True)
        if trainer.is_global_zero:
            text = "".join(
                json.dumps({**line, "samples": of_step}, ensure_ascii=False) + "\n"
                for line, of_step in zip(lines, of_steps, strict=True)
            )
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())


def lines_of(path: str | Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The lines of a ledger, each with the position in the file where it ends; a line that was cut short ends them."""
    end = 0
    with Path(path).open("rb") as file:
        for text in file:
            if not text.endswith(b"\n"):
                return
            end += len(text)
            yield json.loads(text), end


def cut_off(path: Path, step: int) -> int:
    """Cut a ledger off after a step; one that has nothing of this run is put aside under another name.

    Args:
        path: The ledger; it need not exist.
        step: The last that is kept.

    Returns:
        The last step that it has.
    """
    if not path.exists():
        return 0
    kept = [(line["step"], end) for line, end in lines_of(path) if line["step"] <= step]
    if not kept:
        free = next(
            p for n in range(1, 1_000_000) if not (p := path.with_name(f"{path.stem}.{n}{path.suffix}")).exists()
        )
        path.rename(free)
        return 0
    os.truncate(path, max(end for _, end in kept))
    return int(kept[-1][0])


def line_of(path: str | Path, step: int) -> dict[str, Any]:
    """The line of a step.

    Raises:
        InputError: When there is no ledger, or no such step in it.
    """
    if not Path(path).is_file():
        raise InputError(f"There is no ledger {str(path)!r}: fit writes one, with the callback SampleLedger.")
    steps = [line for line, _ in lines_of(path)]
    for line in steps:
        if line["step"] == step:
            return line
    have = f"{steps[0]['step']} to {steps[-1]['step']}" if steps else "none"
    raise InputError(f"{path} has no step {step}. It has {have}.")
