"""Answers of the model to a few prompts, before and during training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lightning_sft.callbacks.progress import TrainingProgress
from lightning_sft.callbacks.record import folder_of
from lightning_sft.data.inspect.token_text import visible
from lightning_sft.data.rows.messages import Reading
from lightning_sft.data.tokens.dataset import load_prompts
from lightning_sft.evaluation.generation import Sampling, answer_all
from lightning_sft.io.arguments import Count, check_arguments, made, plain
from lightning_sft.io.disk import rows_of, write
from lightning_sft.io.named import OurNames
from lightning_sft.machine.terminal import Console
from lightning_sft.training.checks import check_data, check_module, check_prompts
from lightning_sft.training.trainer import datamodule_of
from lightning_sft.types import InputError, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_sft.datamodule import SFTDataModule
    from lightning_sft.module import SFTModule

SAMPLES_FOLDER = "samples"
_SHOWN = 400  # characters of a text in the table


class SampleGenerations(Callback, OurNames):
    """Generates answers to the same prompts before training and after each validation.

    Answers are written to ``samples/step=….jsonl`` in the folder of the run, to loggers that support text (TensorBoard,
    Weights & Biases, and others with ``log_text``), and to the console as a table. Training is not affected.

    Args:
        prompts: Number of rows to take from the start of the validation data (of the training data if there is none),
            or the questions themselves.
        max_new_tokens: Maximum number of tokens per answer; ``null`` takes the module's setting.
        sampling: Sampling settings; by default those of the module.
        batch_size: Number of prompts per batch.
        console: Whether to print the table.
    """

    def __init__(
        self,
        prompts: Count | list[str] = 4,
        max_new_tokens: Count | None = 128,
        sampling: Sampling | None = None,
        batch_size: Count = 16,
        console: bool = True,
    ) -> None:
        check_arguments(SampleGenerations, locals())
        if not prompts:
            raise InputError("SampleGenerations.prompts is an empty list. Give a number of rows or a list of texts.")
        self.prompts, self.max_new_tokens, self.sampling = plain(prompts), max_new_tokens, made(Sampling, sampling)
        self.batch_size, self.console = batch_size, console

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the prompts.

        Raises:
            InputError: When module or data are not those of lightning_sft, or a prompt leaves no position for an
                answer.
        """
        check_module(self, pl_module)
        check_data(self, datamodule_of(trainer))
        data = cast("SFTDataModule", datamodule_of(trainer))
        assert data.tokenizer is not None
        self._chosen = _prompts(data, self.prompts)
        check_prompts(self._chosen, getattr(pl_module, "num_positions", None))
        self._questions = [_question(data.tokenizer, prompt) for prompt in self._chosen]
        self._folder, self._before = folder_of(trainer) / SAMPLES_FOLDER, {}
        first = self._folder / "step=00000000.jsonl"
        self._is_first = trainer.global_step == 0
        if not self._is_first and first.is_file():
            self._before = {row["source"]: row["prediction"] for row, _ in rows_of(first)}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Generate the answers of the pretrained model before the first batch, when nothing can refuse the fit."""
        if self._is_first:
            self._is_first = False
            self._ask(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate answers after a validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.global_step:
            self._ask(trainer, pl_module)

    def _ask(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data, module = cast("SFTDataModule", datamodule_of(trainer)), cast("SFTModule", pl_module)
        assert data.tokenizer is not None
        rows = answer_all(module, self._chosen, data.tokenizer, self.batch_size, self.max_new_tokens, self.sampling)
        step = trainer.global_step
        if not trainer.is_global_zero:
            return
        rows = [
            {"step": step, "source": row["source"], "prompt": question, **row}
            for question, row in zip(self._questions, rows, strict=True)
        ]
        self._before = self._before or {row["source"]: row["prediction"] for row in rows}
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write(self._folder / f"step={step:08d}.jsonl", text)
        for logger in trainer.loggers:
            _log(logger, rows, step)
        if self.console:
            bar = trainer.progress_bar_callback  # another console would write into its line
            (bar if isinstance(bar, TrainingProgress) else Console()).print(_table(rows, self._before, step))


def _prompts(data: SFTDataModule, wanted: int | Sequence[str]) -> list[Prompt]:
    if isinstance(wanted, int):
        name = "val" if data.sources["val"] is not None else "train"
        return list(data.prompts_of(name, wanted))[:wanted]
    rows = [{"prompt": text} for text in wanted]
    assert data.tokenizer is not None
    return load_prompts(rows, data.tokenizer, Reading(system=data.reading.system))


def _question(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    return str(tokenizer.decode(list(prompt.input_ids), skip_special_tokens=True))


def _log(logger: Any, rows: Sequence[dict[str, Any]], step: int) -> None:
    """Log the answers if the logger supports text."""
    if hasattr(logger, "log_text"):  # Weights & Biases
        columns = ["step", "source", "prompt", "prediction", "reference"]
        logger.log_text("samples", columns=columns, data=[[row[name] for name in columns] for row in rows], step=step)
    elif hasattr(logger.experiment, "add_text"):  # TensorBoard
        for row in rows:
            parts = {"prompt": row["prompt"], "answer": row["prediction"], "reference": row["reference"]}
            text = "\n\n".join(f"**{name}**\n\n```\n{part}\n```" for name, part in parts.items() if part is not None)
            logger.experiment.add_text(f"samples/{row['source']}", text, step)


def _table(rows: Sequence[dict[str, Any]], before: dict[str, str], step: int) -> Table:
    columns = ["prompt", "before", f"step {step}", "reference"] if step else ["prompt", "before training", "reference"]
    table = Table(*columns, box=SIMPLE_HEAD, header_style="bold", title=f"Answers at step {step}", show_lines=True)
    for row in rows:
        answers = [before.get(row["source"], ""), row["prediction"]] if step else [row["prediction"]]
        cells = [row["prompt"], *answers, row["reference"] or ""]
        short = [cells[0].strip()[-_SHOWN:], *(cell.strip()[:_SHOWN] for cell in cells[1:])]
        table.add_row(*(Text(visible(cell)) for cell in short))
    return table
