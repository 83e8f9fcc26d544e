"""Corpus metrics of the targets: exact sums on every rank, one packed reduction, one division."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_sft.machine.host_copy import without_waiting
from lightning_sft.types import IGNORE, Batch, LogLikelihood, widest

NUM_SUMS = 5
"""How many numbers :func:`sums` gives."""

_TURNS = 10  # the last of them is that of all later ones too
_POSITIONS = (1, 10, 100, 1000)  # the last token of each stretch of an answer; one more is without end


def sums(likelihood: LogLikelihood) -> Tensor:
    """``[Σ −w·log Pr, Σ w, correct targets, targets, Σ entropy]`` of a batch, ``[5]`` float64 (float32 on MPS)."""
    dtype = widest(likelihood.total.device)
    correct = likelihood.correct.sum()
    targets = torch.full_like(correct, likelihood.correct.numel())
    entropy = likelihood.entropy.to(dtype).sum()
    found = (-likelihood.total, likelihood.weight, correct, targets, entropy)
    return torch.stack([x.detach().to(dtype) for x in found])


def metrics_of(totals: Tensor) -> dict[str, Tensor]:
    """What the sums over a corpus say: the token-weighted mean loss, the share of targets predicted, mean entropy."""
    negative_log_likelihood, weight, correct, targets, entropy = totals[:5].unbind()
    return {"loss": negative_log_likelihood / weight, "token_accuracy": correct / targets, "entropy": entropy / targets}


def sums_by_part(likelihood: LogLikelihood, batch: Batch | None) -> Tensor:
    """:func:`sums` of a batch, and below them those of each data set of its mixture: ``[1 + parts, 5]``."""
    everything = sums(likelihood)
    if batch is None or not batch.part_names:
        return everything[None]
    of_targets = _of_targets(likelihood, batch).to(everything)  # [T, 5]
    of_parts = everything.new_zeros(len(batch.part_names), 5).index_add(0, batch.target_parts(), of_targets)
    return torch.cat([everything[None], of_parts])


def metrics_by_part(totals: Tensor, part_names: Sequence[str]) -> dict[str, Tensor]:
    """:func:`metrics_of` of a corpus, and the ``loss/name`` of each data set that has targets in it."""
    return metrics_of(totals[0]) | _losses(totals[1:], [f"loss/{name}" for name in part_names])


def target_positions(batch: Batch) -> tuple[Tensor, Tensor]:
    """Where each target stands: the number of its answer in its conversation, and its own in the answer, ``[T]`` each.

    Both count from 1. Answers are runs of targets; those that are not trained, having the weight 0, do not count.

    >>> batch = Batch.of({"input_ids": torch.arange(7)[None], "labels": torch.tensor([[-100, 1, 2, -100, 4, 5, -100]])})
    >>> [place.tolist() for place in target_positions(batch)]
    [[1, 1, 2, 2], [1, 2, 1, 2]]
    """
    is_target = (batch.labels != IGNORE).flatten()
    begins = is_target & ~torch.nn.functional.pad(is_target[:-1], (1, 0))
    number, document = batch.at_targets(begins.cumsum(0)), batch.at_targets(batch.documents())
    before = (begins.cumsum(0) - begins.long())[(batch.position_ids == 0).flatten()]  # answers before each document
    if batch.answers_before:
        before = before - batch.of_documents(batch.answers_before)
    first = begins.nonzero().squeeze(1)[number - 1]
    return number - before[document], batch.targets - first + 1


class CorpusLikelihood(Metric):
    """Metrics of the targets of a whole corpus, each a sum over all batches and ranks that is divided once.

    ========================  ==========================================================================================
    ``loss``                  Σ −w·log Pr / Σ w over all targets: what training minimizes
    ``perplexity``            exp(Σ −log Pr / number of targets), whatever their weights
    ``bits_per_byte``         Σ −log₂ Pr / UTF-8 bytes of the text of the targets: comparable between tokenizers
    ``token_accuracy``        the share of targets that are the most likely token
    ``entropy``               Σ entropy of the prediction / number of targets, in nats
    ``loss/NAME``             ``loss`` of a data set of a mixture
    ``loss_turn/2``           ``loss`` of the second trained answer of conversations, where some have several
    ``loss_position/2-10``    ``loss`` of the second to tenth token of answers
    ========================  ==========================================================================================

    The stop token of an answer, and other control tokens, have no bytes, but what it costs to predict them counts: a
    model has to say where its answer ends, and every template has its own name for that.

    Args:
        part_names: The data sets of the corpus, where it is a mixture.
        token_bytes: UTF-8 bytes of each token of the vocabulary, ``[V]``; without them there are no bits per byte.
        dtype: Dtype of the sums: float64, or float32 on devices without it.

    >>> import lightning_sft
    >>> metric = CorpusLikelihood()
    >>> hidden, head = torch.zeros(1, 2, 8), torch.zeros(4, 8)
    >>> metric.update(lightning_sft.log_likelihood(hidden, head, torch.tensor([[0, 1]])))
    >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
    {'loss': 1.386, 'token_accuracy': 0.5, 'entropy': 1.386, 'perplexity': 4.0}
    """

    full_state_update = False
    totals: Tensor
    token_bytes: Tensor | None

    def __init__(
        self,
        part_names: Sequence[str] = (),
        token_bytes: Tensor | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        self.part_names = tuple(part_names)
        positions = zip((1, *(p + 1 for p in _POSITIONS)), _POSITIONS, strict=False)
        ranges = [str(first) if first == last else f"{first}-{last}" for first, last in positions]
        self.names = [
            *(f"loss/{name}" for name in part_names),
            *(f"loss_turn/{turn}" for turn in range(1, _TURNS)),
            f"loss_turn/{_TURNS}_and_later",
            *(f"loss_position/{name}" for name in ranges),
            f"loss_position/{_POSITIONS[-1] + 1}_and_later",
        ]
        self.register_buffer("token_bytes", token_bytes, persistent=False)
        self.add_state("totals", torch.zeros(1 + len(self.names), 7, dtype=dtype), dist_reduce_fx="sum")

    def update(self, likelihood: LogLikelihood, batch: Batch | None = None) -> None:
        """Add one batch; where its targets stand, and what they are, only the batch knows."""
        if batch is None:
            total, nll = sums(likelihood), -likelihood.log_probs.sum()
            self.totals[0] += torch.stack([*total, nll.to(total), torch.zeros_like(total[0])]).to(self.totals)
            return
        targets = batch.at_targets(batch.labels)
        size = torch.zeros_like(targets) if self.token_bytes is None else self.token_bytes[targets]
        log_probs = likelihood.log_probs.to(self.totals)
        columns = [_of_targets(likelihood, batch).to(self.totals), -log_probs[:, None], size[:, None].to(self.totals)]
        of_targets = torch.cat(columns, dim=1)  # [T, 7]
        turns, positions = target_positions(batch)
        first, num_parts = torch.zeros_like(turns), len(self.part_names)
        groups = [
            first,
            1 + num_parts + turns.clamp(max=_TURNS) - 1,
            1
            + num_parts
            + _TURNS
            + torch.bucketize(positions, without_waiting(torch.tensor(_POSITIONS, device="cpu"), positions.device)),
        ]
        if num_parts:
            groups.append(1 + batch.target_parts())
        self.totals = self.totals.index_add(0, torch.cat(groups), of_targets.repeat(len(groups), 1))

    def compute(self) -> dict[str, Tensor]:
        """The metrics of everything seen since the last reset."""
        _, _, _, targets, _, negative_log_likelihood, size = self.totals[0].unbind()
        values = metrics_of(self.totals[0]) | {"perplexity": (negative_log_likelihood / targets).exp()}
        if size > 0:
            values["bits_per_byte"] = negative_log_likelihood / size / torch.log(torch.tensor(2.0, dtype=size.dtype))
        losses = _losses(self.totals[1:], self.names)
        has_turns = sum(name.startswith("loss_turn/") for name in losses) > 1
        return values | {n: loss for n, loss in losses.items() if has_turns or not n.startswith("loss_turn/")}


def _of_targets(likelihood: LogLikelihood, batch: Batch) -> Tensor:
    """The summands of :func:`sums`, ``[T, 5]``."""
    weights = batch.at_targets(batch.target_weights)
    losses = -likelihood.log_probs if likelihood.losses is None else likelihood.losses
    loss, correct, entropy = (values.to(weights) for values in (losses, likelihood.correct, likelihood.entropy))
    return torch.stack([weights * loss, weights, correct, torch.ones_like(weights), entropy], dim=1)


def _losses(totals: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    return {name: metrics_of(own)["loss"] for name, own in zip(names, totals, strict=True) if own[1]}
