"""Each trained tensor's gradient in each step of an epoch, beside adapters; run under torchrun by test_packed."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import SGD

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.demos import tiny_pretrained
from lightning_sft.model.tuning.adapters import Lora
from tests.helpers.gradients import QUIET
from tests.helpers.parallel import CONTEXT, TILES, TRAIN, Case
from tests.helpers.processes import torchrun

PLAIN: dict[str, Any] = {"lora": Lora(r=4)}
DORA: dict[str, Any] = {"lora": Lora(r=4, dora=True)}
TOKENS = {**PLAIN, "new_tokens": ["<|a|>"], "trained": ["*norm*"]}
MODELS: dict[str, dict[str, Any]] = {
    "adapters": PLAIN,
    "4 bits": {**PLAIN, "quantize": "4bit"},
    "8 bits": {**PLAIN, "quantize": "8bit"},
    "magnitudes": DORA,
    "magnitudes of 4 bits": {**DORA, "quantize": "4bit"},
    "magnitudes of 8 bits": {**DORA, "quantize": "8bit"},
    "new tokens": TOKENS,
    "new tokens of 4 bits": {**TOKENS, "quantize": "4bit"},
    "new tokens of 8 bits": {**TOKENS, "quantize": "8bit"},
}
PACKAGES = {"4bit": "bitsandbytes", "8bit": "torchao"}


def case(name: str, processes: int) -> Case:
    """One process takes what two or four, of which two share rows, take in a step."""
    if processes == 1:
        return Case("single device", 1, 4, 30, model=MODELS[name])
    if processes == 2:
        return Case("`fsdp2`", model=MODELS[name])
    return Case("`fsdp2` on 2 × 2", 4, sizes=(4, 1), layout=CONTEXT, model={**MODELS[name], **TILES})


@dataclass
class Gradients(Callback):
    """Every gradient that an optimizer step is given, whole, by the name of its tensor."""

    found: list[dict[str, Tensor]] = field(default_factory=list)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """The second matrix of an adapter begins at zero, where the first one would have no gradient."""
        generator = torch.Generator().manual_seed(0)
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                values = torch.randn(parameter.shape, generator=generator) * 0.1
                if isinstance(parameter, DTensor):
                    values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
                with torch.no_grad():
                    parameter.copy_(values)

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}
        self.found.append({name: gradient.double() for name, gradient in whole.items()})


def run(pretrained: str, name: str, processes: int, out: Path) -> None:
    """An epoch, whose last step is short; all steps are taken at the same weights."""
    of, gradients = case(name, processes), Gradients()
    module = SFTModule(pretrained, optimizer=partial(SGD, lr=0.0), schedule="constant", warmup=0.0, **of.model)
    settings = {"strategy": of.strategy, "max_epochs": 1, **QUIET, **of.settings}
    trainer = Trainer(accelerator="cpu", callbacks=[gradients], **settings)
    trainer.fit(module, SFTDataModule(train=TRAIN, tokens_per_batch=100))
    if trainer.is_global_zero:
        torch.save(gradients.found, out / f"{name}, {processes}.pt")


def furthest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference of a tensor's gradient from that of one process, as a share of its largest entry."""
    assert found.keys() == wanted.keys()
    return max((float((found[n] - own).abs().max() / own.abs().max().clamp(min=1e-30)), n) for n, own in wanted.items())


def save(folder: Path) -> str:
    """A model whose matrices are more than one block of NF4."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return tiny_pretrained(folder, tie_word_embeddings=True, num_attention_heads=4, num_key_value_heads=2, **shape)


def launch(names: list[str], processes: int, pretrained: str, out: Path) -> None:
    """Run models one after the other in so many processes."""
    torchrun("tests.helpers.adapter_gradients", pretrained, str(out), *names, processes=processes)


if __name__ == "__main__":
    given, where, *chosen = sys.argv[1:]
    for one in chosen:
        run(given, one, int(os.environ["WORLD_SIZE"]), Path(where))
