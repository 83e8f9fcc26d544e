"""Models as ranks that read their shards hold them when training starts; run under torchrun by test_loading."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.demos import tiny_pretrained
from lightning_sft.model.parallel.rank_zero import whole_state
from lightning_sft.model.parallel.sharding import full
from lightning_sft.model.tuning.packed import unpacked
from lightning_sft.strategies import FSDP2Strategy
from lightning_sft.types import InputError
from tests.helpers.composites import COMPOSITES, composite
from tests.helpers.gradients import QUIET, ROWS
from tests.helpers.processes import torchrun

HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
LORA: dict[str, Any] = {"lora": {"r": 4, "targets": "all-linear"}}


@dataclass(frozen=True)
class Case:
    """A model and how it is sharded."""

    architecture: str = "llama"
    config: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[int, int] = (2, 1)  # data-parallel, tensor-parallel
    layout: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    precision: Any = "32-true"
    stored: torch.dtype = torch.float32


WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "tie_word_embeddings": True}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CASES = {
    "tied": Case(config={"tie_word_embeddings": True}),
    "of an odd size": Case(config={"vocab_size": 265, "hidden_size": 24, "head_dim": 6, "num_hidden_layers": 3}),
    "another prefix": Case("gpt2"),
    "windows": Case("gemma3_text", {"num_hidden_layers": 8, "sliding_window": 4}),
    "recurrent": Case("falcon_h1", {"num_hidden_layers": 3}),
    "whose initialization is not elementwise": Case("rwkv", {"attention_hidden_size": 16, "context_length": 256}),
    "experts": Case("qwen3_moe", EXPERTS, model={"router_loss": 0.01}),
    "adapters": Case(config={"tie_word_embeddings": True}, model=LORA),
    "adapters of experts": Case("qwen3_moe", EXPERTS, model={"lora": {"targets": ["q_proj", "experts.down_proj"]}}),
    "a base in bfloat16": Case(model=LORA, precision="bf16-mixed", stored=torch.bfloat16),
    "4 bits": Case(config=WIDE, model=LORA | {"quantize": "4bit"}),
    "4 bits beside experts": Case("qwen3_moe", EXPERTS | WIDE, model=LORA | {"quantize": "4bit"}),
    "4 bits, another prefix": Case("gpt2", model={"lora": {"targets": ["c_attn"]}, "quantize": "4bit"}),
    "8 bits": Case(config=WIDE, model=LORA | {"quantize": "8bit"}),
    "true bfloat16": Case("qwen3_next", EXPERTS, precision="bf16-true"),
    "images and text": Case("gemma3"),
    "frozen": Case(model={"frozen": ["*.layers.0.*"]}),
    "offloaded": Case(layout={"cpu_offload": True}),
    "tensor": Case(config={"tie_word_embeddings": True}, sizes=(2, 2)),
    "tensor, of an odd size": Case(config={"vocab_size": 265, "hidden_size": 24, "head_dim": 6}, sizes=(2, 2)),
}


def launched(module: Any, out: Path) -> Path:
    """Save the models of all cases of a module of helpers, run it on them, and return the folder of its results."""
    for processes in (2, 4):
        names = [name for name, case in module.CASES.items() if math.prod(case.sizes) == processes]
        for name in names:
            module.save(name, out)
        torchrun(module.__name__, str(out), *names, processes=processes)
    return out


def save(name: str, folder: Path) -> str:
    """Save the model of a case, and return its path."""
    case = CASES[name]
    if case.architecture in COMPOSITES:
        return composite(folder / name, case.architecture)
    path = tiny_pretrained(folder / name, case.architecture, **HEADS | case.config)
    if case.stored is not torch.float32:
        AutoModelForCausalLM.from_pretrained(path, dtype=case.stored).save_pretrained(path)
    return path


def packed_of(module: SFTModule) -> dict[str, Tensor]:
    """The bytes of each weight that is quantized, and its values; every rank calls this."""
    found = {}
    for name, layer in unpacked(module).items():
        weight = full(layer.layer.weight)
        found |= {name: weight.view(torch.uint8)[: layer.num_bytes], f"{name}, values": layer.values(weight)}
    return found


def shown(module: SFTModule, state: dict[str, Tensor], packed: dict[str, Tensor], numel: int) -> dict[str, Any]:
    """All that may differ between a model that is loaded whole and one that is read in shards."""
    assert module.scorer is not None
    model, routers = module.scorer.model, module.scorer.routers
    names = {part: name.replace("FSDP", "") for name, part in model.named_modules()}
    return {
        "packed": packed,
        "state": {name.removeprefix("scorer."): value for name, value in state.items()},
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "trained": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "tied": model.get_input_embeddings().weight is model.get_output_embeddings().weight,
        "base": {} if module.tuning._base is None else {"": module.tuning._base},
        "findings": vars(module.scorer.findings),
        "attention": str(module.attention),
        "routers": routers and [(names[r.module], r.num_experts, r.score) for r in routers.routers],
        "config": {
            key: value for key, value in module.hparams["hf_config"].items() if key not in ("_name_or_path", "dtype")
        },
        "numel": numel,
    }


@dataclass
class AtStart(Callback):
    """Calls a function when training starts, and ends it."""

    look: Callable[[SFTModule], None]

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.look(module)
        trainer.should_stop = True


def run(name: str, pretrained: str, out: Path) -> None:
    """A fit under the strategy of a case; rank 0 writes what is there when it starts."""
    case = CASES[name]

    def look(module: SFTModule) -> None:
        state = whole_state(module, keep=module.trainer.is_global_zero)
        packed = packed_of(module)
        numel = sum(parameter.to_local().numel() for parameter in module.parameters())
        module.trainer.save_checkpoint(out / f"{name}.ckpt")
        if module.trainer.is_global_zero:
            torch.save(shown(module, state, packed, numel), out / f"{name}.pt")

    module = SFTModule(pretrained, **case.model)
    strategy = FSDP2Strategy(*case.sizes, **case.layout)
    settings = {"accelerator": "cpu", "devices": case.sizes[0] * case.sizes[1], "strategy": strategy}
    trainer = Trainer(**QUIET, **settings, max_steps=1, precision=case.precision, callbacks=[AtStart(look)])
    trainer.fit(module, SFTDataModule(train=ROWS, tokens_per_batch=100))


if __name__ == "__main__":
    folder, *chosen = sys.argv[1:]
    with patch("lightning_sft.model.tuning.tuning.load_model", side_effect=InputError("loaded whole")):
        for one in chosen:
            run(one, str(Path(folder, one)), Path(folder))
