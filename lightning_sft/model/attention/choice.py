"""Which attention a model is trained with: ours where it was measured to be exact, stock attention elsewhere."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from transformers import PreTrainedModel

from lightning_sft.model.attention import flex, gpu
from lightning_sft.model.attention.per_document import NAMES, NoEagerAttentionError, one_call
from lightning_sft.model.probes import ProbeResult, probe
from lightning_sft.types import InputError

_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Attention:
    """The attention of a model.

    Args:
        name: As in transformers' ``attn_implementation``.
        why: Why it is this one.
    """

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


def check_asked(asked: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse an attention that cannot run where it is to run, before anything is loaded.

    Args:
        asked: An ``attn_implementation`` of transformers, or ``None``.
        device: Where the model will be trained.
        dtype: What layers will be computed in, under autocast if the trainer has it.

    Raises:
        InputError: When FlashAttention is asked for without a GPU or in 32 bits.
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
            f"model.attn_implementation={asked} computes in 16 bits, this run in {str(dtype).removeprefix('torch.')}. "
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
    """Choose the attention of a model, and probe the model with it.

    Ours is chosen if with it packed documents are computed as stock attention computes each alone.

    Args:
        model: It is left with the attention that was chosen.
        backbone: The model without its head.
        head: From hidden states to logits.
        asked: What the user wants; ``None`` for ours where it is available.
        device: Where the model will be trained; by default where it is.
        dtype: Of autocast in training, or ``None`` where there is none. FlashAttention is probed with it, on the
            device.

    Raises:
        InputError: When ours is asked for and not available, or the model cannot be trained at all.
    """
    device = model.device if device is None else device
    if asked is not None and asked not in NAMES.values():
        chosen = Attention(asked, "it was asked for")
        if not _is_flash(asked):
            return chosen, probe(model, backbone, head)
        with _on(model, device), torch.autocast(device.type, dtype, enabled=dtype is not None):
            return chosen, probe(model, backbone, head)
    stock = model.get_correct_attn_implementation(None)
    why, findings = _try_ours(model, backbone, head, stock)
    if findings is not None:
        chosen = Attention(NAMES[stock], _how(stock, device))
        rank_zero_info(f"Attention {chosen}.")
        return chosen, findings
    if asked is not None:
        raise InputError(
            f"model.attn_implementation={asked} is not available for {type(model).__name__}: {why}. Leave it out."
        )
    model.set_attn_implementation(stock)
    chosen = Attention(stock, f"not {NAMES[stock]}, because {why}")
    rank_zero_info(f"Attention {chosen}.")
    return chosen, probe(model, backbone, head)


def _is_flash(asked: str | None) -> bool:
    return asked is not None and "flash" in asked


@contextmanager
def _on(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """While it lasts, the model is on a device."""
    module: nn.Module = model  # whose `to` has the types of torch
    before = model.device
    try:
        if before != device:
            module.to(device)
        yield
    finally:
        if before != device:
            module.to(before)


def _try_ours(
    model: PreTrainedModel, backbone: nn.Module, head: nn.Module, stock: str
) -> tuple[str, ProbeResult | None]:
    if not model._can_set_attn_implementation():
        return "the architecture has attention of its own kind", None
    try:
        model.set_attn_implementation(NAMES[stock])
        findings = probe(model, backbone, head)
    except Exception as error:  # whatever an architecture does with a mask that it does not know
        if isinstance(error, torch.OutOfMemoryError) or _is_our_fault(error):
            raise
        return f"the architecture does not take it ({type(error).__name__}: {error})", None
    if not findings.takes_positions:
        return "the architecture cannot be told positions, so nothing is packed", None
    if not findings.isolates_documents:
        return "with it too documents in a row would see each other", None
    return "", findings


def _is_our_fault(error: Exception) -> bool:
    """Whether our code raised an error, or called torch so that it did; a refusal of the model is no fault."""
    if isinstance(error, InputError | NoEagerAttentionError):
        return False
    names = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [name.partition(".")[0] for name in names]
    return [name for name in packages if name != "torch" and name not in sys.stdlib_module_names][-1] == "lightning_sft"


def _how(stock: str, device: torch.device) -> str:
    """What packed documents go through on a device, and why not through anything better."""
    alone = f"each packed document by itself, through {stock}"
    if stock != "sdpa":
        through_flex = "packed documents through FlexAttention where it has all settings of a layer, else "
        return f"{through_flex if flex.usable(device) else ''}{alone}"
    if device.type != "cuda":
        return alone if one_call(device) is None else f"all packed documents in one call; with dropout {alone}"
    reasons = {name: reason for name, (reason, kernel) in gpu.kernels(device).items() if kernel is None}
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    if one_call(device) is None:
        return f"{alone}, since no kernel takes all in one call ({told})"
    return f"all packed documents in one call of {gpu.chosen(device).name} in 16 bits{f' (not {told})' if told else ''}"
