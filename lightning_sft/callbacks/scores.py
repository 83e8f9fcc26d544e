"""Generated answers in ``test``, scored against those of the data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_sft.evaluation.answer_scores import extracted, extracted_from_all, scores
from lightning_sft.evaluation.generation import answer_all
from lightning_sft.io.arguments import Count, check_arguments
from lightning_sft.io.disk import write
from lightning_sft.io.named import OurNames
from lightning_sft.io.words import counted
from lightning_sft.training.checks import check_data, check_module
from lightning_sft.training.trainer import datamodule_of
from lightning_sft.types import InputError

if TYPE_CHECKING:
    from lightning_sft.datamodule import SFTDataModule
    from lightning_sft.module import SFTModule


class ScoreAnswers(Callback, OurNames):
    r"""Generates answers to the prompts of ``data.test``, logs their scores, and writes them to a file.

    The model generates the last answer of each conversation, with ``model.sampling`` and ``model.max_new_tokens``. See
    :mod:`lightning_sft.evaluation.answer_scores` for the metrics.

    Args:
        extract: Regular expression with one group, the part of an answer to compare: ``####\s*(\S+)`` for GSM8K. Empty
            for none.
        rouge: Whether to compute ROUGE.
        bleu: Whether to compute BLEU.
        first: Maximum number of rows of each data set; ``null`` for all.
        batch_size: Number of prompts per batch; by default ``data.predict_batch_size``.
        filename: Name of the file in the logger's folder, or in ``default_root_dir``.
    """

    def __init__(
        self,
        extract: str = "",  # not `str | None`, which jsonargparse parses as YAML, where "#" begins a comment
        rouge: bool = False,
        bleu: bool = False,
        first: Count | None = None,
        batch_size: Count | None = None,
        filename: str = "answers.jsonl",
    ) -> None:
        check_arguments(ScoreAnswers, locals())
        if extract:
            extracted("", extract)  # raises on an invalid expression before anything is computed
        self.extract, self.rouge, self.bleu = extract or None, rouge, bleu
        self.first, self.batch_size, self.filename = first, batch_size, filename

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check module, data and prompts.

        Raises:
            InputError: When module or data are not those of lightning_sft, no row has a reference answer, ``extract``
                does not match one, or a prompt leaves no position for an answer.
        """
        check_module(self, pl_module)
        data = datamodule_of(trainer)
        check_data(self, data)
        prompts = cast("SFTDataModule", data).prompts_of("test", self.first)
        self._prompts = [prompt for prompt in prompts if prompt.reference is not None]
        if not self._prompts:
            raise InputError("ScoreAnswers needs rows with answers: data.test has none.")
        if self.extract is not None:
            references = [str(prompt.reference) for prompt in self._prompts]
            extracted_from_all(references, self.extract, [prompt.provenance for prompt in self._prompts])

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate, write and score the answers."""
        data, module = cast("SFTDataModule", datamodule_of(trainer)), cast("SFTModule", pl_module)
        assert data.tokenizer is not None
        rows = answer_all(module, self._prompts, data.tokenizer, self.batch_size or data.predict_batch_size)
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if trainer.is_global_zero:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write(folder / self.filename, text)
        rank_zero_info(f"{counted(len(rows), 'answer')}: {folder / self.filename}")
        pairs = [row["prediction"] for row in rows], [row["reference"] for row in rows]
        found = scores(*pairs, self.extract, self.rouge, self.bleu)
        found["normalised_match"] = found["normalized_match"]  # the old key, for one release
        pl_module.log_dict({f"test/{name}": value for name, value in found.items()}, batch_size=1, sync_dist=True)
