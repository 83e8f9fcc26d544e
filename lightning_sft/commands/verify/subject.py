"""The subject of the checks: the user's module, data and device, and a sample of sequences."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from copy import copy, deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from lightning_sft.data.batches.packing import PARTITIONS, Packing
from lightning_sft.data.tokens.dataset import Split
from lightning_sft.data.tokens.examples import Examples, to_record_batch
from lightning_sft.datamodule import SFTDataModule
from lightning_sft.machine.contexts import default_dtype
from lightning_sft.module import SFTModule

_DTYPES = {"32-true": torch.float32, "64-true": torch.float64, "bf16-true": torch.bfloat16}


@dataclass
class Subject:
    """Input of the checks, which work on copies of the module.

    Args:
        module: Configured module, without its model.
        data: Data module after ``setup("fit")``.
        trainer: Settings of the trainer.
        samples: Sequences to train on.
        precision: Precision of the comparison of gradients and likelihoods, in Lightning's notation.
        rows: Maximum number of rows whose ids are compared.
        seed: Seed of the random choice of rows.
    """

    module: SFTModule
    data: SFTDataModule
    trainer: Any
    samples: Examples
    precision: str = "32-true"
    rows: int = 10_000
    seed: int = 0

    @classmethod
    def of(
        cls,
        module: SFTModule,
        data: SFTDataModule,
        trainer: Any,
        samples: int = 8,
        tokens: int = 1024,
        precision: str = "32-true",
        rows: int = 10_000,
        seed: int = 0,
    ) -> Subject:
        """Read the data (the first rows of a stream) and choose the samples.

        Args:
            module: Configured module.
            data: Configured data module.
            trainer: Settings of the trainer.
            samples: Maximum number of sequences.
            tokens: Maximum number of tokens of these sequences together.
            precision: Precision of the comparison of gradients and likelihoods, in Lightning's notation.
            rows: Maximum number of rows whose ids are compared.
            seed: Seed of the random choice of samples and rows.
        """
        data = data.preview(module, trainer)
        examples = data.splits["train"].examples
        chosen = choose(examples.lengths, samples, tokens, seed)
        return cls(
            module, data, trainer, Examples([to_record_batch(examples[i] for i in chosen)]), precision, rows, seed
        )

    @property
    def device(self) -> torch.device:
        """The device that the checks run on: the first that the trainer would use."""
        return self._trainer().strategy.root_device

    @property
    def folder(self) -> Path:
        """Folder for temporary checkpoints, on the disk of the run."""
        root = Path(self.trainer.default_root_dir or ".")
        root.mkdir(parents=True, exist_ok=True)
        return root

    def loaded(self) -> SFTModule:
        """A copy of the module with its model on the device, in the precision of the comparison, without randomness."""
        module = self._copy(exact=True)
        with default_dtype(_DTYPES[self.precision]):
            module.configure_model()
        assert module.model is not None
        without_chance(module.model)
        return module.to(self.device).train()

    def plain(self) -> PreTrainedModel:
        """The same weights in plain transformers (and peft, with adapters), with eager attention."""
        module = self._copy(exact=True)
        with default_dtype(_DTYPES[self.precision]):
            try:
                model = module.tuning.load(module.pretrained, module.hf_config, "eager", None)
            except ValueError:  # the architecture has its own attention implementation
                model = module.tuning.load(module.pretrained, module.hf_config, None, None)
        without_chance(model)
        nn.Module.to(model, self.device)
        model.train()
        return model

    def fit(
        self,
        module: SFTModule | None,
        packing: Packing | None = None,
        num_micro_batches: int = 1,
        ckpt_path: str | None = None,
        **settings: Any,
    ) -> Trainer:
        """Train a copy of the module on the samples.

        Args:
            module: Module to train; by default a copy of the configured one.
            packing: Packing of the samples; by default that of the data.
            num_micro_batches: Maximum number of micro-batches per epoch.
            ckpt_path: Checkpoint to resume from.
            settings: Arguments of the trainer.
        """
        packing = packing or self.data.packing
        data = copy(self.data)
        data.num_workers, data.splits = 0, {"train": Split("train", self.samples)}
        data.sources = {"train": (), "val": None, "test": None}  # no parts: the samples may come from any
        data._asked = {**self.data._asked, "packing": packing}
        data.tokens_per_batch = capacity_for(self.samples.lengths, num_micro_batches, packing)
        trainer = self._trainer(**settings)
        with quiet():
            trainer.fit(module or self._copy(), data, ckpt_path=ckpt_path)
        return trainer

    def _copy(self, exact: bool = False) -> SFTModule:
        module = deepcopy(self.module)
        if exact:
            module._settle(neftune_alpha=None, router_loss=None)  # the objective is compared without either
        return module

    def _trainer(self, **settings: Any) -> Trainer:
        own: dict[str, Any] = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger"), False)
        own |= {"enable_checkpointing": False, "limit_val_batches": 0, "max_epochs": 1, "num_sanity_val_steps": 0}
        devices = self.trainer.devices
        first = devices[:1] if isinstance(devices, list) else 1
        with quiet():
            return Trainer(accelerator=self.trainer.accelerator, devices=first, **own | settings)


def choose(lengths: NDArray[np.int64], most: int, tokens: int, seed: int) -> list[int]:
    """Indices of sequences: the longest that fits, the shortest, and random ones as long as they fit.

    A sequence fits if it leaves room for another, so that there is something to pack it with.

    Args:
        lengths: Lengths of all sequences, in tokens.
        most: Maximum number of sequences.
        tokens: Maximum number of tokens of these sequences together.
        seed: Seed of the random choice.

    >>> choose(np.array([5, 90, 3, 7, 40, 6]), most=4, tokens=100, seed=0)
    [4, 2, 3, 5]
    """
    by_length = np.argsort(lengths, kind="stable")
    fitting = by_length[lengths[by_length] <= tokens // 2]
    drawn = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    first = [int(fitting[-1])] if len(fitting) else []
    chosen: list[int] = []
    for i in [*first, int(by_length[0]), *drawn]:
        fits = sum(int(lengths[j]) for j in [*chosen, i]) <= tokens
        if i not in chosen and len(chosen) < most and (fits or not chosen):
            chosen.append(i)
    return chosen


def capacity_for(lengths: Sequence[int] | NDArray[np.int64], most: int, packing: Packing) -> int:
    """The smallest capacity, in tokens, at which sequences fill at most ``most`` micro-batches.

    >>> capacity_for([6, 5, 4, 3], most=2, packing="packed"), capacity_for([6, 5, 4, 3], most=2, packing="padded")
    (9, 12)
    """
    descending = sorted(map(int, lengths), reverse=True)
    capacity = descending[0]
    while len(PARTITIONS[packing](descending, capacity)) > most:
        capacity += 1
    return capacity


def without_chance(model: nn.Module) -> None:
    """Disable dropout, and give parameters initialized to zero small values, without which others have no gradient.

    Args:
        model: Model to change in place; it stays in training mode, which gradient checkpointing needs.
    """
    for module in model.modules():
        for name, value in list(vars(module).items()):
            is_rate = "drop" in name or (name == "p" and isinstance(module, nn.modules.dropout._DropoutNd))
            if is_rate and isinstance(value, float):
                setattr(module, name, 0.0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point() and not parameter.any():
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress Lightning's messages about each trainer, and the data module's report."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You defined a `validation_step` but have no")  # intended
            yield
    finally:
        logger.setLevel(level)
