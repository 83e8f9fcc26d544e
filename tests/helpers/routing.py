"""Helpers of test_router_loss, also run under torchrun: fits of mixtures of experts, and what must come out."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.optim import SGD
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.demos import tiny_pretrained
from lightning_sft.strategies import FSDP2Strategy
from tests.helpers.gradients import QUIET, ROWS, encoded

COEFFICIENT = 0.5  # large, so that the gradient is not that of the likelihood but for rounding
EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
STRATEGIES = ("ddp", "fsdp2", "fsdp2_checkpointing")


def mixture(folder: Path, **more: Any) -> str:
    """A tiny Qwen3-MoE whose routers have clear opinions."""
    return tiny_pretrained(folder, "qwen3_moe", initializer_range=0.2, **EXPERTS | more)


class Frozen(SGD):
    """Shows gradients as they are applied, and applies nothing: all steps are taken at the same weights."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, lr=0.0)

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        self.seen()
        return loss


@dataclass
class Run(Callback):
    """Gradients, rows and metrics of the steps of a fit."""

    gradients: list[Tensor] = field(default_factory=list)
    consumed: list[list[str]] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    module: SFTModule | None = None

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.consumed.append([source for source in getattr(batch, "provenance", ()) if source != "padding"])

    def on_train_start(self, trainer: Any, module: Any) -> None:
        trainer.optimizers[0].seen = partial(self.note, module)

    def note(self, module: SFTModule) -> None:
        gradients = (p.grad for _, p in sorted(module.named_parameters()) if p.requires_grad)
        whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
        self.gradients.append(torch.cat([gradient.flatten().double() for gradient in whole]))

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if len(self.metrics) < trainer.global_step:
            self.metrics.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def fit(pretrained: str, data: Any = None, trainer: dict[str, Any] | None = None, **settings: Any) -> Run:
    """One epoch on ROWS."""
    run = Run()
    module = SFTModule(pretrained, optimizer=Frozen, schedule="constant", warmup=0.0, **settings)
    datamodule = data if hasattr(data, "train_dataloader") else SFTDataModule(train=ROWS, **(data or {}))
    options = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, **QUIET, **(trainer or {})}
    Trainer(callbacks=[run], **options).fit(module, datamodule)
    run.module = module
    return run


@cache
def alone(pretrained: str, coefficient: float = COEFFICIENT) -> dict[str, tuple[Tensor, float, float]]:
    """Of each row by itself in plain transformers: gradient of its summand of the objective, Σ w_t, and W_d · R_d."""
    model = AutoModelForCausalLM.from_pretrained(pretrained).train()
    config, found = model.config, {}
    for example in encoded(pretrained):
        model.zero_grad()
        ids = torch.tensor(example.input_ids)[None].long()
        output = model(input_ids=ids, output_router_logits=True, use_cache=False)
        log_probs = output.logits[0].log_softmax(-1)
        pairs = list(enumerate(zip(example.input_ids, example.target_weights, strict=True)))
        likelihood = sum(weight * log_probs[i - 1, token] for i, (token, weight) in pairs if weight > 0)
        sizes = config.num_experts, config.num_experts_per_tok
        losses = [load_balancing_loss_func((logits,), *sizes) for logits in output.router_logits]
        weight = sum(example.target_weights)
        router_loss = weight * torch.stack(losses).mean()
        (coefficient * router_loss - likelihood).backward()
        in_order = [p for _, p in sorted(model.named_parameters())]
        gradient = torch.cat([p.grad.flatten().double() for p in in_order])
        found[example.provenance] = gradient, weight, router_loss.item()
    return found


def wanted(pretrained: str, sources: list[str], coefficient: float = COEFFICIENT) -> tuple[Tensor, float]:
    """The gradient of a step of these rows, and its router loss."""
    rows = alone(pretrained, coefficient)
    weight = sum(rows[source][1] for source in sources)
    gradient = torch.stack([rows[source][0] for source in sources]).sum(0) / weight
    return gradient, sum(rows[source][2] for source in sources) / weight


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest entry."""
    return float((a - b).abs().max() / b.abs().max())


if __name__ == "__main__":  # under torchrun
    given, out = sys.argv[1:]
    for name in STRATEGIES:
        strategy = "ddp" if name == "ddp" else FSDP2Strategy(2, 1)
        options = {"devices": 2, "strategy": strategy, "accumulate_grad_batches": 2}
        settings = {"gradient_checkpointing": name.endswith("checkpointing"), "router_loss": COEFFICIENT}
        done = fit(given, {"tokens_per_batch": 120}, options, **settings)
        rank = os.environ["RANK"]
        torch.save((done.gradients, done.consumed), Path(out, f"{name}.rank{rank}"))
        Path(out, f"{name}.rank{rank}.json").write_text(json.dumps(done.metrics))
