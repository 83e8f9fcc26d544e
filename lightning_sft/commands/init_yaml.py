"""The YAML that ``lightning-sft init`` writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lightning_sft.commands.init_size import Schedule, Size
from lightning_sft.io.words import counted
from lightning_sft.training.checks import bfloat16_is_slow
from lightning_sft.types import InputError

Method = Literal["full", "lora"]
"""Training method: the whole model, or low-rank adapters."""


@dataclass(frozen=True)
class Machine:
    """The machine that the config is written for.

    Args:
        accelerator: ``gpu``, ``mps`` or ``cpu``.
        devices: Number of devices.
        precision: Fastest precision that trains well on the device.
        why: Reason for the precision.
    """

    accelerator: str
    devices: int
    precision: str
    why: str

    @classmethod
    def here(cls, devices: int | None = None) -> Machine:
        """This machine, with all its devices or a given number.

        Raises:
            InputError: When ``devices`` is less than 1.
        """
        if devices is not None and devices < 1:
            raise InputError(f"devices must be at least 1, got {devices}.")
        count = torch.cuda.device_count()
        if count:
            if torch.cuda.get_device_capability()[0] >= 8:
                return cls("gpu", devices or count, "bf16-mixed", "bfloat16 matmuls, float32 weights")
            return cls("gpu", devices or count, "16-mixed", "this GPU has no bfloat16")
        if torch.backends.mps.is_available():
            return cls("mps", 1, "32-true", "float32")
        if bfloat16_is_slow():
            return cls("cpu", devices or 1, "32-true", "this processor is slow in bfloat16, measured just now")
        return cls("cpu", devices or 1, "bf16-mixed", "bfloat16 matmuls, float32 weights")


def as_yaml(
    model: str,
    context: int | None,
    data: Mapping[str, Any],
    size: Size,
    schedule: Schedule,
    method: Method,
    machine: Machine,
    out: str,
) -> str:
    """The text of the YAML file, with a comment for each key. Values are written as JSON, which is valid YAML.

    Args:
        model: Hub name, folder or file of the pretrained model.
        context: Maximum number of tokens of the model's context, if known.
        data: Mapping with ``train`` (the source and its description), and ``val``, ``columns`` and ``chat_template``,
            which may be ``None``.
        size: Size of the training data.
        schedule: How they are cut into optimizer steps.
        method: Training method.
        machine: Machine to train on.
        out: Path of the YAML file, for its comments.
    """
    several, lora = machine.devices > 1, method == "lora"
    (train, kind), val = data["train"], data["val"]
    lines = [
        f"# Written by lightning-sft init. Train:    lightning-sft fit --config {out}",
        f"# See what will be trained on:             lightning-sft show --config {out}",
        f"# Check it on this model and data:         lightning-sft verify --config {out}",
        "# Other keys have their defaults; list all:  lightning-sft fit --print_config",
        "seed_everything: 0 # global random seed; the order of the data has data.seed",
        "trainer:",
        f"  accelerator: {machine.accelerator} # what this machine has",
        f"  devices: {machine.devices} # on each node",
        f"  strategy: {'ddp' if several else 'auto'} # "
        + ("a full copy each; fsdp2 shards it, see docs/howto/strategies.md" if several else "one device needs none"),
        f"  precision: {machine.precision} # {machine.why}",
        f"  max_epochs: {schedule.epochs} # passes over the data: "
        f"{size.rows_make} about {counted(schedule.num_steps, 'step')}",
        f"  accumulate_grad_batches: {schedule.accumulate} # micro-batches per device in one optimizer step",
        "  gradient_clip_val: 1.0 # maximum gradient norm",
        "  log_every_n_steps: 1 # optimizer steps between logged metrics",
        "model:",
        f"  pretrained: {_value(model)} # a hub name, a folder, or a GGUF file",
        "  normalize: token # every target token has the same weight; or: sequence, sqrt, dataset",
        "  optimizer:",
        "    class_path: torch.optim.AdamW # any optimizer of torch, or of your own by its path",
        "    init_args:",
        f"      lr: {'2.0e-4' if lora else '2.0e-5'} # peak learning rate, after warm-up",
        f"      weight_decay: {'0.0' if lora else '0.01'} # for matrices only, not norms and biases",
        "      fused: true # one kernel for all parameters",
        "  schedule: cosine # down to 0 at the end; or: linear, constant, wsd",
        "  warmup: 0.03 # fraction of steps used for linear warm-up",
        "  gradient_checkpointing: false # true saves memory and takes a third more time",
    ]
    if lora:
        lines += [
            "  lora: # low-rank adapters; the base is frozen, see docs/howto/adapters.md",
            "    r: 16 # rank",
            "    alpha: 32 # numerator of the scale alpha / r",
            "    dropout: 0.05 # on the input of each adapter",
        ]
    lines += ["data:", f"  train: {_value(train)} # {_value(kind)[1:-1]}"]
    if val is None:
        lines.append("  # val: 5% # validation data: a share of the training rows, or a file of its own")
    else:
        lines.append(f"  val: {_value(str(val))} # held-out rows, evaluated after each epoch")
    if data["columns"]:
        lines.append(f"  columns: {_value(data['columns'])} # the data's column for a key of the format")
    if data["chat_template"]:
        lines.append(f"  chat_template: {_value(data['chat_template'])} # instead of the tokenizer's own")
    lines += [
        f"  max_length: {context or 'null'} # maximum number of tokens per sequence; the model's context",
        f"  overflow: drop # longer ones are left out and counted{_too_long(size)}; or: error, truncate, split",
        f"  tokens_per_batch: {schedule.tokens_per_batch or 'null'} # maximum tokens per micro-batch; null: 2,048 "
        f"(16,384 on a GPU), or the longest sequence if longer (of the first rows: {max(size.lengths):,})",
        "  packing: packed # sequences end to end without padding; or: padded",
        "  invalid_rows: error # stop at a row that cannot be used; skip leaves it out and counts it",
    ]
    return "\n".join(lines) + "\n"


def _too_long(size: Size) -> str:
    """How many sequences are left out, if any."""
    return f" ({len(size.too_long):,} of the first {size.num_encoded:,} rows)" if size.too_long else ""


def _value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(value)
