"""`lightning_sft`, measured in process: a fit of a random model in a published shape."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from transformers import AutoTokenizer

from benchmarks.gpu.meter import Meter, peak_flops
from benchmarks.gpu.shapes import built_config, prepared
from benchmarks.limits import Work
from benchmarks.record import Record
from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.types import IGNORE, Batch

_MANY_STEPS = 10_000  # of a real run: what depends on how long a run is, as whether to compile, is as in one


class Steps(Callback):
    """Hands each optimizer step to a meter, and ends the fit when the meter has seen enough.

    Args:
        meter: Measures the steps.
    """

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.logged: dict[str, float] = {}  # what the library logs at the last measured step
        self._seen, self._window = 0, [0, 0, 0]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Memory and time are watched from here."""
        self.meter.begin()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the micro-batch, on the host but for its targets, and close the step if it was its last."""
        batch = Batch.of(batch)
        rows, width = batch.input_ids.shape
        lengths = batch.lengths or (width,) * rows
        counts = sum(lengths), (batch.labels != IGNORE).sum(), sum(n * (n + 1) // 2 for n in lengths)
        self._window = [a + b for a, b in zip(self._window, counts, strict=True)]
        if trainer.global_step > self._seen:
            self._seen = trainer.global_step
            tokens, targets, pairs = self._window
            self.meter.step(tokens, targets, pairs)
            self._window = [0, 0, 0]
            if self._seen == self.meter.warmup + self.meter.steps:
                found = trainer.callback_metrics
                self.logged = {
                    name: float(found[f"train/{name}"]) for name in ("loss", "mfu") if f"train/{name}" in found
                }
            trainer.should_stop = self.meter.is_done


def train(given: SimpleNamespace) -> None:
    """Measure a fit and record its figures.

    Args:
        given: ``shape``, ``documents`` (``short`` or ``long``), ``kernels`` (``None`` for the default), the meter's
            ``warmup``, ``steps`` and ``profiled``, and what all cases get.
    """
    shape, folder = prepared(given.shape, given.models, given.tokenizer, given.device, given.quick)
    settings: dict[str, Any] = {} if given.kernels is None else {"kernels": given.kernels}
    if shape.lora:
        settings["lora"] = {"r": shape.lora}
    else:
        config = built_config(shape.config, AutoTokenizer.from_pretrained(folder))
        settings["hf_config"] = json.loads(config.to_json_string(use_diff=False))
    seed_everything(given.seed, verbose=False)
    module = SFTModule(folder, schedule="constant", warmup=0.0, **settings)
    length = shape.length
    data = SFTDataModule(given.rows[given.documents], max_length=length, tokens_per_batch=length, cache=given.cache)
    meter = Meter(given.device, given.warmup, given.steps, given.profiled)
    steps = Steps(meter)
    trainer = Trainer(
        **quiet(given.device),
        precision="bf16-mixed",
        max_steps=_MANY_STEPS,
        log_every_n_steps=given.warmup + given.steps,
        callbacks=[steps],
    )
    trainer.fit(module, data)
    peak = peak_flops(torch.cuda.get_device_name()) if given.device == "cuda" else None
    found = meter.result(Work.of(folder, shape.lora), peak)
    Record(given.out).write(**found, attention=str(module.attention), logged=steps.logged)


def quiet(device: str) -> dict[str, Any]:
    """Settings of a trainer that shows and writes nothing, on one device."""
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    accelerator = {"accelerator": "gpu" if device == "cuda" else "cpu", "devices": 1}
    return {**dict.fromkeys(silent, False), **accelerator, "max_epochs": -1, "num_sanity_val_steps": 0}
