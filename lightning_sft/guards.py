"""Checks that stop a run rather than let a wrong figure pass."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_sft.types import IGNORE, Batch, LogLikelihood

_NAMED = 10  # samples in the message


def not_finite(seen: Iterable[tuple[Batch, LogLikelihood]]) -> FloatingPointError:
    """The error for a loss that is NaN or infinite, with the samples that it comes from.

    Args:
        seen: The micro-batches among which this process looks for the cause.
    """
    named: list[str] = []
    for batch, likelihood in seen:
        bad = ~likelihood.log_probs.isfinite()
        documents = batch.documents()[batch.labels != IGNORE][bad].unique().tolist()
        named += [batch.provenance[d] if batch.provenance else f"document {d} of its micro-batch" for d in documents]
    where = ", ".join(named[:_NAMED]) + (f" and {len(named) - _NAMED} more" if len(named) > _NAMED else "")
    return FloatingPointError(
        f"The loss is NaN or infinite. Samples: {where or 'on another rank'}. Nothing was updated with it. Look at "
        "these samples; if they are sound, lower the learning rate (model.optimizer.lr), clip gradients "
        "(trainer.gradient_clip_val=1) or use trainer.precision=bf16-mixed instead of 16-mixed."
    )
