"""The YAML that ``lightning-sft init`` writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lightning_sft.training.checks import bfloat16_is_slow
from lightning_sft.types import InputError

Method = Literal["full", "lora"]
"""Whether the whole model is trained, or adapters."""


@dataclass(frozen=True)
class Machine:
    """What the run is for.

    Args:
        accelerator: ``gpu``, ``mps`` or ``cpu``.
        devices: How many.
        precision: The fastest that trains well there.
        why: Why this precision.
    """

    accelerator: str
    devices: int
    precision: str
    why: str

    @classmethod
    def here(cls, devices: int | None = None) -> Machine:
        """This machine, or so many devices of its kind.

        Raises:
            InputError: When there are not so many.
        """
        if devices is not None and devices < 1:
            raise InputError(f"devices must be at least 1, got {devices}.")
        count = torch.cuda.device_count()
        if count:
            if torch.cuda.get_device_capability()[0] >= 8:
                return cls("gpu", devices or count, "bf16-mixed", "bfloat16 products, float32 weights")
            return cls("gpu", devices or count, "16-mixed", "this GPU has no bfloat16")
        if torch.backends.mps.is_available():
            return cls("mps", 1, "32-true", "float32")
        if bfloat16_is_slow():
            return cls("cpu", devices or 1, "32-true", "this processor is slow in bfloat16, measured just now")
        return cls("cpu", devices or 1, "bf16-mixed", "bfloat16 products, float32 weights")


def as_yaml(
    model: str,
    context: int | None,
    data: Mapping[str, Any],
    longest: int,
    method: Method,
    machine: Machine,
    out: str,
) -> str:
    """The file, with a comment for each key; JSON values are YAML too.

    Args:
        model: Name, folder or file.
        context: Most tokens that it was made for, where that is known.
        data: ``train`` with what it is in words, and ``val``, ``columns`` and ``chat_template``, or ``None``.
        longest: Tokens of the longest of the first sequences.
        method: What is trained.
        machine: What it is trained on.
        out: Name of the file.
    """
    several, lora = machine.devices > 1, method == "lora"
    (train, kind), val = data["train"], data["val"]
    lines = [
        f"# Written by lightning-sft init. Train:    lightning-sft fit --config {out}",
        f"# See what will be trained on:             lightning-sft show --config {out}",
        f"# Prove it on this model and these data:   lightning-sft verify --config {out}",
        "# Keys that are not here have their defaults; all of them: lightning-sft fit --print_config",
        "seed_everything: 0 # seed of whatever is drawn; the order of the data has data.seed",
        "trainer:",
        f"  accelerator: {machine.accelerator} # what this machine has",
        f"  devices: {machine.devices} # on each node",
        f"  strategy: {'ddp' if several else 'auto'} # "
        + ("a copy of the model each; fsdp2 shards it, see docs/strategies.md" if several else "one device needs none"),
        f"  precision: {machine.precision} # {machine.why}",
        "  max_epochs: 1 # times that each row is used",
        "  accumulate_grad_batches: 4 # micro-batches of a device in one optimizer step",
        "  gradient_clip_val: 1.0 # the largest norm of a step's gradient",
        "  log_every_n_steps: 1 # optimizer steps from one logged figure to the next",
        "model:",
        f"  pretrained: {_value(model)} # a hub name, a folder, or a GGUF file",
        "  normalize: token # every target token counts the same; or: sequence, sqrt, dataset",
        "  optimizer:",
        "    class_path: torch.optim.AdamW # any optimizer of torch, or of your own by its path",
        "    init_args:",
        f"      lr: {'2.0e-4' if lora else '2.0e-5'} # the highest learning rate, after the warm-up",
        f"      weight_decay: {'0.0' if lora else '0.01'} # of matrices; norms and biases have none",
        "      fused: true # one kernel for all parameters",
        "  schedule: cosine # down to 0 at the end; or: linear, constant, wsd",
        "  warmup: 0.03 # share of the steps in which the learning rate rises",
        "  gradient_checkpointing: false # true saves memory and costs a third more time",
    ]
    if lora:
        lines += [
            "  lora: # adapters; the model's own weights stay as they are, see docs/adapters.md",
            "    r: 16 # rank",
            "    alpha: 32 # scale, times r",
            "    dropout: 0.05 # on the input of each adapter",
        ]
    lines += ["data:", f"  train: {_value(train)} # {_value(kind)[1:-1]}"]
    if val is None:
        lines.append("  # val: val.jsonl # validation data: held-out rows of the same kind")
    else:
        lines.append(f"  val: {_value(val)} # held-out rows, evaluated after each epoch")
    if data["columns"]:
        lines.append(f"  columns: {_value(data['columns'])} # the data's column for a key of the format")
    if data["chat_template"]:
        lines.append(f"  chat_template: {_value(data['chat_template'])} # instead of the tokenizer's own")
    lines += [
        f"  max_length: {context or 'null'} # most tokens in a sequence; the model was made for so many",
        "  overflow: drop # longer ones are left out and counted; or: error, truncate, split",
        "  tokens_per_batch: null # tokens in a micro-batch at most; null: 2,048 (16,384 on a GPU), or the longest "
        f"sequence if longer (of the first rows: {longest:,})",
        "  packing: packed # sequences end to end without padding; or: padded",
        "  invalid_rows: error # stop at a row that cannot be used; skip leaves it out and counts it",
    ]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(value)
