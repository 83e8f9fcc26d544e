"""Probes of the model before the first step, because architectures differ silently.

They measure how the head turns hidden states into logits, whether attention is causal, and whether documents packed
into one row are isolated from each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from lightning_sft.machine.contexts import eval_mode
from lightning_sft.model import recurrence
from lightning_sft.model.backbone import can_be_packed, hidden_states, language_model
from lightning_sft.model.parallel.context import Context
from lightning_sft.objective import transformed
from lightning_sft.types import InputError

_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
_DOCUMENT = 12  # tokens in each document of a probe


@dataclass(frozen=True)
class ProbeResult:
    """Result of probing a model.

    Args:
        scale: Factor on the head's output.
        softcap: Soft-cap on the scaled output, or ``None``.
        isolates_documents: Whether documents packed into one row are computed as if each were alone.
        leaks_in: Class of the first layer in which packed documents see each other, if it was found.
    """

    scale: float
    softcap: float | None
    isolates_documents: bool
    leaks_in: str | None = None


def probe(model: PreTrainedModel, backbone: nn.Module, head: nn.Module) -> ProbeResult:
    """Run all probes on a few random tokens, in evaluation mode and without gradients.

    Raises:
        InputError: When tokens attend to later tokens, or the logits are not a scaled, soft-capped output of the head.
    """
    weight = next(head.parameters())  # [V, H]
    generator = torch.Generator().manual_seed(0)  # CPU explicitly, also under a device context
    tokens = torch.randint(weight.shape[0], (3, 1, _DOCUMENT), generator=generator, device="cpu")
    first, second, other = tokens.to(weight.device)
    with eval_mode(model):
        alone, changed = (
            hidden_states(backbone, first),
            hidden_states(backbone, torch.cat([first[:, :-1], second[:, :1]], 1)),
        )
        if _error(changed[:, :-1], alone[:, :-1]) > _rounding(alone, of_shapes=False):
            raise InputError(
                f"{type(model).__name__} lets tokens attend to later tokens, so it is not a causal language model. "
                "Use a decoder-only model (for some architectures: set is_decoder in its config)."
            )
        scale, softcap = _logit_transform(model, head(alone), first)
        isolates = can_be_packed(backbone) and _isolates(backbone, second, (first, other))
        leaks_in = None if isolates else _leaking(backbone, second, (first, other))
    return ProbeResult(scale, softcap, isolates, leaks_in)


def _isolates(backbone: nn.Module, document: Tensor, others: tuple[Tensor, Tensor]) -> bool:
    """Whether a document's hidden states depend neither on the document packed before it nor on packing itself."""
    alone = hidden_states(backbone, document)
    packed, changed = (_packed(backbone, before, document)[:, before.shape[1] :] for before in others)
    return _error(packed, alone) <= _rounding(alone) and _are_equal([changed], [packed])


def _leaking(backbone: nn.Module, document: Tensor, others: tuple[Tensor, Tensor]) -> str | None:
    """Class of the first layer whose output for a document depends on the one before it, though its input does not."""
    runs: list[dict[nn.Module, tuple[list[Tensor], list[Tensor]]]] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        runs[-1][module] = _of_second((args, kwargs)), _of_second(output)

    own = [module for module in backbone.modules() if not type(module).__module__.startswith("torch.")]
    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in own]
    try:
        for before in others:
            runs.append({})
            _packed(backbone, before, document)
    finally:
        for hook in hooks:
            hook.remove()
    for module, (given, made) in runs[0].items():  # in the order in which they ended
        given_now, made_now = runs[1].get(module, ([], []))  # an expert may have no tokens
        if given and _are_equal(given_now, given) and made and not _are_equal(made_now, made):
            return type(module).__name__
    return None


def _of_second(tree: Any) -> list[Tensor]:
    """Hidden states, ``[1, N, H]``, of the second of two packed documents among the inputs or outputs of a module."""
    tensors = (x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 2)
    return [x[:, _DOCUMENT:].flatten(2) for x in tensors if x.shape[1] == 2 * _DOCUMENT]


def _are_equal(found: list[Tensor], wanted: list[Tensor]) -> bool:
    """Whether hidden states are equal but for what differs between loads of experts."""
    same = [a.shape for a in found] == [b.shape for b in wanted]
    return same and all(_error(a, b) <= _rounding(b, of_shapes=False) for a, b in zip(found, wanted, strict=True))


def _packed(backbone: nn.Module, *documents: Tensor) -> Tensor:
    positions = torch.cat([torch.arange(d.shape[1], device=d.device) for d in documents])[None]
    return hidden_states(backbone, torch.cat(documents, 1), positions)


def _logit_transform(model: PreTrainedModel, raw: Tensor, input_ids: Tensor) -> tuple[float, float | None]:
    """Scale and soft-cap that turn the head's output into this model's logits, found by trying the known ones."""
    config = model.config.get_text_config()
    try:
        wanted = language_model(model)(input_ids=input_ids, use_cache=False).logits
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"{type(model).__name__} computes no logits of text without images or other inputs in transformers "
            f"{transformers.__version__}, so it cannot be trained on text ({type(error).__name__}: {error})."
        ) from error
    caps = [c for c in (getattr(config, name, None) for name in _CAPS) if c]
    scales = [s for s in (getattr(config, name, None) for name in _SCALES) if s]
    # settings of the config come first: with tiny logits a soft-cap is indistinguishable from none
    for scale, cap in [(1.0, c) for c in caps] + [(f, None) for s in scales for f in (s, 1 / s)] + [(1.0, None)]:
        logits = transformed(raw, scale, cap)
        if logits.shape == wanted.shape and is_close(logits, wanted):
            return scale, cap
    raise InputError(
        f"The logits of {type(model).__name__} are not the output of its head, scaled or soft-capped in a known way, "
        "so the likelihood computed from the hidden states would be wrong. This architecture is not supported."
    )


def check_split(model: PreTrainedModel, backbone: nn.Module, findings: ProbeResult, context: Context) -> None:
    """Refuse a model that computes something else where the tokens of its rows are split over ranks.

    Every rank of the context calls it with the whole model, on the CPU.

    Args:
        model: The model.
        backbone: The model without its head.
        findings: Result of probing the model.
        context: The ranks.

    Raises:
        InputError: When it does, or its heads cannot be split over so many ranks.
    """
    config = model.config.get_text_config()
    heads = [getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")]
    if all(isinstance(count, int) for count in heads):
        context.num_repeats(*(cast(int, count) // context.tensor_parallel_size for count in heads))
    error = torch.ones((), device="cpu")
    if findings.isolates_documents and not recurrence.is_separated(backbone):
        lengths = _DOCUMENT, _DOCUMENT, 1  # an odd number of tokens, so that there is padding
        generator = torch.Generator().manual_seed(0)
        embedded = next(backbone.parameters())
        ids = torch.randint(config.vocab_size, (1, sum(lengths)), generator=generator)
        ids, positions = (x.to(embedded.device) for x in (ids, torch.cat(list(map(torch.arange, lengths)))[None]))
        with eval_mode(model):
            whole = hidden_states(backbone, ids, positions)
            own = hidden_states(backbone, ids, positions, context=context)
        there = whole[:, context.rank * own.shape[1] :][:, : own.shape[1]]
        error.fill_(_error(own[:, : there.shape[1]], there) > _rounding(there) if there.shape[1] else 0)
        torch.distributed.all_reduce(error, group=context.group)
    if error:
        raise InputError(
            f"{type(model).__name__} cannot have its rows split over devices: its layers mix tokens in other ways than "
            "by attention within each document. Set trainer.strategy.context_parallel_size=1."
        )


def is_close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to rounding in their dtype, relative to the largest entry."""
    return bool((a - b).abs().max() <= _rounding(b) * b.abs().max())


def _error(a: Tensor, b: Tensor) -> float:
    """Largest relative error of a token between two hidden states ``[1, N, H]``.

    Each feature is divided by its root mean square first, and the error is averaged over a token's features, so that an
    outlier feature a thousand times as large as the others, as in trained models, cannot mask differences in these.
    """
    a, b = a.cpu().double(), b.cpu().double()
    scale = b.square().mean((0, 1)).sqrt()
    scale = scale.clamp(min=float(scale.median()) * 1e-3 or 1.0)  # for features that are zero
    error, size = ((x / scale).square().mean(-1) for x in (a - b, b))
    return float((error / size.clamp(min=float(size.mean()) * 1e-3)).max().sqrt())


def _rounding(states: Tensor, of_shapes: bool = True) -> float:
    """Upper bound on the relative error of rounding; a leak between documents is 100 times larger.

    Args:
        states: Hidden states, ``[1, N, H]``.
        of_shapes: Whether shapes differ, and kernels with them. With equal shapes, results are equal bit for bit except
            in experts, whose loads differ.
    """
    is_precise = states.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(states.device.type)
    if is_precise and torch.get_float32_matmul_precision() == "highest":
        return 1e-4 if of_shapes else 3e-5
    return 3e-2 if of_shapes else 2e-3
