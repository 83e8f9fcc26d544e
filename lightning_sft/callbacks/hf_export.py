"""Hugging Face folders out of a run, while it goes on and at its end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from transformers import PreTrainedTokenizerBase

from lightning_sft.checkpoints.run_info import RUN_INFO_KEY, run_info
from lightning_sft.data.batches.collate import collate
from lightning_sft.data.rows.mixture import as_mixture
from lightning_sft.export import parity
from lightning_sft.export.convert import Dtype, Live, Settings, convert, from_checkpoint, rows_to_compare
from lightning_sft.export.folder import check_is_free
from lightning_sft.export.gguf_file import GGUFType
from lightning_sft.io.arguments import Count, NonNegative, check_arguments
from lightning_sft.model.parallel.rank_zero import FirstRank, whole_state
from lightning_sft.model.pretrained import load_tokenizer
from lightning_sft.strategies import layout
from lightning_sft.training.checks import check_module
from lightning_sft.training.trainer import callbacks_of, datamodule_of, is_fast_dev_run
from lightning_sft.types import Conversation, Example, InputError

if TYPE_CHECKING:
    from lightning_sft.datamodule import SFTDataModule
    from lightning_sft.module import SFTModule


class HFExport(Callback):
    """Writes the model as a Hugging Face folder, compared with the one in training: every rank takes part.

    The folder of the end is called ``final``, others ``step-N`` and ``best``. Where one does not pass, the run fails at
    its end, and is warned before.

    Args:
        folder: Where the folders are written; ``huggingface`` beside the run's logs by default.
        every_n_steps: Write one every so many optimizer steps; none by default.
        at_end: Write one at the end of the training.
        best: Write one of the best checkpoint, when the training has ended.
        dtype: Of the weights; that of the trained ones by default. 16 bits halve a folder and round the weights.
        max_shard_size: Of a file of weights.
        rows: Rows to compare on; by default the first ones of the validation data.
        max_kl: Largest mean KL(trained || exported) in nats a token; by default 1e-6, or 1e-2 where 16 bits come in.
        gguf_converter: convert_hf_to_gguf.py of llama.cpp, to write a GGUF file too, and compare it.
        gguf_type: How the GGUF file stores weights.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        every_n_steps: Count | None = None,
        at_end: bool = True,
        best: bool = False,
        dtype: Dtype | None = None,
        max_shard_size: str = "5GB",
        rows: str | Path | None = None,
        max_kl: NonNegative | None = None,
        gguf_converter: str | Path | None = None,
        gguf_type: GGUFType = "f16",
    ) -> None:
        check_arguments(HFExport, locals())
        self.folder, self.every_n_steps, self.at_end, self.best, self.rows = folder, every_n_steps, at_end, best, rows
        self.settings = Settings(dtype, max_shard_size, max_kl, gguf_converter, gguf_type)
        self._first: FirstRank | None = None
        self._root = Path()
        self._last_step = 0
        self._error: Exception | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing has been done in this fit; one whose checkpoint has made the last step trains no more."""
        self._first, self._error = None, None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to write over what another run has written.

        Raises:
            InputError: When the folder has something in it, and this run does not go on from a checkpoint; the rows
                cannot be read; the module is of another kind; or weights would be averaged too late.
        """
        check_module(self, pl_module)
        callbacks = callbacks_of(trainer)
        if _averages(callbacks[callbacks.index(self) :]):
            raise InputError(
                "HFExport stands before a WeightAveraging, which puts the averages into the model when the training "
                "ends: the folder would be without them. Put HFExport after it in trainer.callbacks."
            )
        self._begin(trainer)
        if is_fast_dev_run(trainer):
            rank_zero_info("HFExport writes nothing under trainer.fast_dev_run.")
        elif trainer.global_step == 0:
            self._first_rank(self._check)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a folder after every so many optimizer steps."""
        step, before, self._last_step = trainer.global_step, self._last_step, trainer.global_step
        is_due = self.every_n_steps is not None and step > before and step % self.every_n_steps == 0
        if is_due and (error := self._export(trainer, pl_module, f"step-{step}")):
            rank_zero_warn(f"Step {step} was not exported, the training goes on. {error}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last folder; if it fails, that is said when the last checkpoint is written too."""
        if self.at_end:
            self._error = self._export(trainer, pl_module, "final")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder of the best checkpoint; and that of the end, where it failed after the last step of a run.

        Raises:
            InputError: When one does not pass.
        """
        if self._first is None:  # the run has been resumed after its last step: it may not have come to this
            self._begin(trainer)
            is_missing = self._first_rank(lambda: not (self._root / "final").exists())
            if self.at_end and is_missing and not is_fast_dev_run(trainer):
                if _averages(callbacks_of(trainer)):
                    rank_zero_warn("The last folder is missing: lightning-sft export writes the averaged weights.")
                else:
                    self._error = self._export(trainer, pl_module, "final")
        if self._error is not None:
            raise self._error
        if not self.best or is_fast_dev_run(trainer):
            return
        path = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if not path:
            rank_zero_warn("HFExport(best=True) has no effect: there is no checkpoint. Add a ModelCheckpoint.")
            return

        def write() -> None:
            with _without_zero3(pl_module):
                from_checkpoint(path, self._root / "best", self._rows(trainer), self.settings, replace=True)

        self._first_rank(write)

    def _begin(self, trainer: Trainer) -> None:
        self._root = Path(self.folder) if self.folder else Path(trainer.log_dir or ".") / "huggingface"
        self._first, self._error, self._last_step = FirstRank(), None, trainer.global_step

    @property
    def _first_rank(self) -> FirstRank:
        assert self._first is not None
        return self._first

    def _check(self) -> None:
        check_is_free(self._root)
        if self.rows is not None:
            rows_to_compare({}, self.rows)

    def _export(self, trainer: Trainer, pl_module: LightningModule, name: str) -> Exception | None:
        """Write a folder, and give back what every rank knows to have gone wrong."""
        first, module = self._first_rank, cast("SFTModule", pl_module)
        if is_fast_dev_run(trainer):
            return None
        tokenizer = _tokenizer(trainer, module)

        def read() -> tuple[tuple[str, Sequence[Conversation]], list[Example]]:
            rows = self._rows(trainer)
            return rows, parity.sequences(rows[1], tokenizer)

        found, error = first.tried(read)  # the others may not have the file
        if found is None:
            return error
        rows, examples = found
        with module.evaluated():
            live = _live(trainer, module, examples)
            state = whole_state(module, keep=first.is_here)
        whole = {"hyper_parameters": dict(module.hparams), "state_dict": state, RUN_INFO_KEY: run_info(trainer)}

        def write() -> None:
            module.tuning.shrink(whole, module)  # with adapters, their base is read again, as from a checkpoint
            with _without_zero3(module):
                convert(whole, tokenizer, self._root / name, rows, self.settings, live, replace=True)

        return first.tried(write)[1]

    def _rows(self, trainer: Trainer) -> tuple[str, Sequence[Conversation]]:
        data = cast("SFTDataModule", datamodule_of(trainer))  # or a user's own
        source = getattr(data, "sources", {}).get("val")
        if self.rows is None and source is not None:
            with suppress(InputError):  # an iterator that has come to its end, say
                found = parity.held_out(as_mixture(source), data.format, data.columns)
                return f"{len(found)} rows of the run's validation data", found
        return rows_to_compare({}, self.rows)


def _averages(callbacks: Sequence[Callback]) -> bool:
    return any(isinstance(callback, WeightAveraging) for callback in callbacks)


def _live(trainer: Trainer, module: SFTModule, examples: Sequence[Example]) -> Live:
    """Log Pr of the targets under the model in training; every rank computes the same."""
    with _evaluation(module):
        batches = [collate([example], packed=False).to(module.device) for example in examples]
        found = torch.cat([module(batch).log_probs.float().cpu() for batch in batches])
    is_whole = {p.dtype for p in module.parameters() if p.is_floating_point()} <= {torch.float32, torch.float64}
    is_whole &= layout(trainer.strategy)[0] in (None, "float32")
    is_whole &= module.device.type == "cpu" or torch.get_float32_matmul_precision() == "highest"
    return Live(examples, found, in_16_bits=not is_whole)


def _tokenizer(trainer: Trainer, module: SFTModule) -> PreTrainedTokenizerBase:
    found = getattr(datamodule_of(trainer), "tokenizer", None)
    return found if isinstance(found, PreTrainedTokenizerBase) else load_tokenizer(module.pretrained)


@contextmanager
def _without_zero3(module: LightningModule) -> Iterator[None]:
    """Models are loaded whole, by this rank alone: under ZeRO-3, transformers would ask the others for their pieces."""
    config = getattr(module, "_zero3", None)
    if config is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode
