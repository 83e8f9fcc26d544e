"""Choice of the attention a model is trained with: per-document where it is measured to be exact, else stock."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_sft.model import recurrence
from lightning_sft.model.attention import flex, gpu
from lightning_sft.model.attention.per_document import NAMES, NoEagerAttentionError, one_call
from lightning_sft.model.backbone import backbone_and_head, can_be_packed
from lightning_sft.model.probes import ProbeResult, is_close, probe
from lightning_sft.types import InputError

_HALVES = (torch.bfloat16, torch.float16)
_LENGTHS = [70, 9, 140]  # of the documents that kernels of recurrent layers are tried on, in tokens


@dataclass(frozen=True)
class Attention:
    """The attention implementation of a model.

    Args:
        name: Name of the implementation, as in transformers' ``attn_implementation``.
        why: Reason for the choice.
    """

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


def check_asked(asked: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse an attention implementation that cannot run on the device, before anything is loaded.

    Args:
        asked: Requested ``attn_implementation`` of transformers, or ``None``.
        device: Device the model will be trained on.
        dtype: Dtype that layers compute in, which is that of autocast if the trainer uses it.

    Raises:
        InputError: When FlashAttention is requested without a GPU, or not in half precision.
    """
    if not _is_flash(asked):
        return
    if device.type != "cuda":
        raise InputError(
            f"model.attn_implementation={asked} runs on NVIDIA GPUs only, and this run is on {device.type}. Leave it "
            "out, or set trainer.accelerator=gpu."
        )
    if dtype not in _HALVES:
        raise InputError(
            f"model.attn_implementation={asked} needs half precision, got {str(dtype).removeprefix('torch.')}. "
            "Set trainer.precision=bf16-mixed, or leave model.attn_implementation out."
        )


def probed(
    model: PreTrainedModel,
    backbone: nn.Module,
    head: nn.Module,
    asked: str | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Attention, ProbeResult]:
    """Choose the attention implementation of a model, and probe the model with it.

    Per-document attention is chosen if it computes packed documents as stock attention computes each of them alone.

    Args:
        model: Model to probe; it is left with the chosen implementation.
        backbone: The model without its head.
        head: The head, from hidden states to logits.
        asked: Requested implementation; ``None`` prefers per-document attention.
        device: Device the model will be trained on; by default the one it is on.
        dtype: Autocast dtype of training, or ``None`` without autocast. FlashAttention is probed with it, on
            ``device``.

    Raises:
        InputError: When per-document attention is requested but not available, or the model cannot be trained at all.
    """
    device = model.device if device is None else device
    names = recurrence.separate(backbone)
    by_kernels = bool(names) and recurrence.has_kernels(device)
    as_trained = _as_trained(model, device, dtype) if _is_flash(asked) or by_kernels else nullcontext()
    with as_trained:
        if by_kernels:
            _use_kernels(backbone, cast(nn.Embedding, model.get_input_embeddings()).weight)
        chosen, findings = _chosen(model, backbone, head, asked, device)
    if names and findings.isolates_documents:
        why = f"{chosen.why}; recurrent layers keep packed documents apart: {recurrence.described(backbone)}"
        chosen = replace(chosen, why=why)
    return chosen, findings


def follow(model: PreTrainedModel, small: PreTrainedModel, chosen: Attention) -> None:
    """Set up an empty model as its small copy was by :func:`probed`, in place.

    Args:
        model: Model without memory.
        small: Copy with layers of each kind, see :func:`~lightning_sft.model.parallel.loading.cut_down`.
        chosen: Attention of the copy.
    """
    model.set_attn_implementation(chosen.name)
    backbone, tried = (backbone_and_head(each)[0] for each in (model, small))
    recurrence.separate(backbone)
    passing = {type(layer) for layers in recurrence.by_class(tried) for layer in layers if recurrence.passes(layer)}
    for layers in recurrence.by_class(backbone):
        if type(layers[0]) in passing:
            for layer in layers:
                recurrence.pass_borders(layer)


def _chosen(
    model: PreTrainedModel, backbone: nn.Module, head: nn.Module, asked: str | None, device: torch.device
) -> tuple[Attention, ProbeResult]:
    if asked is not None and asked not in NAMES.values():
        return Attention(asked, "requested"), probe(model, backbone, head)
    stock = model.get_correct_attn_implementation(None)
    why, findings = _try_ours(model, backbone, head, stock)
    if findings is not None:
        return Attention(NAMES[stock], _how(stock, device)), findings
    if asked is not None:
        raise InputError(
            f"model.attn_implementation={asked} is not available for {type(model).__name__}: {why}. Leave it out."
        )
    model.set_attn_implementation(stock)
    return Attention(stock, f"not {NAMES[stock]}, because {why}"), probe(model, backbone, head)


def _is_flash(asked: str | None) -> bool:
    return asked is not None and "flash" in asked


@contextmanager
def _as_trained(model: PreTrainedModel, device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """The model on the device, and under the autocast, of training, for kernels that run nowhere else."""
    module: nn.Module = model  # for torch's types of `to`
    before = model.device
    try:
        if before != device:
            module.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            yield
    finally:
        if before != device:
            module.to(before)


def _use_kernels(backbone: nn.Module, embeddings: Tensor) -> None:
    """Let recurrent layers pass the borders of documents to their kernels, where that computes each as if alone."""
    for layers in recurrence.by_class(backbone):
        if _takes_borders(layers[0], embeddings):
            for layer in layers:
                recurrence.pass_borders(layer)


def _takes_borders(layer: nn.Module, embeddings: Tensor) -> bool:
    """Whether a recurrent layer that gets the borders of documents has the output and gradient of one run on each.

    Args:
        layer: Recurrent layer, see :func:`~lightning_sft.model.recurrence.separate`.
        embeddings: Embeddings of tokens, ``[V, H]``: hidden states have their size, dtype and device.
    """
    results = []
    size, generator = (1, 2 * sum(_LENGTHS), embeddings.shape[1]), torch.Generator().manual_seed(0)
    drawn = torch.randn(size, generator=generator, device="cpu").to(embeddings)
    layout = recurrence.Layout(_LENGTHS, embeddings.device)
    try:
        for passes in (False, True):
            tried = deepcopy(layer).train()  # kernels of training differ from those of evaluation
            if passes:
                recurrence.pass_borders(tried)
            with torch.enable_grad():
                states = drawn[:, : sum(_LENGTHS)].clone().requires_grad_()
                out = tried(hidden_states=states, **{recurrence.KEYWORD: layout})
                (gradient,) = torch.autograd.grad(out, states, drawn[:, sum(_LENGTHS) :].to(out))
            results.append((out.detach(), gradient))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # without all its kernels transformers raises; kernels may raise anything
        return False
    return all(is_close(a, b) for a, b in zip(*results, strict=True))


def _try_ours(
    model: PreTrainedModel, backbone: nn.Module, head: nn.Module, stock: str
) -> tuple[str, ProbeResult | None]:
    if not model._can_set_attn_implementation():
        return "the architecture has its own attention implementation", None
    try:
        model.set_attn_implementation(NAMES[stock])
        findings = probe(model, backbone, head)
    except Exception as error:  # an architecture may raise anything on an unknown mask
        if isinstance(error, torch.OutOfMemoryError) or _is_our_fault(error):
            raise
        return f"the architecture does not support it ({type(error).__name__}: {error})", None
    if not can_be_packed(backbone):
        return "the architecture does not accept position_ids, so nothing is packed", None
    if not findings.isolates_documents:
        where = f" (in {findings.leaks_in})" if findings.leaks_in else ""
        return f"documents in a row would attend to each other with it, too{where}", None
    return "", findings


def _is_our_fault(error: Exception) -> bool:
    """Whether an error was raised by our code, or by torch called from it; refusing the model does not count."""
    if isinstance(error, InputError | NoEagerAttentionError):
        return False
    names = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [name.partition(".")[0] for name in names]
    return [name for name in packages if name != "torch" and name not in sys.stdlib_module_names][-1] == "lightning_sft"


def _how(stock: str, device: torch.device) -> str:
    """How packed documents are computed on a device, and why nothing faster is used."""
    alone = f"each packed document separately, by {stock}"
    if stock != "sdpa":
        through_flex = "packed documents by FlexAttention where it supports all settings of a layer, else "
        return f"{through_flex if flex.usable(device) else ''}{alone}"
    if device.type != "cuda":
        return alone if one_call(device) is None else f"all packed documents in one call; with dropout, {alone}"
    reasons = {name: reason for name, (reason, kernel) in gpu.kernels(device).items() if kernel is None}
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    if one_call(device) is None:
        return f"{alone}, since no kernel computes all in one call ({told})"
    return (
        f"all packed documents in one call of {gpu.chosen(device).name} in half precision"
        f"{f' (not {told})' if told else ''}"
    )
