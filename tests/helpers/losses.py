"""The losses of the page on them: the gradients that a fit applies, also under torchrun, and what they must be."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_sft import SFTModule
from lightning_sft.demos import tiny_pretrained
from tests.helpers.gradients import Run, encoded, fit
from tests.helpers.pages import blocks, page

SETTINGS: dict[str, dict[str, Any]] = {"LabelSmoothing": {"smoothing": 0.2}, "DynamicFineTuning": {}, "Distilled": {}}
EXACT: dict[str, Any] = {"dtype": torch.float64}


def models(folder: Path) -> tuple[str, str]:
    """A student and a wider teacher, of an architecture that computes nothing in float32 when weights are float64."""
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    student = tiny_pretrained(folder / "student", "gpt2", **off)
    return student, tiny_pretrained(folder / "teacher", "gpt2", seed=1, hidden_size=32, **off)


@cache
def classes() -> dict[str, type[SFTModule]]:
    scope: dict[str, Any] = {"__name__": "losses"}
    exec(blocks(page("howto/losses.md"), "python")[0], scope)
    return {name: scope[name] for name in SETTINGS}


def applied(name: str, student: str, teacher: str, data: dict[str, Any], **settings: Any) -> Run:
    """What a fit with this loss did, in float64."""
    own = SETTINGS[name] | ({"teacher": teacher} if name == "Distilled" else {})
    kind = partial(classes()[name], **own)
    return fit(student, data, precision="64-true", kind=kind, **settings)


def wanted(name: str, student: str, teacher: str) -> Tensor:
    """The gradient of the mean over the targets of all rows, each row alone, by full logits and the formula."""
    model = AutoModelForCausalLM.from_pretrained(student, **EXACT).train()
    other = AutoModelForCausalLM.from_pretrained(teacher, **EXACT)

    def smoothed(p: Tensor, y: int, q: Tensor) -> Tensor:
        return -(0.8 * p[y] + 0.2 * p.mean())

    def dynamic(p: Tensor, y: int, q: Tensor) -> Tensor:
        return -p[y].exp().item() * p[y]

    def distilled(p: Tensor, y: int, q: Tensor) -> Tensor:
        return -0.5 * p[y] + 0.5 * (q.exp() * (q - p)).sum()

    losses: dict[str, Callable[[Tensor, int, Tensor], Tensor]] = dict(
        zip(SETTINGS, (smoothed, dynamic, distilled), strict=True)
    )
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for example in encoded(student):
        ids = torch.tensor([list(map(int, example.input_ids))])
        p = model(ids).logits[0].log_softmax(-1)
        with torch.no_grad():
            q = other(ids).logits[0].log_softmax(-1)
        for i, (token, w) in enumerate(zip(ids[0].tolist(), map(float, example.target_weights), strict=True)):
            if w > 0:
                total, weight = total + w * losses[name](p[i - 1], token, q[i - 1]), weight + w
    (total / weight).backward()
    in_order = sorted(model.parameters(), key=lambda p: p.ndim <= 1)  # of the module's parameter groups
    return torch.cat([p.grad.flatten() for p in in_order if p.grad is not None])


if __name__ == "__main__":  # under torchrun: one step with each loss, and the gradients of every rank
    folder = Path(sys.argv[1])
    for name in SETTINGS:
        data = {"tokens_per_batch": 120}
        strategy: dict[str, Any] = {"devices": 2, "strategy": "ddp", "accumulate_grad_batches": 12}
        run = applied(name, str(folder / "student"), str(folder / "teacher"), data, **strategy)
        torch.save((run.gradients, run.consumed), folder / f"{name}.rank{torch.distributed.get_rank()}")
