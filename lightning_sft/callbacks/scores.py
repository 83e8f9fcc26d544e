"""Answers in ``test``, compared with those of the data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_sft.evaluation.answer_scores import extracted, scores
from lightning_sft.evaluation.generation import answer_all
from lightning_sft.io.arguments import Count, check_arguments
from lightning_sft.io.disk import write
from lightning_sft.training.checks import check_data, check_module
from lightning_sft.training.trainer import datamodule_of
from lightning_sft.types import InputError

if TYPE_CHECKING:
    from lightning_sft.datamodule import SFTDataModule
    from lightning_sft.module import SFTModule


class ScoreAnswers(Callback):
    r"""Has the model answer the prompts of ``data.test``, and logs how well; also writes the answers to a file.

    The last answer of each conversation is asked for. How tokens are chosen, and how many at most, the module says
    (``model.sampling``, ``model.max_new_tokens``). See :mod:`lightning_sft.evaluation.answer_scores` for the figures.

    Args:
        extract: A regular expression with one group, the part of an answer to compare: ``####\s*(\S+)`` for GSM8K. Not
            ``str | None``, of which jsonargparse would read what begins with ``#`` as a comment.
        rouge: Whether to compute ROUGE.
        bleu: Whether to compute BLEU.
        first: Ask no more than the first so many rows of each data set.
        batch_size: Prompts that are answered at a time; ``data.predict_batch_size`` by default.
        filename: Of the file in the folder of the logger, or in ``default_root_dir``.
    """

    def __init__(
        self,
        extract: str = "",
        rouge: bool = False,
        bleu: bool = False,
        first: Count | None = None,
        batch_size: Count | None = None,
        filename: str = "answers.jsonl",
    ) -> None:
        check_arguments(ScoreAnswers, locals())
        if extract:
            extracted("", extract)  # refuses what is no expression before anything is computed
        self.extract, self.rouge, self.bleu = extract or None, rouge, bleu
        self.first, self.batch_size, self.filename = first, batch_size, filename

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what it cannot ask.

        Raises:
            InputError: With a module or data of another kind, when no row has an answer to compare with, or a prompt
                leaves the model no position for an answer.
        """
        check_module(self, pl_module)
        data = datamodule_of(trainer)
        check_data(self, data)
        prompts = cast("SFTDataModule", data).prompts_of("test", self.first)
        self._prompts = [prompt for prompt in prompts if prompt.reference is not None]
        if not self._prompts:
            raise InputError("ScoreAnswers needs rows with answers: data.test has none.")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate, write and score."""
        data, module = cast("SFTDataModule", datamodule_of(trainer)), cast("SFTModule", pl_module)
        assert data.tokenizer is not None
        rows = answer_all(module, self._prompts, data.tokenizer, self.batch_size or data.predict_batch_size)
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if trainer.is_global_zero:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write(folder / self.filename, text)
        rank_zero_info(f"{len(rows)} answers: {folder / self.filename}")
        pairs = [row["prediction"] for row in rows], [row["reference"] for row in rows]
        found = scores(*pairs, self.extract, self.rouge, self.bleu)
        pl_module.log_dict({f"test/{name}": value for name, value in found.items()}, batch_size=1, sync_dist=True)
