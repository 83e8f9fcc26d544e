"""Check of packed documents against single ones, for this model and attention implementation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_sft.commands.verify.reference import log_probs_alone
from lightning_sft.commands.verify.subject import Subject
from lightning_sft.commands.verify.verdict import Case, Outcome
from lightning_sft.data.batches.collate import collate
from lightning_sft.module import SFTModule
from lightning_sft.types import Batch

TOLERANCE = {"32-true": 1e-3, "64-true": 1e-5, "bf16-true": 0.2}
"""Tolerance on log Pr of a target, in nats, between two computations of the same value."""

UNTOUCHED = {"32-true": 1e-4, "64-true": 1e-6, "bf16-true": 0.05}
"""Tolerance on log Pr between passes that differ only in other documents: rounding of batched experts, else 0."""


@torch.no_grad()
def check_documents(subject: Subject) -> Outcome:
    """Check that a packed document has the same likelihood as alone, independent of the other documents.

    The module computes one pack of all samples, with the attention that ``fit`` would use; plain transformers with
    eager attention computes each document alone. The largest difference of log Pr of a target may be 1e-3 in float32.
    Then every other document is replaced by random tokens, which may change nothing, except up to 1e-4 if experts
    compute tokens of all documents together.
    """
    outcome = Outcome(
        "documents: packed",
        "documents that share a row are computed as if each were alone",
        "largest difference of log Pr of a target, in nats",
    )
    examples = list(subject.samples) * (2 if len(subject.samples) == 1 else 1)
    model = subject.plain()
    alone = [log_probs_alone(model, example)[0] for example in examples]
    del model
    module = subject.loaded()
    packed = module.isolates_documents
    batch = collate(examples, packed=packed).to(subject.device)
    assert module.attention is not None
    outcome.remarks.append(f"Attention: {module.attention.name}.")
    if not packed:
        outcome.remarks.append("Documents in a row attend to each other in this model, so fit gives each one a row.")
    own = _of_documents(module, batch)
    names = batch.provenance
    errors = _differences(names, own, alone)
    outcome.cases.append(Case.of("packed against alone" if packed else "padded against alone", errors, _at(subject)))
    untouched: dict[str, float] = {}
    for parity in (0, 1):
        changed = _of_documents(module, _with_other_tokens(batch, parity, module.num_embeddings or 2))
        untouched |= _differences(names[1 - parity :: 2], changed[1 - parity :: 2], own[1 - parity :: 2])
    outcome.cases.append(Case.of("other documents changed", untouched, UNTOUCHED[subject.precision]))
    return outcome


def _at(subject: Subject) -> float:
    return TOLERANCE[subject.precision]


def _of_documents(module: SFTModule, batch: Batch) -> list[Tensor]:
    """Log-probabilities of the targets of each document under the module, in order."""
    log_probs = module(batch).log_probs.cpu().double()
    of_target = batch.at_targets(batch.documents()).cpu()
    return [log_probs[of_target == number] for number in range(len(batch.provenance))]


def _with_other_tokens(batch: Batch, parity: int, num_tokens: int) -> Batch:
    """The batch with random tokens in every other document and unchanged labels."""
    generator = torch.Generator().manual_seed(parity)
    drawn = torch.randint(num_tokens, batch.input_ids.shape, generator=generator).to(batch.input_ids.device)
    is_changed = batch.documents() % 2 == parity
    changed = torch.where(is_changed, drawn, batch.input_ids)
    return Batch(changed, batch.labels, batch.position_ids, batch.target_weights, provenance=batch.provenance)


def _differences(names: tuple[str, ...], found: list[Tensor], wanted: list[Tensor]) -> dict[str, float]:
    """The largest difference by row, over all its documents."""
    errors: dict[str, float] = {}
    for name, own, right in zip(names, found, wanted, strict=True):
        errors[name] = float(np.maximum(errors.get(name, 0.0), (own - right).abs().max().item()))  # NaN stays
    return errors
