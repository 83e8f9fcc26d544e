"""Run by test_fused_softmax in a process of its own: the Triton kernel under its interpreter, and compiled for a GPU.

Whether Triton interprets is decided once, when it is imported.
"""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_sft import objective
from lightning_sft.head.fused_softmax import fused_softmax
from tests.helpers.likelihoods import large_case

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRANSFORMATIONS: list[tuple[float, float | None]] = [(1.0, None), (0.25, None), (-2.0, None), (1.0, 3.0), (3.0, 5.0)]


@dataclass
class Case:
    """Some rows of logits as a head gives them."""

    raw: Tensor
    targets: Tensor
    weights: Tensor
    transformation: tuple[float, float | None] = (1.0, None)

    def computed(self, compute: Any, in_place: bool = True) -> dict[str, Tensor]:
        """Figures and gradient as the eager softmax of objective.py or the kernel gives them."""
        num = len(self.raw)
        found = {"log_probs": torch.zeros(num), "correct": torch.zeros(num).bool(), "entropy": torch.zeros(num)}
        raw = self.raw.clone()
        gradient = raw if in_place else torch.full_like(raw, torch.nan)
        if compute is fused_softmax:
            compute(raw, gradient, self.targets, self.weights, *found.values(), *self.transformation)
        else:
            compute(raw, self.transformation, gradient, self.targets, self.weights, *found.values())
        assert in_place or torch.equal(raw.nan_to_num(), self.raw.nan_to_num())
        return {**found, "gradient": gradient}


def cases() -> dict[str, Case]:
    """By name: vocabularies below, at and beyond the kernel's block, ties, infinities, and NaN."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for dtype in DTYPES:
        for transformation in TRANSFORMATIONS:
            for vocabulary in (11, 4096, 9001):
                raw = 4 * torch.randn(6, vocabulary, generator=generator)
                raw[1, 3:7] = raw[1].max() + 1  # four most likely tokens; the first of them counts as the answer
                raw[2, 5::3] = -torch.inf
                raw[3, :8] = -torch.inf
                raw[3, vocabulary // 2 :] = -torch.inf if vocabulary > 20 else 0.0  # blocks with nothing in them
                weights = torch.rand(6, generator=generator)
                weights[4] = 0
                targets = torch.randint(vocabulary, (6,), generator=generator)
                targets[1], targets[2], targets[3] = 3, 4, 9
                name = f"{dtype}, {transformation}, {vocabulary}".removeprefix("torch.")
                made[name] = Case(raw.to(dtype), targets, weights, transformation)
    nan, inf = torch.nan, torch.inf
    bad = torch.tensor(
        [[nan, 1, 2], [nan, nan, nan], [-inf, -inf, -inf], [-inf, inf, 0], [1e30, -1e30, 0], [0, -inf, 0]]
    )
    made["not finite"] = Case(bad, torch.tensor([1, 0, 1, 0, 0, 1]), torch.ones(6))
    return made


def likelihoods() -> dict[str, list[Tensor]]:
    """Total, figures and gradients of whole likelihoods, of a head that is a matrix and of one that autograd takes."""
    made = {}
    for kind in ("matrix", "autograd"):
        hidden, head, labels = large_case(targets=40, vocabulary=101)
        if kind == "autograd":
            head.register_forward_hook(lambda module, args, output: output.tanh())
        found = objective.log_likelihood(hidden, head, labels, softcap=2.0, chunk_size=16)
        gradients = torch.autograd.grad(found.total / 40, [hidden, head.weight])
        made[kind] = [found.total.detach(), found.log_probs, found.correct, found.entropy, *gradients]
    return made


def far_apart(folder: Path) -> Case:
    """Three rows of 2³⁰ logits, of which the first 16 are looked at, in a file with holes."""
    path = folder / "logits"
    with path.open("wb") as file:
        file.truncate(2 * (2**31 + 64))
    logits = torch.from_file(str(path), shared=True, size=2**31 + 64, dtype=torch.float16)
    raw = logits.as_strided((3, 16), (2**30, 1))
    raw.copy_(torch.arange(48).view(3, 16) % 31)
    return Case(raw, torch.tensor([3, 4, 5]), torch.ones(3))


def compiled() -> dict[str, int]:
    """Bytes of the kernel as compiled for an H100, without one."""
    import triton.compiler
    from triton.backends.compiler import GPUTarget

    from lightning_sft.head.fused_softmax import _BLOCK, _WARPS, _kernel

    pointers = {"targets": "*i64", "weights": "*fp32", "log_probs": "*fp32", "correct": "*u8", "entropy": "*fp32"}
    sizes = {"raw_stride": "i32", "gradient_stride": "i32", "vocabulary": "i32", "scale": "fp32", "softcap": "fp32"}
    constants = dict.fromkeys(("capped", "differentiated", "block"), "constexpr")
    made = {}
    for dtype in ("bf16", "fp16", "fp32"):
        signature = {"raw": f"*{dtype}", "gradient": f"*{dtype}", **pointers, **sizes, **constants}
        values = {"capped": True, "differentiated": True, "block": _BLOCK}
        source = triton.compiler.ASTSource(fn=_kernel(), signature=signature, constexprs=values)
        options = {"num_warps": _WARPS, "enable_fp_fusion": True}
        made[dtype] = len(
            triton.compiler.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]
        )
    return made


if __name__ == "__main__":
    out = Path(sys.argv[1])
    if len(sys.argv) > 2:
        torch.save(compiled(), out)
        sys.exit()
    os.environ["TRITON_INTERPRET"] = "1"
    warnings.simplefilter("ignore", RuntimeWarning)  # of numpy, about −∞ and NaN
    results: dict[str, Any] = {name: case.computed(fused_softmax) for name, case in cases().items()}
    results["apart"] = next(iter(cases().values())).computed(fused_softmax, in_place=False)
    with_gradient = far_apart(out.parent)
    figures = torch.zeros(3), torch.zeros(3).bool(), torch.zeros(3)
    fused_softmax(with_gradient.raw, None, with_gradient.targets, with_gradient.weights, *figures, 1.0, None)
    results["far apart"] = dict(zip(("log_probs", "correct", "entropy"), figures, strict=True))
    objective.fuses = lambda raw: True
    results["likelihoods"] = likelihoods()
    torch.save(results, out)
