"""Hugging Face folders written during a run and at its end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lightning_sft.checkpoints.reading import RUN_INFO_KEY, Checkpoint
from lightning_sft.checkpoints.run_info import run_info
from lightning_sft.data.batches.collate import collate
from lightning_sft.data.rows.mixture import as_mixture
from lightning_sft.data.tokens.held_out import side_of
from lightning_sft.export import parity
from lightning_sft.export.convert import Dtype, Live, Settings, convert, from_checkpoint, rows_to_compare
from lightning_sft.export.gguf_file import GGUFType, check_converter
from lightning_sft.export.shards import ShardedWeights, convert_shards
from lightning_sft.io.arguments import Count, FileSize, NonNegative, check_arguments
from lightning_sft.io.disk import check_is_free
from lightning_sft.io.named import OurNames
from lightning_sft.io.words import counted
from lightning_sft.machine.contexts import eval_mode
from lightning_sft.model.parallel.rank_zero import FirstRank, whole_state
from lightning_sft.model.pretrained import load_tokenizer
from lightning_sft.strategies import layout
from lightning_sft.training.checks import check_module
from lightning_sft.training.trainer import averages_weights, callbacks_of, datamodule_of, is_fast_dev_run
from lightning_sft.types import Conversation, Example, InputError

if TYPE_CHECKING:
    from lightning_sft.datamodule import SFTDataModule
    from lightning_sft.module import SFTModule


class HFExport(Callback, OurNames):
    """Exports the model as Hugging Face folders and compares them with the model in training; all ranks take part.

    The folder written at the end is called ``final``, others ``step-N`` and ``best``. If the comparison fails, the run
    warns during training and raises an error at the end.

    Args:
        dirpath: Parent of the exported folders; by default ``huggingface`` beside the run's logs.
        every_n_steps: Number of optimizer steps between two exports; ``None`` exports none during training.
        at_end: Whether to export at the end of training.
        best: Whether to export the best checkpoint after training.
        dtype: Dtype of the exported weights; by default that of training. Half precision halves the size and rounds.
        max_shard_size: Maximum size of a weight file.
        rows: File of rows to compare on; by default the first rows of the validation data.
        max_kl: Maximum mean KL(trained || exported) in nats per token; by default 1e-6, or 1e-2 with half precision.
        gguf_converter: Path of llama.cpp's convert_hf_to_gguf.py, to also write and compare a GGUF file.
        gguf_type: Storage type of the weights in the GGUF file.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        every_n_steps: Count | None = None,
        at_end: bool = True,
        best: bool = False,
        dtype: Dtype | None = None,
        max_shard_size: FileSize = "5GB",
        rows: str | Path | None = None,
        max_kl: NonNegative | None = None,
        gguf_converter: str | Path | None = None,
        gguf_type: GGUFType = "f16",
    ) -> None:
        check_arguments(HFExport, locals())
        self.dirpath, self.every_n_steps, self.at_end, self.best, self.rows = dirpath, every_n_steps, at_end, best, rows
        self.settings = Settings(dtype, max_shard_size, max_kl, gguf_converter, gguf_type)
        self._first: FirstRank | None = None
        self._root = Path()
        self._last_step = 0
        self._error: Exception | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the state of the previous fit; ``on_train_start`` does not run if the last step is done already."""
        self._first, self._error = None, None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to overwrite another run's exports.

        Raises:
            InputError: When the folder is not empty and this run does not resume from a checkpoint; the rows cannot be
                read; the module is not an SFTModule; or weights would be averaged only after the export.
        """
        check_module(self, pl_module)
        callbacks = callbacks_of(trainer)
        if averages_weights(callbacks[callbacks.index(self) :]):
            raise InputError(
                "HFExport comes before a WeightAveraging, which loads the averaged weights when training ends, so they "
                "would not be exported. Put HFExport after it in trainer.callbacks."
            )
        self._begin(trainer)
        if is_fast_dev_run(trainer):
            rank_zero_info("HFExport writes nothing under trainer.fast_dev_run.")
        elif trainer.global_step == 0:
            self._first_rank(self._check)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Export every ``every_n_steps`` optimizer steps."""
        step, before, self._last_step = trainer.global_step, self._last_step, trainer.global_step
        is_due = self.every_n_steps is not None and step > before and step % self.every_n_steps == 0
        if is_due and (error := self._export(trainer, pl_module, f"step-{step}")):
            rank_zero_warn(f"Step {step} was not exported; training continues. {error}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export the final model; an error is raised in ``on_fit_end``, after the last checkpoint is saved."""
        if self.at_end:
            self._error = self._export(trainer, pl_module, "final")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export the best checkpoint, and the final model if a run killed after its last step did not.

        Raises:
            InputError: When an export fails or differs from the model in training.
        """
        if self._first is None:  # resumed after the last step: the final export may be missing
            self._begin(trainer)
            is_missing = self._first_rank(lambda: not (self._root / "final").exists())
            if self.at_end and is_missing and not is_fast_dev_run(trainer):
                if averages_weights(callbacks_of(trainer)):
                    rank_zero_warn(
                        "The final export is missing: use lightning-sft export to write the averaged weights."
                    )
                else:
                    self._error = self._export(trainer, pl_module, "final")
        if self._error is not None:
            raise self._error
        if not self.best or is_fast_dev_run(trainer):
            return
        savers = [saver for saver in trainer.checkpoint_callbacks if getattr(saver, "monitor", None)]
        path = next((found for saver in savers if (found := getattr(saver, "best_model_path", ""))), "")
        if not path:
            rank_zero_warn(
                "HFExport(best=True) has no effect: no best checkpoint was saved. Add validation data, or a "
                "ModelCheckpoint with a monitor."
            )
            return

        def write() -> None:
            with _without_zero3(pl_module):
                from_checkpoint(Checkpoint(path), self._root / "best", self._rows(trainer), self.settings, replace=True)

        self._first_rank(write)

    def _begin(self, trainer: Trainer) -> None:
        self._root = Path(self.dirpath) if self.dirpath else Path(trainer.log_dir or ".") / "huggingface"
        self._first, self._error, self._last_step = FirstRank(), None, trainer.global_step

    @property
    def _first_rank(self) -> FirstRank:
        assert self._first is not None
        return self._first

    def _check(self) -> None:
        check_is_free(self._root)
        if self.rows is not None:
            rows_to_compare({}, self.rows)
        if self.settings.gguf_converter is not None:
            check_converter(self.settings.gguf_converter)

    def _export(self, trainer: Trainer, pl_module: LightningModule, name: str) -> Exception | None:
        """Export a folder, and return the error, if any, on every rank."""
        first, module = self._first_rank, cast("SFTModule", pl_module)
        if is_fast_dev_run(trainer):
            return None
        tokenizer = _tokenizer(trainer, module)

        def read() -> tuple[tuple[str, Sequence[Conversation]], list[Example]]:
            rows = self._rows(trainer)
            return rows, parity.sequences(rows[1], tokenizer)

        found, error = first.tried(read)  # other ranks may not have the file
        if found is None:
            return error
        rows, examples = found
        with module.evaluated():
            live = _live(trainer, module, examples)
            if (weights := self._in_shards(module)) is not None:
                out, facts = self._root / name, run_info(trainer)
                return first.shared(
                    lambda: convert_shards(module, weights, tokenizer, out, rows, self.settings, live, facts, first)
                )
            state = whole_state(module, keep=first.is_here)
        whole = {"hyper_parameters": dict(module.hparams), "state_dict": state, RUN_INFO_KEY: run_info(trainer)}

        def write() -> None:
            module.tuning.shrink(whole, module)  # with adapters, the base is read again, as from a checkpoint
            with _without_zero3(module):
                convert(whole, tokenizer, self._root / name, rows, self.settings, live, replace=True)

        return first.tried(write)[1]

    def _in_shards(self, module: SFTModule) -> ShardedWeights | None:
        """The weights of a sharded model if no rank needs the whole of it; ``None`` if rank 0 gathers them."""
        if module.device_mesh is None:
            return None
        try:
            return ShardedWeights(module, self.settings.dtype, self._first_rank.is_here)
        except InputError as error:
            rank_zero_info(f"Rank 0 gathers the whole model to export it: {error}.")
            return None

    def _rows(self, trainer: Trainer) -> tuple[str, Sequence[Conversation]]:
        data = cast("SFTDataModule", datamodule_of(trainer))  # or a user's own
        source = getattr(data, "sources", {}).get("val")
        if self.rows is None and source is not None:
            with suppress(InputError):  # e.g. an exhausted iterator
                side = side_of("val", getattr(data, "held_out", None))
                found = parity.held_out(as_mixture(source), data.reading, side)
                return f"{counted(len(found), 'row')} of the run's validation data", found
        return rows_to_compare({}, self.rows)


def _live(trainer: Trainer, module: SFTModule, examples: Sequence[Example]) -> Live:
    """Log-probabilities of the targets under the model in training; computed on every rank."""
    with eval_mode(module):
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
    """Disable transformers' ZeRO-3 loading, which would involve all ranks: this rank alone loads whole models."""
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
