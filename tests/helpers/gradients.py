"""Helpers of test_invariants, also run under torchrun: the gradients that a fit applies, and what they must be."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor
from torch.optim import SGD
from transformers import AutoModelForCausalLM

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.data.batches.packing import pack
from lightning_sft.types import Batch, Example

WORDS = ["yes", "no", "a much longer answer, it is", "two of them", "x", "see the list below: one, two and three"]
ROWS = [{"prompt": f"question {i} " + "why " * (i % 4), "completion": WORDS[i % 6] + "!" * (i % 3)} for i in range(12)]

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


class Recorder(SGD):
    """Keeps every gradient it is given, and changes nothing: all steps are taken at the same weights."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, lr=0.0)
        self.gradients: list[Tensor] = []

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.gradients.append(torch.cat([p.grad.flatten().double() for p in parameters]))
        return loss


@dataclass
class Run(Callback):
    """What a fit did: the gradient of each step, and which rows each micro-batch of this rank held."""

    gradients: list[Tensor] = field(default_factory=list)
    consumed: list[list[str]] = field(default_factory=list)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.consumed.append([source for source in Batch.of(batch).provenance if source != "padding"])


def fit(pretrained: str, data: Any = None, normalize: str = "token", kind: Any = SFTModule, **settings: Any) -> Run:
    """Fit one epoch on ROWS, with a module of this kind."""
    run = Run()
    module = kind(pretrained, normalize=normalize, optimizer=Recorder, schedule="constant", warmup=0.0)
    if not isinstance(data, LightningDataModule):
        data = SFTDataModule(**{"train": ROWS, **(data or {})})
    trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=[run], **QUIET, **{"devices": 1, **settings})
    trainer.fit(module, data)
    run.gradients = trainer.optimizers[0].gradients
    return run


def encoded(pretrained: str, normalize: str = "token") -> list[Example]:
    """ROWS as examples."""
    data = SFTDataModule(train=ROWS, tokenizer=pretrained)
    data.trainer = None
    data.setup("fit")
    examples = data.splits["train"].examples
    if normalize not in ("sequence", "sqrt"):
        return examples
    power = 1 if normalize == "sequence" else 0.5
    counts = [sum(w > 0 for w in e.target_weights) ** power for e in examples]
    return [
        Example(e.input_ids, [w / n for w in e.target_weights], e.provenance)
        for e, n in zip(examples, counts, strict=True)
    ]


def row_gradients(pretrained: str, examples: list[Example], dtype: torch.dtype) -> dict[str, tuple[Tensor, float]]:
    """∇ of −Σ w_t · log Pr(t) of each row alone and its Σ w_t: transformers' full logits, a loop over the formula."""
    model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=dtype).train()
    in_order = sorted(model.parameters(), key=lambda p: p.ndim <= 1)  # of the module's parameter groups
    gradients = {}
    for example in examples:
        model.zero_grad()
        log_probs = model(input_ids=torch.tensor(example.input_ids)[None].long()).logits[0].double().log_softmax(-1)
        pairs = list(zip(example.input_ids, example.target_weights, strict=True))
        loss = -sum(weight * log_probs[i - 1, token] for i, (token, weight) in enumerate(pairs) if weight > 0)
        loss.backward()
        gradients[example.provenance] = (
            torch.cat([p.grad.flatten().double() for p in in_order]),
            sum(weight for _, weight in pairs),
        )
    return gradients


def step_gradients(
    rows: dict[str, tuple[Tensor, float]], ranks: list[list[list[str]]], accumulate: int, constant: float | None = None
) -> list[Tensor]:
    """The gradient that each step must have: the sum over the rows of all its micro-batches and ranks, divided once."""
    steps = []
    for begin in range(0, len(ranks[0]), accumulate):
        window = [micro for rank in ranks for micro in rank[begin : begin + accumulate]]
        sources = [source for micro in window for source in micro]
        total = torch.stack([rows[source][0] for source in sources]).sum(0)
        steps.append(total / (constant or sum(rows[source][1] for source in sources)))
    return steps


def capacity_for(lengths: list[int], num_packs: int) -> int:
    """The least capacity at which the sequences fill no more than that many packs."""
    return next(c for c in range(max(lengths), sum(lengths) + 1) if len(pack(lengths, c)) <= num_packs)


def furthest(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference of two lists of gradients, as a share of the largest gradient."""
    assert len(a) == len(b), f"{len(a)} steps, not {len(b)}"
    return float(max((x - y).abs().max() / y.abs().max() for x, y in zip(a, b, strict=True)))


if __name__ == "__main__":  # under torchrun: fit each case, and save what every rank did
    pretrained, out = sys.argv[1:]
    for path in sorted(Path(out).glob("*.case")):
        done = fit(pretrained, devices=2, strategy="ddp", **torch.load(path))
        rank = torch.distributed.get_rank()
        torch.save((done.gradients, done.consumed), path.with_suffix(f".rank{rank}"))
