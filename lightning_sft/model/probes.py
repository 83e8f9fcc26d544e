"""What is measured on the real model before the first step, because architectures differ silently.

How the head turns hidden states into logits, whether a token sees only what is before it, and whether documents packed
into one row see each other.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_sft.machine.contexts import eval_mode
from lightning_sft.model.backbone import hidden_states
from lightning_sft.objective import transformed
from lightning_sft.types import InputError

_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
_DOCUMENT = 12  # tokens in each document of a probe


@dataclass(frozen=True)
class ProbeResult:
    """What the probes found.

    Args:
        scale: Factor on the head's output.
        softcap: Soft-cap on the scaled output, or ``None``.
        isolates_documents: Whether documents that are packed into one row are computed as if each were alone.
        takes_positions: Whether the backbone can be told the position of each token; else nothing can be packed.
    """

    scale: float
    softcap: float | None
    isolates_documents: bool
    takes_positions: bool


def probe(model: PreTrainedModel, backbone: nn.Module, head: nn.Module) -> ProbeResult:
    """Run all probes on a few random tokens, in evaluation mode and without gradients.

    Raises:
        InputError: When tokens see later tokens, or the model's logits are not a scaled, soft-capped head.
    """
    weight = next(head.parameters())  # [V, H]
    generator = torch.Generator().manual_seed(0)  # of the CPU, where a device context would have the tokens drawn
    tokens = torch.randint(weight.shape[0], (3, 1, _DOCUMENT), generator=generator, device="cpu")
    first, second, other = tokens.to(weight.device)
    with eval_mode(model):
        alone, changed = (
            hidden_states(backbone, first),
            hidden_states(backbone, torch.cat([first[:, :-1], second[:, :1]], 1)),
        )
        if _error(changed[:, :-1], alone[:, :-1]) > _rounding(alone, of_shapes=False):
            raise InputError(
                f"{type(model).__name__} lets a token see the tokens after it, so it is not a causal language model. "
                "Give a decoder-only model (for some architectures: set is_decoder in its config)."
            )
        scale, softcap = _logit_transform(model, head(alone), first)
        takes_positions = "position_ids" in inspect.signature(backbone.forward).parameters
        isolates = takes_positions and _isolates(backbone, second, (first, other))
    return ProbeResult(scale, softcap, isolates, takes_positions)


def _isolates(backbone: nn.Module, document: Tensor, others: tuple[Tensor, Tensor]) -> bool:
    """Whether a document's states depend neither on what is packed before it nor on its being packed."""
    alone = hidden_states(backbone, document)
    packed, changed = (_packed(backbone, before, document)[:, before.shape[1] :] for before in others)
    return _error(packed, alone) <= _rounding(alone) and _error(changed, packed) <= _rounding(alone, of_shapes=False)


def _packed(backbone: nn.Module, *documents: Tensor) -> Tensor:
    positions = torch.cat([torch.arange(d.shape[1], device=d.device) for d in documents])[None]
    return hidden_states(backbone, torch.cat(documents, 1), positions)


def _logit_transform(model: PreTrainedModel, raw: Tensor, input_ids: Tensor) -> tuple[float, float | None]:
    """Which of the known ways from the head's output to logits is this model's: the one that gives its logits."""
    config = model.config.get_text_config()
    wanted = model(input_ids=input_ids, use_cache=False).logits
    caps = [c for c in (getattr(config, name, None) for name in _CAPS) if c]
    scales = [s for s in (getattr(config, name, None) for name in _SCALES) if s]
    # what the config names comes first: where logits are tiny, a soft-cap cannot be told from none
    for scale, cap in [(1.0, c) for c in caps] + [(f, None) for s in scales for f in (s, 1 / s)] + [(1.0, None)]:
        logits = transformed(raw, scale, cap)
        if logits.shape == wanted.shape and is_close(logits, wanted):
            return scale, cap
    raise InputError(
        f"The logits of {type(model).__name__} are not its head's output, scaled or soft-capped in a known way, so the "
        "likelihood computed from the hidden states would be wrong. This architecture is not supported."
    )


def is_close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of their dtype, of the largest entry."""
    return bool((a - b).abs().max() <= _rounding(b) * b.abs().max())


def _error(a: Tensor, b: Tensor) -> float:
    """How far states ``[1, N, H]`` are from others: the largest relative error of a token.

    Features are divided by their root mean square first, and the mean is over all of a token's features. So a feature a
    thousand times as large as the others, as trained models have, cannot hide that these differ.
    """
    a, b = a.cpu().double(), b.cpu().double()
    scale = b.square().mean((0, 1)).sqrt()
    scale = scale.clamp(min=float(scale.median()) * 1e-3 or 1.0)  # features that are zero
    error, size = ((x / scale).square().mean(-1) for x in (a - b, b))
    return float((error / size.clamp(min=float(size.mean()) * 1e-3)).max().sqrt())


def _rounding(states: Tensor, of_shapes: bool = True) -> float:
    """A relative error that rounding stays below; a leak between documents is 100 times that.

    Args:
        states: What was computed.
        of_shapes: Whether shapes differ, and kernels with them. Where they do not, results are equal bit for bit, but
            for experts, whose loads differ.
    """
    is_precise = states.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(states.device.type)
    if is_precise and torch.get_float32_matmul_precision() == "highest":
        return 1e-4 if of_shapes else 3e-5
    return 3e-2 if of_shapes else 2e-3
