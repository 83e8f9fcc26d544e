"""A progress bar with the metrics of training."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from logging import StreamHandler
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import RenderableType
from rich.live import Live
from rich.protocol import is_renderable
from rich.text import Text

from lightning_sft.io.arguments import NonNegative, check_arguments
from lightning_sft.io.named import OurNames
from lightning_sft.machine.terminal import Console
from lightning_sft.training.trainer import total_steps
from lightning_sft.types import InputError

_SHOWN = {  # the most important first: a line ends where the terminal does
    "loss": ("train/loss", "{:.3f}"),
    "val": ("val/loss", "{:.3f}"),
    "tokens/s": ("train/tokens_per_second", "{:,.0f}"),
    "lr": ("lr", "{:.1e}"),
    "|g|": ("train/gradient_norm", "{:.2f}"),
    "targets": ("train/targets_seen", "{:,.0f}"),
}
_BAR = 16  # characters


class TrainingProgress(ProgressBar, OurNames):
    """One line of progress with loss, tokens per second, learning rate, gradient norm, targets seen and the time left.

    It never wraps: a narrow terminal shows fewer metrics. Each validation leaves a line with its loss. In a file, which
    has no lines that change, a line is added every ``every_seconds_in_files`` instead. The time left is an estimate for
    the whole fit from the average pace.

    Args:
        every_seconds: Minimum number of seconds between two updates; reading metrics waits for the device.
        every_seconds_in_files: Minimum number of seconds between two lines where the output is a file or a pipe.
    """

    def __init__(self, every_seconds: NonNegative = 0.5, every_seconds_in_files: NonNegative = 30.0) -> None:
        super().__init__()
        check_arguments(TrainingProgress, locals())
        self.every_seconds, self.every_seconds_in_files = every_seconds, every_seconds_in_files
        self._read, self._metrics = 0.0, dict[str, Any]()
        self._begin, self._first, self._total = 0.0, 0, math.inf
        self._line, self._is_enabled = _Line(), True
        self._unshown: Callable[[], None] | None = None  # what the line does not have yet

    def disable(self) -> None:
        """Show nothing: on ranks other than 0, and while Lightning's tuner tries values."""
        self._is_enabled = False

    def enable(self) -> None:
        """Show progress again."""
        self._is_enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the line: texts, or one table or the like of rich."""
        if self._is_enabled:
            is_of_rich = len(args) == 1 and is_renderable(args[0])
            self._line.print(args[0] if is_of_rich else kwargs.get("sep", " ").join(map(str, args)))

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The metrics that are shown, by name, in their order of importance."""
        now = time.monotonic()
        if now - self._read >= self.every_seconds or trainer.global_step >= self._total:
            found = trainer.callback_metrics
            shown = {name: (found[key], form) for name, (key, form) in _SHOWN.items() if key in found}
            self._metrics = {name: form.format(float(value)) for name, (value, form) in shown.items()}
            done, left = trainer.global_step - self._first, self._total - trainer.global_step
            if done and 0 < left < math.inf:
                seconds = (now - self._begin) / done * left
                self._metrics["left"] = str(timedelta(seconds=round(seconds)))
            self._read = now
        return self._metrics

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to measure the pace."""
        self._begin, self._first, self._read = time.monotonic(), trainer.global_step, 0.0
        try:
            self._total = total_steps(trainer)
        except InputError:  # a stream, or a schedule without an end
            self._total = math.inf

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Show the step, if it is time to."""
        self._show("Step", trainer.global_step, self._total, is_fit=True)

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        """Leave the line with the last step."""
        self._show("Step", trainer.global_step, self._total, is_fit=True)
        self._end()

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        """Start the clock, unless this is within a fit."""
        if trainer.state.fn != "fit":
            self._begin = time.monotonic()

    def on_validation_batch_end(
        self, trainer: Trainer, module: Any, out: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Show the batch of validation data."""
        self.has_dataloader_changed(dataloader_idx)
        if not trainer.sanity_checking:  # of two batches
            self._show("Validation", batch_idx + 1, self.total_val_batches_current_dataloader)

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        """Leave a line with the loss."""
        self.reset_dataloader_idx_tracker()
        if trainer.state.fn != "fit":
            self._end()
        elif not trainer.sanity_checking and "val/loss" in trainer.callback_metrics:
            self.print(f"Step {trainer.global_step:,}: val/loss {float(trainer.callback_metrics['val/loss']):.4f}")

    def on_test_start(self, *_: Any) -> None:
        """Start the clock."""
        self._begin = time.monotonic()

    def on_test_batch_end(
        self, trainer: Trainer, module: Any, out: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Show the batch of test data."""
        self.has_dataloader_changed(dataloader_idx)
        self._show("Test", batch_idx + 1, self.total_test_batches_current_dataloader)

    def on_test_end(self, *_: Any) -> None:
        """Leave the line."""
        self.reset_dataloader_idx_tracker()
        self._end()

    def on_predict_start(self, *_: Any) -> None:
        """Start the clock."""
        self._begin = time.monotonic()

    def on_predict_batch_end(
        self, trainer: Trainer, module: Any, out: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Show the batch of prompts."""
        self.has_dataloader_changed(dataloader_idx)
        self._show("Answers", batch_idx + 1, self.total_predict_batches_current_dataloader)

    def on_predict_end(self, *_: Any) -> None:
        """Leave the line."""
        self.reset_dataloader_idx_tracker()
        self._end()

    def on_exception(self, *_: Any) -> None:
        """Leave the line with what was done."""
        self._end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the line with what was done."""
        self._end()

    def _show(self, name: str, done: int, total: float, *, is_fit: bool = False) -> None:
        def show() -> None:
            metrics = self.get_metrics(self.trainer, self.trainer.lightning_module) if is_fit else {}
            self._line.show(name, done, total, time.monotonic() - self._begin, metrics)

        self._unshown = show if self._is_enabled else None
        if self._line.age() >= (self.every_seconds if self._line.changes else self.every_seconds_in_files):
            self._show_now()

    def _show_now(self) -> None:
        if self._unshown is not None:
            self._unshown()
            self._unshown = None

    def _end(self) -> None:
        self._show_now()
        self._line.end()

    def __getstate__(self) -> dict[str, Any]:
        """Without the line, for strategies that pickle callbacks: a terminal belongs to its process."""
        return {**self.__dict__, "_line": _Line(), "_unshown": None}


class _Line:
    """The last line of a terminal or of a notebook's cell; in a file, one line after the other."""

    def __init__(self) -> None:
        self._console, self._shown_at, self._last = Console(highlight=False), -math.inf, ""
        self._live: Live | None = None
        self.changes = self._console.is_terminal or self._console.is_jupyter

    def age(self) -> float:
        """Seconds since the line was shown."""
        return time.monotonic() - self._shown_at

    def show(self, name: str, done: int, total: float, seconds: float, metrics: Mapping[str, str]) -> None:
        """Show the line, in place of the last one where that is possible."""
        width, ascii_only = self._console.width - 1, self._console.options.ascii_only
        line = progress_line(name, done, total, seconds, metrics, width, ascii_only=ascii_only)
        self._shown_at = time.monotonic()
        if self._console.is_jupyter:
            print(f"\r{line:<{len(self._last)}}", end="", flush=True)
        elif not self._console.is_terminal:
            if line != self._last:
                self._console.print(line, soft_wrap=True)
        else:
            if self._live is None:
                self._live = Live(console=self._console, auto_refresh=False)
                with _lightning_follows_stderr():
                    self._live.start()
            self._live.update(Text(line, no_wrap=True), refresh=True)
        self._last = line

    def print(self, text: RenderableType) -> None:
        """Print above the line."""
        if not isinstance(text, str):
            self._console.print(text)
        elif self._console.is_jupyter and self._last:
            print(f"\r{text:<{len(self._last)}}\n{self._last}", end="", flush=True)
        else:
            self._console.print(text, soft_wrap=True)

    def end(self) -> None:
        """Leave the line where it is, and go to the next."""
        if self._live is not None:
            with _lightning_follows_stderr():
                self._live.stop()
        elif self._console.is_jupyter and self._last:
            print(flush=True)
        self._live, self._shown_at, self._last = None, -math.inf, ""


@contextmanager
def _lightning_follows_stderr() -> Iterator[None]:
    """Lightning prints its messages to the same ``sys.stderr`` as before: above the line, while there is one."""
    loggers = map(logging.getLogger, ("lightning.pytorch", "lightning.fabric"))
    handlers = [handler for logger in loggers for handler in logger.handlers if isinstance(handler, StreamHandler)]
    following = [handler for handler in handlers if handler.stream is sys.stderr]
    yield
    for handler in following:
        handler.setStream(sys.stderr)


def progress_line(
    name: str,
    done: int,
    total: float,
    seconds: float,
    metrics: Mapping[str, str],
    width: int,
    *,
    ascii_only: bool = False,
) -> str:
    """A line of progress of at most ``width`` characters, with as many metrics as fit.

    Args:
        name: What is counted.
        done: How many are done.
        total: How many there are; infinite where nobody knows.
        seconds: Seconds since the start.
        metrics: Text of each metric; ``left`` is the time left.
        width: Maximum number of characters.
        ascii_only: Whether the terminal has no other characters.

    >>> metrics = {"loss": "1.703", "tokens/s": "1,130", "lr": "1.9e-06", "left": "0:02:37"}
    >>> progress_line("Step", 6, 26, 50, metrics, 79)
    'Step 6/26 ━━━╸──────────── 0:00:50, 0:02:37 left, loss 1.703, tokens/s 1,130'
    >>> progress_line("Step", 6, 26, 50, metrics, 60, ascii_only=True)
    'Step 6/26 ====------------ 0:00:50, 0:02:37 left, loss 1.703'
    >>> progress_line("Step", 6, float("inf"), 50, {"loss": "1.703"}, 79)
    'Step 6 0:00:50, loss 1.703'
    """
    line = f"{name} {done:,}"
    if done <= total < math.inf:
        halves = round(2 * _BAR * done / total) if total else 0
        full, half = divmod(halves, 2)
        bar = "━" * full + "╸" * half + "─" * (_BAR - full - half)
        line += f"/{total:,} " + (bar.translate({ord("━"): "=", ord("╸"): "=", ord("─"): "-"}) if ascii_only else bar)
    line += f" {timedelta(seconds=int(seconds))}"
    if left := metrics.get("left"):
        line += f", {left} left"
    for key, value in metrics.items():
        if key != "left" and len(line) + len(key) + len(value) + 3 <= width:
            line += f", {key} {value}"
    return line[:width]
