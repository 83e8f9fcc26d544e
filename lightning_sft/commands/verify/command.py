"""``lightning-sft verify``: the checks of the test suite on the user's model, data and device."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule

from lightning_sft import __version__
from lightning_sft.commands.base import ConfigCLI
from lightning_sft.commands.verify.contexts import check_contexts
from lightning_sft.commands.verify.documents import check_documents
from lightning_sft.commands.verify.exports import check_exports
from lightning_sft.commands.verify.gradients import check_gradients
from lightning_sft.commands.verify.resuming import check_resuming
from lightning_sft.commands.verify.subject import Subject
from lightning_sft.commands.verify.verdict import Outcome, Verdict
from lightning_sft.datamodule import SFTDataModule
from lightning_sft.io.arguments import Count, Index, check_arguments
from lightning_sft.io.words import counted
from lightning_sft.machine.terminal import Console
from lightning_sft.module import SFTModule
from lightning_sft.types import InputError

CheckName = Literal["contexts", "documents", "gradients", "resume", "export"]
CHECKS: dict[CheckName, Callable[[Subject], Outcome]] = {
    "contexts": check_contexts,
    "documents": check_documents,
    "gradients": check_gradients,
    "resume": check_resuming,
    "export": check_exports,
}


def verify(
    data: LightningDataModule,
    module: LightningModule,
    trainer: Any,
    checks: list[CheckName] | None = None,
    samples: Count = 8,
    tokens: Count = 1024,
    rows: Count = 10_000,
    in_float64: bool = False,
    choice: Index = 0,
    out: str | Path | None = None,
) -> Verdict:
    """Run the checks of the test suite on this model, data and device.

    Args:
        data: Data module, configured as for ``fit``.
        module: Module, configured as for ``fit``; its pretrained weights are verified.
        trainer: Settings of the trainer, of which accelerator and precision matter. The checks run on one device.
        checks: Names of the checks to run; by default all.
        samples: Maximum number of sequences whose gradients and likelihoods are computed: the longest that fits, the
            shortest, and random ones.
        tokens: Maximum number of tokens of these sequences together; the longest may have half as many.
        rows: Maximum number of rows whose trained ids are compared with the template.
        in_float64: Whether to compare gradients and likelihoods in float64, with a tolerance of 1e-6.
        choice: Seed of the random choice of samples and rows.
        out: Path of a JSON file for the verdict.

    Raises:
        InputError: When module or data are not those of lightning_sft, or the data cannot be read.
    """
    if not isinstance(data, SFTDataModule) or not isinstance(module, SFTModule):
        raise InputError("verify needs an SFTModule and an SFTDataModule, or subclasses of them.")
    check_arguments(verify, locals())
    with_flash = (module.attn_implementation or "").startswith("flash")  # which supports half precision only
    precision = "64-true" if in_float64 else "bf16-true" if with_flash else "32-true"
    screen = Console(stderr=True)
    screen.print("Reading the data")
    subject = Subject.of(module, data, trainer, samples, tokens, precision, rows, choice)
    verdict = Verdict(_about(subject), remarks=_remarks(subject))
    for number, name in enumerate(checks or CHECKS, 1):
        screen.print(
            f"Check {number} of {len(checks or CHECKS)}: {name}"
        )  # a line and no status, since Lightning prints in between
        verdict.outcomes.append(_run(name, subject))
    verdict.show(Console())
    if out is not None:
        verdict.write(out)
    return verdict


class VerifyCLI(ConfigCLI):
    """The command line of ``fit`` with the arguments of :func:`verify`; its ``result`` is the verdict."""

    verb = staticmethod(verify)

    @property
    def passes(self) -> bool:
        """Whether all checks passed."""
        return bool(self.result.passed)

    def after_instantiate_classes(self) -> None:
        """Run the verb, with a warning if ``ckpt_path`` is set."""
        if self.config_init.get("ckpt_path"):
            warnings.warn("ckpt_path has no effect in verify, which starts from model.pretrained.", stacklevel=2)
        super().after_instantiate_classes()


def _run(name: CheckName, subject: Subject) -> Outcome:
    """Run a check; one that raises has failed."""
    begin = time.perf_counter()
    try:
        outcome = CHECKS[name](subject)
    except (InputError, FloatingPointError, torch.OutOfMemoryError) as error:
        outcome = Outcome(name, "", "could not be completed", error=str(error))
    outcome.seconds = time.perf_counter() - begin
    return outcome


def _about(subject: Subject) -> dict[str, Any]:
    data, lengths = subject.data, subject.samples.lengths
    samples = [example.provenance for example in subject.samples]
    sizes = f"{lengths.min():,} to {lengths.max():,} tokens, {lengths.sum():,} in all"
    return {
        "model": subject.module.pretrained,
        "data": ", ".join(f"{name}: {counted(len(split.examples), 'sequence')}" for name, split in data.splits.items()),
        "samples": f"{counted(len(lengths), 'sequence')} of {sizes}: {', '.join(samples)}",
        "device": str(subject.device),
        "precision": f"{subject.precision} to compare, {subject.trainer.precision or '32-true'} to train",
        "versions": f"lightning_sft {__version__}, torch {torch.__version__}",
    }


def _remarks(subject: Subject) -> list[str]:
    """Remarks on what the checks do not cover."""
    trainer, remarks = subject.trainer, []
    longest = int(subject.data.splits["train"].examples.lengths.max())
    if longest > (most := int(subject.samples.lengths.max())):
        remarks.append(
            f"The longest sequence has {longest:,} tokens, the longest of the samples {most:,}: --tokens {2 * longest}"
        )
    if str(trainer.devices) not in ("1", "auto") or int(trainer.num_nodes) > 1 or str(trainer.strategy) != "auto":
        remarks.append(
            f"The checks ran on one device. That ranks share a step exactly (trainer.devices={trainer.devices}, "
            f"num_nodes={trainer.num_nodes}) is tested by tests/test_strategies.py: see docs/reference/strategies.md."
        )
    return remarks
