"""Exact resume: the position of a run between two optimizer steps, from which it resumes bit for bit.

Lightning restores its counters as they were when saving. That may have been within an optimizer step, whose gradients
are lost; at the end of an epoch cut by ``max_steps``, which would count as complete; or within a validation, whose
first half is lost. So a checkpoint also holds a :class:`RunPosition`, from which the counters are computed.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_sft.checkpoints.run_info import data_differences
from lightning_sft.training.optimizers import parts_of
from lightning_sft.training.trainer import context_parallel, data_parallel, datamodule_of
from lightning_sft.types import InputError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.loops.progress import _ProcessedTracker

    from lightning_sft.datamodule import SFTDataModule

POSITION_KEY = "lightning_sft_place"
"""Checkpoint key of the run's position."""

SHARDED_KEY = "lightning_sft_sharded"
"""Key that marks a loaded checkpoint as the weights and facts of a sharded one."""

OPTIMIZER_KEY = "lightning_sft_optimizer"
"""Checkpoint key of the requested optimizer settings."""


@dataclass(frozen=True)
class RunPosition:
    """A position between two optimizer steps.

    Args:
        epoch: Number of the epoch, from 0.
        steps: Number of completed optimizer steps of the epoch.
        micro_batches: Number of micro-batches per rank in these steps.
        is_last: Whether the epoch has no further micro-batches.
        is_validated: Whether the validation that may be due at this position has run.
        num_ranks: Number of data-parallel ranks.
        accumulate: Number of micro-batches per rank in one optimizer step.
        seed: Seed of dropout and other random numbers in the computation of micro-batches.
        plan: Fingerprint of the order of the data; ``None`` without a plan.
    """

    epoch: int
    steps: int
    micro_batches: int
    is_last: bool
    is_validated: bool
    num_ranks: int
    accumulate: int
    seed: int
    plan: str | None

    @classmethod
    def of(cls, trainer: Trainer, seed: int) -> RunPosition:
        """The position of a trainer after its last optimizer step; may be called at any time."""
        fit, loop, accumulate = trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer.accumulate_grad_batches
        epochs, batches = cast("_ProcessedTracker", fit.epoch_progress.current), loop.batch_progress.current
        steps = loop.automatic_optimization.optim_progress.optimizer.step.current.completed
        if epochs.started < epochs.ready:  # Lightning has not yet reset the micro-batch counters
            return cls(epochs.ready - 1, 0, 0, False, True, *_split(trainer), seed, plan_of(trainer))
        epoch, done = max(0, epochs.ready - 1), min(steps * accumulate, batches.ready)
        is_last = 0 < done == batches.ready and loop._num_ready_batches_reached()
        if is_last and epochs.processed > epoch:
            epoch, steps, done, is_last = epochs.processed, 0, 0, False
        is_validated = batches.ready > done or epochs.processed > epoch or _validation_has_ended(trainer)
        return cls(epoch, steps, done, is_last, is_validated, *_split(trainer), seed, plan_of(trainer))

    def on(self, num_ranks: int, accumulate: int, plan: str | None, differ: Callable[[], str] = str) -> RunPosition:
        """The same position under another division of the epoch into ranks and steps.

        Args:
            num_ranks: New number of data-parallel ranks.
            accumulate: New number of micro-batches per rank in one optimizer step.
            plan: Fingerprint of the new order of the data.
            differ: Function that gives the settings of the data that are not those of the checkpoint, in words.

        Raises:
            InputError: When the remaining steps of a started epoch would differ.
        """
        size, new_size = self.num_ranks * self.accumulate, num_ranks * accumulate
        changed = replace(self, num_ranks=num_ranks, accumulate=accumulate, plan=plan)
        is_inside = self.micro_batches and not self.is_last
        if not is_inside and size != new_size:
            return replace(changed, epoch=self.epoch + self.is_last, steps=0, micro_batches=0, is_last=False)
        if size != new_size:  # before the plans, since an epoch is filled up to whole steps, so they differ, too
            fits = size % num_ranks == 0
            accumulation = f"trainer.accumulate_grad_batches={size // num_ranks}"
            raise InputError(
                f"The checkpoint was saved within epoch {self.epoch} with {self.num_ranks} ranks x {self.accumulate} "
                f"micro-batches per step; now they are {num_ranks} x {accumulate}, so its steps would have other data. "
                f"Set {accumulation if fits else f'devices whose number divides {size}'}, or resume from a checkpoint "
                "at the end of an epoch."
            )
        if is_inside and self.plan != plan and None not in (self.plan, plan):
            raise InputError(
                f"The checkpoint was saved within epoch {self.epoch}, and the data or their order have changed since: "
                f"{differ() or f'{self.plan}; now {plan}'}. Resume with the original data and settings, or start a new "
                "run from its weights (lightning-sft export)."
            )
        return replace(changed, micro_batches=self.micro_batches * self.num_ranks // num_ranks)

    def counters(self, saved: Mapping[str, Any], accumulated: int) -> dict[str, Any]:
        """The counters of Lightning's fit loop for this position.

        Args:
            saved: Counters in the checkpoint.
            accumulated: Number of micro-batches per step when the checkpoint was saved.
        """
        loops = deepcopy(dict(saved))
        batches, total = loops["epoch_loop.batch_progress"], loops["epoch_loop.batch_progress"]["total"]["ready"]
        total = (total - batches["current"]["ready"]) * self.accumulate // accumulated + self.micro_batches
        started, done = (self.epoch + 1, self.epoch) if self.micro_batches else (self.epoch, self.epoch)
        _set(loops["epoch_progress"], dict.fromkeys(("total", "current"), (started, started, done, done)))
        at = {"total": (total,) * 4, "current": (self.micro_batches,) * 4}
        _set(batches, at)
        batches["is_last_batch"] = self.is_last
        validation, pending = loops["epoch_loop.val_loop.batch_progress"], self.micro_batches and not self.is_validated
        _set(validation, {"total": (1, 1, 0, 0) if pending else (0,) * 4, "current": (0,) * 4})  # as if at its first
        validation["is_last_batch"] = False
        optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        optimizer["step"]["current"] = {"ready": self.steps, "completed": self.steps}
        all_steps = optimizer["step"]["total"]["completed"]
        optimizer["step"]["total"]["ready"] = all_steps
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] = all_steps - bool(self.micro_batches)
        return loops


class RunState:
    """What a module keeps of its run so that a checkpoint resumes it: the seed of its draws, and what was asked of its
    optimizer, now and when the checkpoint was saved.
    """

    def __init__(self) -> None:
        self.seed: int | None = None
        self._asked: AskedSettings | None = None
        self._saved: AskedSettings | None = None
        self._schedule: LambdaLR | None = None
        self._micro_batch = (0, 0, 0)  # seed of the run, number of the epoch, and of the micro-batch in it

    def made(self, optimizer: Optimizer) -> None:
        """Note the settings of an optimizer that has just been made.

        Raises:
            InputError: When the checkpoint has the state of another optimizer, or of other parameters.
        """
        self._asked = AskedSettings.of(optimizer)
        self._asked.check(self._saved)

    def scheduled(self, schedule: LambdaLR) -> None:
        """Note the module's own schedule, as opposed to one of a subclass or a callback."""
        self._schedule = schedule

    def begin(self, trainer: Trainer) -> None:
        """Let settings that have changed since the checkpoint take effect, see :func:`retune`."""
        if self._asked is not None:
            retune(trainer, self._asked, self._saved, self._schedule)
        self._schedule = None  # else copies of the module would have an optimizer

    def changes(self) -> list[str]:
        """Settings of the optimizer that are not those of the checkpoint, as ``lr=0.001``."""
        if self._asked is None or self._saved is None:
            return []
        pairs = zip(self._asked.groups, self._saved.groups, strict=True)
        return list(dict.fromkeys(f"{n}={v}" for now, old in pairs for n, v in now.items() if not _same(v, old.get(n))))

    def seed_micro_batch(self, trainer: Trainer, number: int) -> None:
        """Seed the draws of a micro-batch, see :func:`seed_micro_batch`.

        Args:
            trainer: The Lightning trainer.
            number: Number of the micro-batch in the epoch, from 0.
        """
        if self.seed is None:
            self.seed = seed_of(trainer)
        part, num_parts = context_parallel(trainer)
        self._micro_batch = self.seed, trainer.current_epoch, number
        seed_micro_batch(*self._micro_batch, data_parallel(trainer)[0] * num_parts + part)

    def seed_after_loss(self) -> None:
        """Seed the draws that follow the loss of a micro-batch: those of the optimizer and of callbacks, which change
        the weights of all ranks, so all ranks draw the same.
        """
        seed_micro_batch(*self._micro_batch, 0, 1)

    def save(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Add the run's position and its optimizer's settings to a checkpoint."""
        if self._asked is not None:
            checkpoint[OPTIMIZER_KEY] = asdict(self._asked)
        seed = seed_of(trainer) if self.seed is None else self.seed
        checkpoint[POSITION_KEY] = asdict(RunPosition.of(trainer, seed))

    def load(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Take the position and the settings of a checkpoint, see :func:`restore`.

        Raises:
            InputError: When the run cannot resume from it exactly.
        """
        self.seed = restore(trainer, checkpoint)
        self._saved = AskedSettings(**checkpoint[OPTIMIZER_KEY]) if OPTIMIZER_KEY in checkpoint else None
        if self._asked is not None:  # some strategies load the checkpoint after the optimizer is made
            self._asked.check(self._saved)


def restore(trainer: Trainer, checkpoint: dict[str, Any]) -> int | None:
    """Set the counters of a checkpoint to its position, and return the seed of its run.

    Args:
        trainer: Trainer that is about to restore the checkpoint.
        checkpoint: Loaded checkpoint, changed in place; one without a position is left unchanged.

    Returns:
        The seed of the resumed run, or ``None`` without a position.

    Raises:
        InputError: When the run cannot resume exactly.
    """
    if SHARDED_KEY in checkpoint:
        raise InputError(
            f"{trainer.ckpt_path} was written by a strategy that shards the model. Resume it with that strategy "
            "(fsdp2, deepspeed_stage_*); to start from its weights, export it (lightning-sft export) and set "
            "model.pretrained to that folder."
        )
    if "callbacks" not in checkpoint:
        raise InputError(
            f"{trainer.ckpt_path} has only the weights (save_weights_only), from which no run can resume. Export them "
            "(lightning-sft export) and set model.pretrained to that folder, or resume from a full checkpoint."
        )
    if POSITION_KEY not in checkpoint:
        return None
    saved = RunPosition(**checkpoint[POSITION_KEY])
    place = saved.on(*_split(trainer), plan_of(trainer), partial(data_differences, trainer, checkpoint))
    loops = checkpoint["loops"] = dict(checkpoint["loops"])
    loops["fit_loop"] = place.counters(loops["fit_loop"], saved.accumulate)
    if (now := seed_of(trainer)) != saved.seed:
        warnings.warn(
            f"The run resumes with its original seed, {saved.seed}: seed_everything={now} has no effect.",
            stacklevel=2,
        )
    return saved.seed


def seed_of(trainer: Trainer) -> int:
    """The seed of a run: from ``seed_everything``, which the command line always calls, or else ``data.seed``."""
    of_data: int = getattr(datamodule_of(trainer), "seed", 0)
    return int(os.environ.get("PL_GLOBAL_SEED", of_data))


def seed_micro_batch(*place: int) -> None:
    """Seed torch, numpy and Python for a micro-batch, so that its random numbers do not depend on earlier draws.

    Args:
        place: Seed of the run, number of the epoch, number of the micro-batch in it, and number of the rank; ranks that
            share matrices draw the same numbers, those that share rows draw their own.

    >>> seed_micro_batch(0, 1, 7, 0)
    >>> first = torch.rand(3)
    >>> seed_micro_batch(0, 1, 7, 0)
    >>> torch.equal(first, torch.rand(3))
    True
    """
    torch_seed, numpy_seed, python_seed = np.random.SeedSequence(place).generate_state(3).tolist()
    torch.manual_seed(torch_seed)
    np.random.seed(numpy_seed)
    random.seed(python_seed)


def plan_of(trainer: Trainer) -> str | None:
    """Fingerprint of the order of the data, or ``None`` for streams and for the user's own loaders."""
    data = cast("SFTDataModule", datamodule_of(trainer))  # or a user's own
    if not hasattr(data, "planned") or data.streaming or "train" not in data.splits:
        return None
    return str(data.planned("train").plan.fingerprint)


@dataclass(frozen=True)
class AskedSettings:
    """Requested settings of an optimizer, before it changes them: some optimizers keep state in their groups.

    Args:
        classes: Names of the classes of the optimizer's parts.
        sizes: Number of parameters in each group.
        groups: Initial settings of each group.
    """

    classes: list[str]
    sizes: list[int]
    groups: list[dict[str, Any]]

    @classmethod
    def of(cls, optimizer: Optimizer) -> AskedSettings:
        """The settings of a newly created optimizer."""
        groups = [{n: deepcopy(v) for n, v in g.items() if n not in _NO_SETTINGS} for g in optimizer.param_groups]
        return cls(
            [type(part).__name__ for part in parts_of(optimizer)],
            [len(g["params"]) for g in optimizer.param_groups],
            groups,
        )

    def check(self, saved: AskedSettings | None) -> None:
        """Refuse the state of another optimizer.

        Args:
            saved: Settings in the checkpoint, if it has any.

        Raises:
            InputError: When its class or its parameters differ.
        """
        if saved is None:
            return
        own, other = " and ".join(self.classes), " and ".join(saved.classes)
        if own != other:
            raise InputError(
                f"The checkpoint has the state of {other}, but model.optimizer is {own}. Resume with the original "
                "optimizer, or start a new run from its weights (lightning-sft export)."
            )
        if self.sizes != saved.sizes:
            raise InputError(
                f"The checkpoint has optimizer states of {saved.sizes} parameters by group, now they are "
                f"{self.sizes}. Resume with the original model.frozen, trained, lora and optimizers."
            )


def retune(trainer: Trainer, asked: AskedSettings, saved: AskedSettings | None, own: LambdaLR | None) -> None:
    """Apply changed settings over those of a checkpoint, and set the schedule's learning rate.

    Unchanged settings are left as restored, so state that an optimizer keeps among its settings is preserved. From here
    on the schedule follows the new number of steps.

    Args:
        trainer: Trainer whose optimizers have been restored.
        asked: Requested settings of the current optimizer.
        saved: Requested settings in the checkpoint, or ``None``.
        own: The module's ``LambdaLR``. Any other scheduler, from a subclass or Lightning's learning-rate finder, is not
            changed.
    """
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    if len(groups) != len(asked.groups):  # a subclass that creates another optimizer
        return
    own = own if [config.scheduler for config in trainer.lr_scheduler_configs] == [own] else None
    for number, (group, now) in enumerate(zip(groups, asked.groups, strict=True)):
        before = now if saved is None else saved.groups[number]
        changed = {name: value for name, value in now.items() if name not in before or not _same(value, before[name])}
        if "lr" in changed and own is None:
            warnings.warn(
                f"The optimizer's lr={now['lr']} has no effect: the schedule of the checkpoint uses lr="
                f"{before.get('lr')}.",
                stacklevel=2,
            )
        group.update({name: value for name, value in changed.items() if name != "lr"})
        if own is not None:
            group["initial_lr"] = own.base_lrs[number] = now["lr"]
            group["lr"] = now["lr"] * own.lr_lambdas[number](own.last_epoch)
    if own is not None:
        own._last_lr = [group["lr"] for group in groups]


_NO_SETTINGS = ("params", "param_names", "name")  # keys of a parameter group


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return bool((torch.as_tensor(one) == torch.as_tensor(other)).all())
    return bool(one == other)


def _split(trainer: Trainer) -> tuple[int, int]:
    return data_parallel(trainer)[1], trainer.accumulate_grad_batches


def _validation_has_ended(trainer: Trainer) -> bool:
    """Whether a validation is complete except for its last hooks, in which checkpoints are saved."""
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress.current
    return bool(trainer.validating) and progress.completed >= sum(trainer.num_val_batches)


def _set(progress: dict[str, Any], values: Mapping[str, Sequence[int]]) -> None:
    for name, numbers in values.items():
        progress[name] = dict(zip(("ready", "started", "processed", "completed"), numbers, strict=True))
