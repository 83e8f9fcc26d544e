"""Check of the exported folder in plain transformers against the trained model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_sft.checkpoints.reading import Checkpoint
from lightning_sft.checkpoints.writing import bytes_of_checkpoint, check_disk
from lightning_sft.commands.verify.reference import log_probs_alone
from lightning_sft.commands.verify.subject import Subject, quiet
from lightning_sft.commands.verify.verdict import Case, Outcome
from lightning_sft.export.convert import Settings, from_checkpoint
from lightning_sft.export.parity import built_in, held_out, unequal_weights
from lightning_sft.model.pretrained import load_exported
from lightning_sft.model.tuning.adapters import has_adapters
from lightning_sft.module import SFTModule
from lightning_sft.types import InputError

EXACT, ROUNDED = 1e-3, 0.2
"""Tolerances on log Pr of a target, in nats; the second for rounded weights, in half precision or quantized."""


def check_exports(subject: Subject) -> Outcome:
    """Check that the exported folder reproduces the trained model in plain transformers.

    After two steps as configured, a checkpoint is saved and exported. The folder is loaded as a user of transformers
    would, and compared with the model in memory, whose adapters are not merged: log Pr of all targets of the samples in
    float32, up to 1e-3 nats, and, without adapters, each weight bit for bit.
    """
    outcome = Outcome(
        "export",
        "the exported folder is, in plain transformers, the model that was trained",
        "largest difference of log Pr of a target, in nats; number of weights that differ in any bit",
    )
    settings: dict[str, Any] = {"max_steps": 2, "max_epochs": -1, "precision": subject.trainer.precision}
    trainer = subject.fit(None, None, 2, **settings)
    module = cast(SFTModule, trainer.lightning_module)
    assert module.model is not None
    mixture = subject.data.splits["train"].mixture
    try:
        rows = ("rows of the training data", held_out(mixture, subject.data.reading))
    except InputError:  # rows of token ids have no messages
        rows = ("a few built-in rows", built_in())
    with tempfile.TemporaryDirectory(dir=subject.folder) as folder, quiet():
        check_disk(Path(folder), 2 * bytes_of_checkpoint(module))
        path, out = str(Path(folder) / "trained.ckpt"), Path(folder) / "exported"
        trainer.save_checkpoint(path)
        from_checkpoint(Checkpoint(path), out, rows, Settings())
        exported = load_exported(out)
        module.cpu()
        if not has_adapters(module.model):
            unequal = unequal_weights(module.model, exported)
            outcome.cases.append(Case("weights", float(len(unequal)), 0.0, unequal))
        in_16_bits = module.tuning.quantize or exported.dtype != torch.float32
        trained, again = _log_probs(module.model, subject), _log_probs(exported, subject)
    errors = {name: float((again[name] - right).abs().max()) for name, right in trained.items()}
    outcome.cases.append(Case.of("likelihoods", errors, ROUNDED if in_16_bits else EXACT))
    return outcome


@torch.no_grad()
def _log_probs(model: PreTrainedModel, subject: Subject) -> dict[str, Tensor]:
    """Log-probabilities of the targets of each sample in float32, by row."""
    model.float().eval()
    return {f"{e.provenance}": log_probs_alone(model, e)[0] for e in subject.samples}
