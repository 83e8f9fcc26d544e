"""What is compared: each system with its own defaults, and all with settings made equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SHIPPED, EQUAL, SAME = "as shipped", "made equal", "same batches"

_ADAMW = {"lr": 2e-5, "weight_decay": 0.01}
_OURS = {
    "--model.optimizer.lr": _ADAMW["lr"],
    "--model.optimizer.weight_decay": _ADAMW["weight_decay"],
    "--model.schedule": "constant",
    "--model.warmup": 0.0,
    "--trainer.enable_checkpointing": "false",
    "--trainer.logger": "false",
}
_TRL = {
    "learning_rate": _ADAMW["lr"],
    "weight_decay": _ADAMW["weight_decay"],
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "gradient_checkpointing": False,
}

# glibc keeps what has been freed, instead of handing it back and having the kernel clear pages anew in every step
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 28),
}


@dataclass(frozen=True)
class Case:
    """One system with some settings.

    Args:
        name: As the table names it.
        system: ``ours``, ``trl`` or ``litgpt``.
        kind: Whose settings: ``as shipped``, ``made equal``, or of the run on the same batches.
        settings: What the system's script gets, beside what all get.
        environment: Variables of the process's environment.
        share: Its steps, as a share of those of the others: slow ones take fewer.
    """

    name: str
    system: str
    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    share: float = 1.0

    @property
    def slug(self) -> str:
        """A name for its folder."""
        return "".join(c if c.isalnum() else "-" for c in f"{self.name} {self.kind}".lower())


def cases(length: int, rows_per_step: int) -> list[Case]:
    """All of them.

    Args:
        length: Tokens of a pack, and so of a step, where settings are made equal.
        rows_per_step: Rows that have about as many tokens, for systems without packs.

    As shipped: what the defaults of each give, packed where it can pack. TRL's are packs of 1,024 tokens and gradient
    checkpointing, and eight packs a step; here a step has as many as make the length, for eight would be one row of
    8,192 tokens with a mask over all of it, which takes TRL many minutes on a CPU. LitGPT's are 16 rows a step, one at
    a time.
    Made equal: AdamW (fused) with the same rate, decay and no schedule, no clipping, no checkpointing, and steps of as
    many tokens. Not equal is what LitGPT has no setting for: it unties the head from the embedding, so this model has
    28 million parameters more there, and its first step has a rate of 0.
    """
    ours = _OURS | {"--data.tokens_per_batch": length, "--data.max_length": length}
    trl = _TRL | {"max_length": length}
    packed = trl | {"packing": True, "per_device_train_batch_size": 1}
    padded = trl | {"packing": False, "per_device_train_batch_size": rows_per_step}
    shipped = {"packing": True, "per_device_train_batch_size": max(1, length // 1024)}
    litgpt = {
        "train": {"global_batch_size": rows_per_step, "micro_batch_size": rows_per_step, "lr_warmup_steps": 1},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {**_ADAMW, "fused": True}},
    }
    return [
        Case("lightning_sft", "ours", SHIPPED, {"flags": {}}),
        Case("TRL, packed", "trl", SHIPPED, {"config": shipped}),
        Case("LitGPT", "litgpt", SHIPPED, {"train": {}, "optimizer": "AdamW"}, share=0.5),
        Case("lightning_sft", "ours", EQUAL, {"flags": ours}),
        Case("lightning_sft, layers compiled", "ours", EQUAL, {"flags": ours | {"--model.kernels": "compiled"}}),
        Case("TRL, packed", "trl", EQUAL, {"config": packed}),
        Case("TRL, packed, with our allocator settings", "trl", EQUAL, {"config": packed}, ALLOCATOR),
        Case("TRL, padded", "trl", EQUAL, {"config": padded}),
        Case("LitGPT, padded", "litgpt", EQUAL, litgpt),
    ]


def same_batches(rows_per_step: int) -> list[Case]:
    """Two systems on the same token ids, in the same batches of so many rows."""
    trl = _TRL | {"packing": False, "per_device_train_batch_size": rows_per_step}
    return [
        Case("lightning_sft", "ours", SAME, {"flags": _OURS}),
        Case("TRL, padded", "trl", SAME, {"config": trl}),
    ]
