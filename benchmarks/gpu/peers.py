"""TRL, measured in process on the same shapes and rows: packed, with FlashAttention 2, with and without Liger."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.gpu.meter import Meter, peak_flops
from benchmarks.gpu.shapes import built_config, prepared
from benchmarks.limits import Work
from benchmarks.record import Record
from benchmarks.run_trl import conversations


class Steps(TrainerCallback):
    """Hands each optimizer step to a meter.

    Args:
        meter: Measures the steps.
        counts: Tokens, targets and pairs of the micro-batches, in order; a step is one micro-batch.
    """

    def __init__(self, meter: Meter, counts: list[tuple[int, int, int]]) -> None:
        self.meter, self.counts = meter, counts

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Memory and time are watched from here."""
        self.meter.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step has ended."""
        self.meter.step(*self.counts[state.global_step - 1])


class Counting:
    """The trainer's collator, which counts what it makes: on the host, some batches ahead of the training."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.counts: list[tuple[int, int, int]] = []

    def __call__(self, examples: Any) -> Any:
        """One micro-batch; a document begins where its position is 0."""
        batch = self.collator(examples)
        positions = batch["position_ids"].flatten()
        bounds = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
        lengths = [end - begin for begin, end in pairwise(bounds)]
        targets = int((batch["labels"] != -100).sum())
        self.counts.append((sum(lengths), targets, sum(n * (n + 1) // 2 for n in lengths)))
        return batch


def train(given: SimpleNamespace) -> None:
    """Measure TRL and record its figures.

    Args:
        given: As for :func:`benchmarks.gpu.throughput.train`, with ``liger`` and ``attention`` instead of ``kernels``.
    """
    datasets.disable_progress_bars()
    shape, folder = prepared(given.shape, given.models, given.tokenizer, given.device, given.quick)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(given.seed)
    with torch.device(given.device):
        model = AutoModelForCausalLM.from_config(
            built_config(shape.config, tokenizer),
            dtype=torch.bfloat16 if shape.lora else torch.float32,  # master weights, or a base that stays as it is
            attn_implementation=given.attention,
        )
    model.config._name_or_path = folder
    meter = Meter(given.device, given.warmup, given.steps, given.profiled)
    arguments = SFTConfig(
        output_dir=given.folder,
        max_steps=meter.total_steps,
        bf16=True,
        use_cpu=given.device == "cpu",
        packing=True,
        max_length=shape.length,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        learning_rate=2e-5,
        weight_decay=0.01,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=given.warmup + given.steps,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_liger_kernel=given.liger,
        optim="adamw_torch_fused",
        seed=given.seed,
    )
    rows = datasets.Dataset.from_list(conversations(given.rows[given.documents]))
    adapters: dict[str, Any] = {}
    if shape.lora:
        from peft import LoraConfig

        adapters["peft_config"] = LoraConfig(r=shape.lora, lora_alpha=32, target_modules="all-linear")
    trainer = SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer, **adapters)
    trainer.data_collator = counting = Counting(trainer.data_collator)
    trainer.add_callback(Steps(meter, counting.counts))
    trainer.train()
    peak = peak_flops(torch.cuda.get_device_name()) if given.device == "cuda" else None
    Record(given.out).write(**meter.result(Work.of(folder, shape.lora), peak), attention=given.attention)
