"""The softmax of a chunk of logits, its metrics and its gradient, fused in one Triton kernel for GPUs.

One program a row goes over the vocabulary twice. The first pass is the online softmax (Milakov and Gimelshein 2018,
arXiv:1805.02867) in float32, with Σ z · exp z for the entropy beside it; the second writes the gradient, which may take
the place of the logits. A logit is read twice and written once, 6 bytes in half precision; unfused it is 60.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

tl: Any = None  # triton.language, once the kernel is asked for

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 4096  # logits of a row at a time; with so many warps, 16 a thread and two rows on a multiprocessor
_WARPS = 8


def fuses(raw: Tensor) -> bool:
    """Whether the kernel takes these logits, ``[chunk, V]``."""
    return raw.is_cuda and raw.dtype in _DTYPES and raw.stride(1) == 1 and _works(raw.device)


@torch.library.custom_op(
    "lightning_sft::fused_softmax",
    mutates_args=("gradient", "log_probs", "correct", "entropy"),
    schema="(Tensor raw, Tensor(a!)? gradient, Tensor targets, Tensor weights, Tensor(b!) log_probs, "
    "Tensor(c!) correct, Tensor(d!) entropy, float scale, float? softcap) -> ()",
)
def fused_softmax(
    raw: Tensor,
    gradient: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    log_probs: Tensor,
    correct: Tensor,
    entropy: Tensor,
    scale: float,
    softcap: float | None,
) -> None:
    """Fill in the metrics of some rows of raw logits, and the gradient of the weighted sum.

    Args:
        raw: Output of the head, ``[chunk, V]``.
        gradient: Output for the gradient with respect to ``raw``, ``[chunk, V]``; may alias ``raw``; ``None`` for none.
        targets: Target tokens, ``[chunk]``, int64.
        weights: Target weights, ``[chunk]``, float32.
        log_probs: Output for log Pr of each target, ``[chunk]``, float32.
        correct: Output for whether each target is the most likely token, ``[chunk]``, bool.
        entropy: Output for the entropy of each row in nats, ``[chunk]``, float32.
        scale: Factor on the logits.
        softcap: Soft cap of the scaled logits, ``softcap · tanh(z / softcap)``, or ``None``.
    """
    chunk, vocabulary = raw.shape
    of_raw = raw if gradient is None else gradient
    with torch.cuda.device_of(raw):
        _kernel()[(chunk,)](
            raw,
            of_raw,
            targets,
            weights,
            log_probs,
            correct.view(torch.uint8),
            entropy,
            raw.stride(0),
            of_raw.stride(0),
            vocabulary,
            scale,
            softcap or 1.0,
            capped=softcap is not None,
            differentiated=gradient is not None,
            block=min(_BLOCK, 1 << (vocabulary - 1).bit_length()),
            num_warps=_WARPS,
            enable_fp_fusion=True,  # explicit, since Triton 3.9 warns that its default will change
        )


@fused_softmax.register_fake
def _(*_: Any) -> None:
    return None


@cache
def _kernel() -> Any:
    """The kernel. Triton looks up names among the globals of a file, so they are put there once it is imported."""
    import triton
    import triton.language

    globals().update(tl=triton.language, _logits=triton.jit(_logits))
    return triton.jit(_row)


@cache
def _works(device: torch.device) -> bool:
    """Whether the kernel runs on a device, by trying it; a warning says why not, except where there is no Triton."""
    if find_spec("triton") is None:
        return False
    raw, targets = torch.zeros(1, 16, device=device), torch.zeros(1, device=device, dtype=torch.int64)
    weights, log_probs, entropy = (torch.zeros(1, device=device) for _ in range(3))
    try:
        fused_softmax(raw, raw, targets, weights, log_probs, targets.bool(), entropy, 1.0, None)
    except Exception as error:  # of a compiler, a linker, a driver
        warnings.warn(
            f"Triton does not run on {device}, so the softmax of the head takes ten passes instead of one and is "
            f"slower. Its results are the same. {type(error).__name__}: {error}",
            stacklevel=2,
        )
        return False
    return True


def _logits(raw, token, vocabulary, scale, softcap, capped: tl.constexpr):  # type: ignore[no-untyped-def]
    """Some logits of a row in float32; −∞ beyond the vocabulary."""
    inside = token < vocabulary
    z = tl.load(raw + token, mask=inside, other=0.0).to(tl.float32) * scale
    if capped:
        z = softcap * (1 - 2 / (tl.exp(2 * z / softcap) + 1))  # tanh
    return tl.where(inside, z, float("-inf"))


def _row(  # type: ignore[no-untyped-def]  # Triton takes no annotations but its own
    raw,
    gradient,
    targets,
    weights,
    log_probs,
    correct,
    entropy,
    raw_stride,
    gradient_stride,
    vocabulary,
    scale,
    softcap,
    capped: tl.constexpr,
    differentiated: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # rows times the vocabulary may be more than 2³¹
    raw += row * raw_stride
    target = tl.load(targets + row)
    highest = tl.full([], float("-inf"), tl.float32)
    most_likely = tl.full([], 0, tl.int32)
    chosen = tl.full([block], float("-inf"), tl.float32)
    exps = tl.zeros([block], tl.float32)  # Σ exp(z − highest) of every block-th logit
    products = tl.zeros([block], tl.float32)  # Σ (z − highest) · exp(z − highest) of the same
    for begin in range(0, vocabulary, block):
        token = begin + tl.arange(0, block)
        z = _logits(raw, token, vocabulary, scale, softcap, capped)
        here, at = tl.max(z, 0, return_indices=True)  # of equal ones the first
        most_likely = tl.where(here > highest, begin + at, most_likely)
        higher = tl.maximum(highest, here)
        base = tl.where(higher == float("-inf"), 0.0, higher)  # as long as all are −∞, their exponentials are 0
        shift = tl.where(highest == float("-inf"), 0.0, highest - base)
        below = z - base
        exp = tl.exp(below)
        products = (products + shift * exps) * tl.exp(shift) + tl.where(below == float("-inf"), 0.0, below * exp)
        exps = exps * tl.exp(shift) + exp
        chosen = tl.where(token == target, z, chosen)
        highest = higher
    base = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(exps, 0)
    tl.store(log_probs + row, tl.max(chosen, 0) - base - tl.log(total))
    tl.store(correct + row, (most_likely == target).to(tl.uint8))
    tl.store(entropy + row, tl.log(total) - tl.sum(products, 0) / total)
    if differentiated:
        gradient += row * gradient_stride
        weight = tl.load(weights + row)
        share = weight / total
        for begin in range(0, vocabulary, block):
            token = begin + tl.arange(0, block)
            z = _logits(raw, token, vocabulary, scale, softcap, capped)
            of_z = tl.where(token == target, weight, 0.0) - share * tl.exp(z - base)
            if capped:
                of_z *= 1 - (z / softcap) * (z / softcap)
            of_raw = (of_z * scale).to(gradient.dtype.element_ty)
            tl.store(gradient + token, of_raw, mask=token < vocabulary)
