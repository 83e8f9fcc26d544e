"""Divergence of a model's token distributions from a reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_sft.model.backbone import backbone_and_head
from lightning_sft.model.parallel.sharding import gathered
from lightning_sft.objective import transformed
from lightning_sft.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_sft.model.likelihood import LikelihoodModel

_CHUNK = 256  # targets whose logits are in memory at a time


def likeliest(scorer: LikelihoodModel, batch: Batch, most: int) -> tuple[Tensor, Tensor]:
    """The most likely tokens at each target, and their log-probabilities: ``[T, K]`` each, int32 and float32.

    Args:
        scorer: A :class:`~lightning_sft.model.likelihood.LikelihoodModel`; strategies that shard it may.
        batch: Micro-batch with T targets.
        most: K, or the size of the vocabulary if that is less.
    """

    def compute(model: PreTrainedModel, own: Batch) -> list[tuple[Tensor, Tensor]]:
        chunks = _log_probs(scorer, own)
        top = [chunk.topk(min(most, chunk.shape[1])) for chunk in chunks]
        return [(found.indices.int().cpu(), found.values.float().cpu()) for found in top]

    found = scorer(batch, compute)
    return torch.cat([ids for ids, _ in found]), torch.cat([values for _, values in found])


def divergence(scorer: LikelihoodModel, batch: Batch, ids: Tensor, log_probs: Tensor) -> Tensor:
    """KL(p̂ ‖ p) in nats at each target, ``[T]`` float64, between the result of :func:`likeliest` and the current model.

    All but the K most likely tokens of p̂ count as one: ``Σ_k p̂_k · log(p̂_k / p_k) + p̂_rest · log(p̂_rest / p_rest)``. By
    the data-processing inequality it is at most the divergence over the whole vocabulary.

    Args:
        scorer: Model that computes the logits, as for :func:`likeliest`.
        batch: Micro-batch with T targets, the same as for :func:`likeliest`.
        ids: Most likely token ids, ``[T, K]``, int32.
        log_probs: Log-probabilities of these tokens, ``[T, K]``, float32.
    """

    def compute(model: PreTrainedModel, own: Batch) -> list[Tensor]:
        found, begin = [], 0
        for chunk in _log_probs(scorer, own):
            at = slice(begin, begin + len(chunk))
            chosen = chunk.gather(1, ids[at].long().to(chunk.device)).cpu().double()
            found.append(_coarse(log_probs[at].double(), chosen))
            begin += len(chunk)
        return found

    return torch.cat(scorer(batch, compute))


def _coarse(before: Tensor, now: Tensor) -> Tensor:
    rest = [(-torch.expm1(torch.logsumexp(x, 1))).clamp(min=0) for x in (before, now)]
    of_rest = torch.where(rest[0] > 0, rest[0] * (rest[0] / rest[1].clamp(min=1e-12)).clamp(min=1e-300).log(), 0)
    return ((before.exp() * (before - now)).sum(1) + of_rest).clamp(min=0)


def _log_probs(scorer: LikelihoodModel, batch: Batch) -> Iterator[Tensor]:
    """Log-probabilities of the vocabulary at each target, ``[chunk, V]`` at a time."""
    _, head = backbone_and_head(scorer.model)
    states = scorer.hidden(batch).flatten(0, 1).index_select(0, batch.targets)
    with gathered(head.parameters()):
        for chunk in states.split(_CHUNK):
            yield transformed(head(chunk).float(), scorer.findings.scale, scorer.findings.softcap).log_softmax(-1)
