"""Which attention a model is trained with: ours where it was measured to be exact, stock attention elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from transformers import PreTrainedModel

from lightning_sft.attention import varlen
from lightning_sft.attention.implementation import NAMES
from lightning_sft.probes import Findings, probe
from lightning_sft.types import InputError


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


def probed(
    model: PreTrainedModel, backbone: nn.Module, head: nn.Module, asked: str | None = None
) -> tuple[Attention, Findings]:
    """Choose the attention of a model, and probe the model with it.

    Ours is chosen if with it packed documents are computed as stock attention computes each alone.

    Args:
        model: It is left with the attention that was chosen.
        backbone: The model without its head.
        head: From hidden states to logits.
        asked: What the user wants; ``None`` for ours where it can be had.

    Raises:
        InputError: When ours is asked for and cannot be had, or the model cannot be trained at all.
    """
    if asked is not None and asked not in NAMES.values():
        return Attention(asked, "it was asked for"), probe(model, backbone, head)
    stock = model.get_correct_attn_implementation(None)
    why, findings = _try_ours(model, backbone, head, stock)
    if findings is not None:
        chosen = Attention(NAMES[stock], f"each packed document by itself, through {stock}{_kernels(stock)}")
        rank_zero_info(f"Attention {chosen}.")
        return chosen, findings
    if asked is not None:
        raise InputError(
            f"model.attn_implementation={asked} cannot be had for {type(model).__name__}: {why}. Leave it out."
        )
    model.set_attn_implementation(stock)
    chosen = Attention(stock, f"not {NAMES[stock]}, because {why}")
    rank_zero_info(f"Attention {chosen}.")
    return chosen, probe(model, backbone, head)


def _try_ours(model: PreTrainedModel, backbone: nn.Module, head: nn.Module, stock: str) -> tuple[str, Findings | None]:
    if not model._can_set_attn_implementation():
        return "the architecture has attention of its own kind", None
    try:
        model.set_attn_implementation(NAMES[stock])
        findings = probe(model, backbone, head)
    except Exception as error:  # whatever an architecture does with a mask that it does not know
        return f"the architecture does not take it ({type(error).__name__}: {error})", None
    if not findings.takes_positions:
        return "the architecture cannot be told positions, so nothing is packed", None
    if not findings.isolates_documents:
        return "with it too documents in a row would see each other", None
    return "", findings


def _kernels(stock: str) -> str:
    if stock != "sdpa" or not torch.cuda.is_available():
        return ""
    reason, _ = varlen.usable()
    return "; in 16 bits all in one call" if reason is None else f"; no kernel takes all in one call ({reason})"
