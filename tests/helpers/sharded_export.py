"""Fits of sharded models that export, and a checkpoint of each; run under torchrun by test_shards."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from lightning_sft.callbacks import HFExport
from lightning_sft.demos import tiny_pretrained
from lightning_sft.export.shards import ShardedWeights
from lightning_sft.strategies import FSDP2Strategy
from lightning_sft.types import InputError
from tests.helpers import loading
from tests.helpers.exporting import trained
from tests.helpers.loading import EXPERTS, HEADS, LORA

SMALL = "20KB"


@dataclass(frozen=True)
class Case(loading.Case):
    """A model, how it is sharded and what is trained, and how it is exported."""

    export: dict[str, Any] = field(default_factory=dict)


TIED: dict[str, Any] = {"tie_word_embeddings": True}
ADAPTED: dict[str, Any] = {"lora": {"targets": ["q_proj", "experts.down_proj", "experts.gate_up_proj"]}}
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
CASES = {
    "several files": Case(config=TIED, export={"max_shard_size": SMALL}),
    "rounded": Case(export={"dtype": "bfloat16", "max_shard_size": SMALL}),
    "true bfloat16": Case(config=TIED, precision="bf16-true"),
    "offloaded": Case(layout={"cpu_offload": True}),
    "adapters": Case(config=TIED, model=LORA, export={"max_shard_size": SMALL}),
    "magnitudes": Case(model={"lora": {"r": 4, "dora": True}}),
    "new tokens": Case(config=TIED, model=LORA | {"new_tokens": ["<a>", "<b>"]}),
    "experts": Case("qwen3_moe", EXPERTS, export={"max_shard_size": SMALL}),
    "adapters of experts": Case("qwen3_moe", EXPERTS, model=ADAPTED),
    "4 bits": Case(config=WIDE | TIED, model=LORA | {"quantize": "4bit"}),
    "8 bits": Case(config=WIDE, model=LORA | {"quantize": "8bit", "new_tokens": ["<a>"]}),
    "magnitudes of 4 bits": Case(config=WIDE, model={"lora": {"r": 4, "dora": True}, "quantize": "4bit"}),
    "tensor": Case(config=TIED, sizes=(2, 2), export={"max_shard_size": SMALL}),
}


def save(name: str, folder: Path) -> None:
    """Save the pretrained model of a case."""
    tiny_pretrained(folder / name / "pretrained", CASES[name].architecture, **HEADS | CASES[name].config)


def run(name: str, out: Path) -> None:
    """A fit that exports at its end, and a checkpoint of that."""
    case = CASES[name]
    strategy = FSDP2Strategy(*case.sizes, **case.layout)
    settings = {"devices": case.sizes[0] * case.sizes[1], "strategy": strategy, "precision": case.precision}
    export = HFExport(out / name / "exports", **case.export)
    trainer = trained(str(out / name / "pretrained"), export, model=case.model, **settings)
    trainer.save_checkpoint(out / name / "end.ckpt")


def fail(out: Path) -> None:
    """A fit whose export does not pass the comparison; each rank writes the error that it gets."""
    try:
        export = HFExport(out / "failing" / "exports", dtype="bfloat16", max_kl=0.0)
        trained(str(out / "rounded" / "pretrained"), export, devices=2, strategy=FSDP2Strategy())
    except InputError as error:
        (out / "failing" / f"rank{dist.get_rank()}").write_text(str(error), encoding="utf-8")


def fail_on_disk(pretrained: str, out: Path) -> None:
    """A fit whose exports cannot be begun, or not be ended; each rank writes how far it comes, and its error."""
    for name in ("whole_folder", "sync"):
        export = HFExport(out / name, every_n_steps=2)
        where = "lightning_sft.export.shards" if name == "whole_folder" else "lightning_sft.io.disk"
        try:
            with patch(f"{where}.{name}", side_effect=OSError(28, "No space left on device")):
                trained(pretrained, export, devices=2, strategy=FSDP2Strategy())
        except (OSError, RuntimeError) as error:
            (out / f"{name} {dist.get_rank()}").write_text(f"{export._last_step} {error}", encoding="utf-8")


def fail_alone(pretrained: str, out: Path, rank: int) -> None:
    """A fit in whose export one rank fails between two gathers, while the other waits for it."""
    gather = ShardedWeights.part

    def part(self: ShardedWeights, names: list[str]) -> dict[str, Tensor]:
        if dist.get_rank() == rank and "model.layers.0" in names[0]:
            raise MemoryError("no memory left")
        return gather(self, names)

    with patch.object(ShardedWeights, "part", part):
        trained(pretrained, HFExport(out), devices=2, strategy=FSDP2Strategy())


if __name__ == "__main__":
    folder, *chosen = sys.argv[1:]
    if chosen[0] == "disk":
        fail_on_disk(folder, Path(chosen[1]))
        chosen = []
    elif chosen[0].isdecimal():
        fail_alone(folder, Path(chosen[1]), int(chosen[0]))
        chosen = []
    with patch("lightning_sft.callbacks.hf_export.whole_state", side_effect=AssertionError("gathered whole")):
        for one in chosen:
            run(one, Path(folder))
        if "rounded" in chosen:
            fail(Path(folder))
