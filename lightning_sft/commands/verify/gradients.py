"""Check of the gradient of a step, split in several ways, against one pass over the same samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sft.commands.verify.reference import gradients_alone, relative_errors
from lightning_sft.commands.verify.subject import Subject
from lightning_sft.commands.verify.verdict import Case, Outcome
from lightning_sft.data.batches.packing import Packing

TOLERANCE = {"32-true": 1e-4, "64-true": 1e-6, "bf16-true": 5e-2}
"""Tolerance on the relative difference of a tensor; in 64-true some layers still compute in float32."""

_SPLITS = (1, 2, 4)


class Recorder(Optimizer):
    """Optimizer that records the gradients of a step and updates nothing."""

    def __init__(self, groups: Any, names: dict[int, str]) -> None:
        super().__init__(groups, {"lr": 0.0})
        self.names, self.steps = names, list[dict[str, Tensor]]()

    def step(self, closure: Any = None) -> Any:
        """Compute the gradients, and record them by parameter name."""
        loss = closure()
        own = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.steps.append({self.names[id(p)]: p.grad.cpu().double() for p in own})
        return loss


def check_gradients(subject: Subject) -> Outcome:
    """Check that a step's gradient is ``−∇ Σ_t w_t · log Pr(t) / Z``, however its samples are split into micro-batches.

    Each split runs through Lightning's trainer, the module and the data module as in ``fit``, up to the optimizer. The
    reference is :mod:`lightning_sft.commands.verify.reference` on plain transformers, with the loss of a subclass if it
    has its own. The measure is ``‖difference‖ / ‖reference‖`` per tensor, up to 1e-4 in float32 and 1e-6 in float64.
    Dropout and noise are off in both, and parameters initialized to zero get small values.
    """
    outcome = Outcome(
        "gradients: of a step",
        "a step has the gradient of the objective over its samples, however it is split into micro-batches",
        "largest relative difference of a tensor from one pass over the same samples, document by document",
    )
    own_loss = subject.loaded() if subject.module.has_own_loss else None
    wanted = gradients_alone(subject.plain(), subject.samples, own_loss)
    module = own_loss or subject.loaded()
    assert module.model is not None
    names = {id(p): name for name, p in module.model.named_parameters()}
    module._settle(schedule="constant", warmup=0.0)
    module.optimizer = lambda groups: Recorder(groups, names)
    packings: list[Packing] = ["packed", "padded"] if module.isolates_documents else ["padded"]
    if len(packings) == 1:
        outcome.remarks.append("This model is not packed, since documents in a row would attend to each other.")
    for packing in packings:
        for count in [n for n in _SPLITS if n <= len(subject.samples)]:
            settings: dict[str, Any] = {"accumulate_grad_batches": count, "precision": subject.precision}
            trainer = subject.fit(module, packing, count, **settings)
            [recorder] = trainer.optimizers
            assert isinstance(recorder, Recorder)
            [found] = recorder.steps
            name = f"{count} {packing} micro-batch" + "es" * (count > 1)
            outcome.cases.append(Case.of(name, relative_errors(found, wanted), TOLERANCE[subject.precision]))
            torch.cuda.empty_cache()
    return outcome
