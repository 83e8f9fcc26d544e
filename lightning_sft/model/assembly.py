"""From a loaded model to the module that computes likelihoods: what differs between architectures is probed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from lightning_sft.machine.contexts import in_default_dtype
from lightning_sft.model.attention.choice import Attention, follow, probed
from lightning_sft.model.backbone import backbone_and_head
from lightning_sft.model.experts import RouterLoss, read_routers
from lightning_sft.model.likelihood import LikelihoodModel
from lightning_sft.model.parallel.loading import cut_down, is_empty
from lightning_sft.model.parallel.sharding import gathered
from lightning_sft.model.parallel.unused import expect_unused
from lightning_sft.model.probes import check_split
from lightning_sft.model.rope import follow_documents

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy


def assemble(
    model: PreTrainedModel,
    strategy: Strategy | None,
    device: torch.device,
    autocast: torch.dtype | None,
    *,
    attn_implementation: str | None = None,
    chunk_size: int | None = None,
    router_loss: RouterLoss | None = None,
) -> tuple[LikelihoodModel, Attention]:
    """The likelihood under a model, and the attention that it computes with.

    Args:
        model: The model; on meta, where each rank will read its shards, a small copy of it is probed.
        strategy: Strategy of the trainer, before it wraps the model.
        device: Device of the training.
        autocast: Type that the training computes in, if the trainer casts by itself.
        attn_implementation: Attention that the user asks for.
        chunk_size: Number of targets whose logits are in memory at a time.
        router_loss: Weights of the routers' auxiliary loss.

    Raises:
        InputError: When the model cannot be trained exactly in this way.
    """
    follow_documents(model)
    context = getattr(strategy, "context", None)
    small = cut_down(model) if is_empty(model) else None
    tried = small or model
    backbone, head = backbone_and_head(tried)
    with gathered(tried.parameters()), in_default_dtype(tried):
        attention, findings = probed(tried, backbone, head, attn_implementation, device, autocast)
        if small is not None:
            follow(model, small, attention)
        routers = None if context else read_routers(model, router_loss, small)  # a rank has some of the tokens
        expect_unused(strategy, backbone, head)
    if context is not None:
        check_split(tried, backbone, findings, context)
    return LikelihoodModel(model, findings, chunk_size, context, routers), attention
