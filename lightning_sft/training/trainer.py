"""Properties of Lightning's trainer that the library uses, in one place."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning import pytorch
from lightning.pytorch.utilities import rank_zero_info

from lightning_sft.data.batches.plan import Division
from lightning_sft.io.arguments import check_arguments
from lightning_sft.objective import NORMALIZATIONS
from lightning_sft.types import InputError, Normalize

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The trainer's callbacks, in the order in which they are called; Lightning declares no type for the attribute."""
    callbacks: list[Callback] = cast(Any, trainer).callbacks
    return callbacks


def averages_weights(callbacks: Sequence[Callback]) -> bool:
    """Whether one of the callbacks averages the weights over training, as Lightning's ``EMAWeightAveraging`` does."""
    from lightning.pytorch.callbacks import WeightAveraging

    return any(isinstance(callback, WeightAveraging) for callback in callbacks)


def announce(trainer: Trainer | None, fact: str) -> None:
    """Log a fact about a run, unless a callback shows it together with the others, or no trainer runs the model."""
    if trainer is not None and not any(getattr(callback, "shows_facts", False) for callback in callbacks_of(trainer)):
        rank_zero_info(fact)


def datamodule_of(trainer: Trainer) -> LightningDataModule | None:
    """The trainer's data module, which may be a user's own; Lightning declares no type for the attribute."""
    datamodule: LightningDataModule | None = cast(Any, trainer).datamodule
    return datamodule


def how_to_resume(trainer: Trainer, path: object = "last") -> str:
    """What the user writes to resume a run: an option of a command line, or an argument in a script.

    Args:
        trainer: The Lightning trainer; one of a ``LightningCLI`` has its callback for the configuration.
        path: The checkpoint.
    """
    from lightning.pytorch.cli import SaveConfigCallback

    is_cli = any(isinstance(callback, SaveConfigCallback) for callback in callbacks_of(trainer))
    return f"--ckpt_path {path}" if is_cli else f'trainer.fit(..., ckpt_path="{path}")'


def logged_in_training(trainer: Trainer) -> set[str]:
    """Names of the metrics that the training step and its hooks log; the others are those of an earlier validation."""
    results = cast(Any, trainer)._results
    logged = () if results is None else (item.meta for _, item in results.valid_items() if item.meta.on_step)
    return {name for meta in logged for name in (meta.name, meta.forked_name(on_step=True))}


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Whether the trainer tries a few batches only; Lightning declares no type for the attribute."""
    return bool(cast(Any, trainer).fast_dev_run)


def data_parallel(trainer: Trainer | None) -> tuple[int, int]:
    """Rank and size of the data-parallel group: not those of the world, where tensors are parallel too.

    Args:
        trainer: The Lightning trainer, or ``None`` for a single process.
    """
    shares = None if trainer is None else trainer.distributed_sampler_kwargs
    return (shares["rank"], shares["num_replicas"]) if shares else (0, 1)


def context_parallel(trainer: Trainer | None) -> tuple[int, int]:
    """Rank and size of the group whose ranks share the tokens of each row; (0, 1) where no rows are split.

    Args:
        trainer: The Lightning trainer, or ``None`` for a single process.
    """
    context = getattr(getattr(trainer, "strategy", None), "context", None)
    return (context.rank, context.size) if context is not None else (0, 1)


def on_cuda(trainer: Trainer | None) -> bool:
    """Whether a trainer, which may be one on paper, trains on CUDA devices; without a trainer, none does."""
    strategy = getattr(trainer, "strategy", None)
    return strategy is not None and bool(strategy.root_device.type == "cuda")


_INTEGERS = ("accumulate_grad_batches", "max_epochs", "max_steps")


def check_numbers(trainer: Trainer) -> None:
    """Refuse what Lightning takes as it is.

    Args:
        trainer: The Lightning trainer, or one on paper.

    Raises:
        InputError: When a number of epochs, steps or micro-batches is not an integer, ``accumulate_grad_batches`` is
            less than 1, or ``gradient_clip_val``, which would turn every gradient around, less than 0.
    """
    numbers = {name: getattr(trainer, name) for name in _INTEGERS if hasattr(trainer, name)}
    check_arguments(pytorch.Trainer, numbers, "trainer")
    if trainer.accumulate_grad_batches < 1:
        raise InputError(f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}; expected at least 1.")
    clip = getattr(trainer, "gradient_clip_val", None)
    if clip is not None and clip < 0:
        raise InputError(f"trainer.gradient_clip_val is {clip}; expected a positive number or null.")


def division_of(trainer: Trainer | None) -> Division:
    """How a trainer divides the work of its training; that of a single process if it is ``None``."""
    if trainer is None:
        return Division()
    check_numbers(trainer)
    rank, num_ranks = data_parallel(trainer)
    accumulate, limit = trainer.accumulate_grad_batches, trainer.limit_train_batches
    return Division(rank, num_ranks, accumulate, limit, trainer.num_devices)


def autocast_dtype(trainer: Trainer | None) -> torch.dtype | None:
    """Dtype that layers compute in under the trainer's autocast, or ``None`` where there is no autocast.

    Args:
        trainer: The Lightning trainer, or ``None``.
    """
    dtypes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    return None if trainer is None else dtypes.get(str(trainer.precision))


def root_device(trainer: Trainer | None) -> torch.device:
    """The device that the trainer trains on; without a trainer the first GPU, or the CPU where there is none."""
    if trainer is not None:
        device: torch.device = trainer.strategy.root_device
        return device
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def divisors(trainer: Trainer) -> tuple[int, int]:
    """Divisors applied to a micro-batch's gradient before the optimizer sees it: accumulation, and ranks.

    Lightning divides the loss by ``accumulate_grad_batches``, also in a short last window, and strategies average over
    the data-parallel ranks, and over those that share a row, each of which has the gradient of its own targets.
    DeepSpeed, which accumulates by itself, divides by the accumulation again.
    """
    accumulate = trainer.accumulate_grad_batches
    by_itself = trainer.strategy.handles_gradient_accumulation
    num_ranks = data_parallel(trainer)[1] * context_parallel(trainer)[1]
    return accumulate * (accumulate if by_itself else 1), num_ranks


def sum_over_ranks(trainer: Trainer, tensor: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over data-parallel ranks; copies on ranks that share a row or matrices are counted once.

    The reduction is over all processes, so it is divided by the copies: exact, since each adds the same to the sum.
    """
    copies: int = trainer.world_size // data_parallel(trainer)[1]
    return _summed(trainer, tensor) / copies


def _summed(trainer: Trainer, tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, queued on the device.

    Lightning's ``strategy.reduce`` calls ``barrier`` first, and that of nccl lets the host wait for the device.
    """
    total = tensor.clone()
    if trainer.world_size > 1:
        torch.distributed.all_reduce(total)
    return total


def position(trainer: Trainer | None) -> tuple[int, int]:
    """The epoch, and its micro-batches that are done, as Lightning restores them from a checkpoint.

    ``overfit_batches`` asks for the same micro-batches in every epoch: those of the first; so does no trainer at all.
    """
    if trainer is None:
        return 0, 0
    epoch = 0 if cast(Any, trainer).overfit_batches else trainer.current_epoch
    return epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready


def is_between_steps(trainer: Trainer) -> bool:
    """Whether the optimizer step of the micro-batch under way has been taken; asked when it ends."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def is_last_step(trainer: Trainer) -> bool:
    """Whether the optimizer step under way is the last of its epoch, or of ``max_steps``."""
    is_last_of_fit = 0 < trainer.max_steps <= trainer.global_step + 1
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached() or is_last_of_fit


class Agreement:
    """A yes or no of several processes, asked between optimizer steps about once a second.

    Each time, processes wait for each other, and for their devices: steps of a tenth of a second ask after every tenth.

    Args:
        seconds: About how often processes ask each other.
    """

    def __init__(self, seconds: float = 1.0) -> None:
        self.seconds = seconds
        self._steps_left, self._between, self._begin = 0, 0, 0.0

    def one_says(self, trainer: Trainer, yes: bool) -> bool:
        """Whether a process has said yes; every process calls it after the same steps."""
        if trainer.world_size == 1:
            return yes
        self._steps_left -= 1
        if self._steps_left > 0:
            return False
        now = time.monotonic()
        pace = (now - self._begin) / self._between if self._between else self.seconds  # seconds a step
        wanted = max(1, min(_MOST_STEPS, int(self.seconds / max(pace, 1e-9))))
        own = [float(yes), float(wanted) if trainer.is_global_zero else 0.0]
        asked = torch.tensor(own, device=trainer.strategy.root_device)
        said, steps = _summed(trainer, asked).tolist()
        self._steps_left = self._between = int(steps)
        self._begin = time.monotonic()
        return bool(said)


_MOST_STEPS = 10  # between two times that processes ask each other


def gather(trainer: Trainer | None, value: Any) -> list[Any]:
    """The values of all data-parallel ranks, in order of the ranks, from that of each; every process has to call it."""
    rank, num_ranks = data_parallel(trainer)
    if num_ranks == 1:
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, (rank, value))
    return [of_rank for _, of_rank in sorted(dict(found).items())]


def check_step(module: LightningModule, normalize: Normalize, has_normalizer: bool) -> None:
    """Refuse a training step that Lightning would not complete, or whose gradient could not be normalized.

    Args:
        module: The module whose step it is.
        normalize: How the module normalizes a step.
        has_normalizer: Whether the batch has the Z of its step.

    Raises:
        InputError: Within another module or under manual optimization, whose steps have no hooks of this one; for a
            batch without Z where it has to be planned, or under DeepSpeed.
    """
    name = type(module).__name__
    if module.trainer.lightning_module is not module:
        raise InputError(
            f"{name} is part of {type(module.trainer.lightning_module).__name__}, whose step Lightning completes: its "
            "own, which normalizes the gradient, is not called. Fit it by itself, or derive your module from SFTModule."
        )
    if not module.automatic_optimization:
        raise InputError(
            f"{name}.automatic_optimization is False, and the training step of SFTModule is one of automatic "
            "optimization. Leave it True, or write a training_step of your own."
        )
    if has_normalizer:
        return
    if NORMALIZATIONS[normalize].is_planned:
        raise InputError(f"model.normalize={normalize} needs batches of SFTDataModule, which plans ahead.")
    if module.trainer.strategy.handles_gradient_accumulation:
        raise InputError("DeepSpeed needs batches of SFTDataModule: its gradients cannot be normalized late.")


def first_rank_does(trainer: Trainer, work: Callable[[], object]) -> None:
    """Run a disk operation on rank 0; every rank must call this, and raises its error.

    For short operations: other ranks wait in a collective, which would time out on long work (``export.first_rank``).

    Raises:
        InputError: On every rank, where the work raised it.
    """
    message = None
    if trainer.is_global_zero:
        try:
            work()
        except InputError as error:
            message = str(error)
    if (message := trainer.strategy.broadcast(message)) is not None:
        raise InputError(message)


def total_steps(trainer: Trainer, *, may_be_endless: bool = False) -> int:
    """Optimizer steps of the whole fit: the minimum of ``max_steps`` and the data module's planned steps.

    Raises:
        InputError: When neither gives an end, and there has to be one.
    """
    ends: list[float] = [trainer.max_steps] if trainer.max_steps > 0 else []
    per_epoch = getattr(datamodule_of(trainer), "steps_per_epoch", None)
    if per_epoch is None and not ends:
        ends.append(trainer.estimated_stepping_batches)  # reads the user's own loader
    elif per_epoch is not None and (epochs := trainer.max_epochs or 0) > 0:
        ends.append(per_epoch * epochs)  # infinite for a stream, whose end nobody knows
    if ends and 0 < min(ends) < math.inf:
        return int(min(ends))
    if may_be_endless:
        return 1
    if per_epoch == 0:
        limit = trainer.limit_train_batches
        raise InputError(f"trainer.limit_train_batches={limit} leaves no micro-batch of an epoch. Raise it.")
    raise InputError(
        "A learning-rate schedule needs an end: set trainer.max_steps or max_epochs, or schedule=constant."
    )


def trainer_on_paper(module: LightningModule | None, settings: Any) -> SimpleNamespace:
    """A stand-in with the trainer attributes that the data module needs; its devices need not be available.

    Args:
        module: The Lightning module that would be trained.
        settings: The arguments of a trainer, as attributes.

    >>> settings = SimpleNamespace(devices="2", num_nodes=2, accelerator="gpu", accumulate_grad_batches=4)
    >>> vars(settings).update(limit_train_batches=None, overfit_batches=0.0, fast_dev_run=False, strategy="ddp")
    >>> data_parallel(trainer_on_paper(None, settings))
    (0, 4)
    """
    limit = int(settings.fast_dev_run) or settings.overfit_batches or settings.limit_train_batches
    done = SimpleNamespace(current=SimpleNamespace(ready=0))
    return SimpleNamespace(
        lightning_module=module,
        is_global_zero=True,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        limit_train_batches=1.0 if limit is None else limit,
        num_devices=_num_devices(settings),
        current_epoch=0,
        overfit_batches=settings.overfit_batches,
        strategy=SimpleNamespace(root_device=torch.device("cuda" if _is_on_cuda(settings) else "cpu")),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=done)),
        distributed_sampler_kwargs={"rank": 0, "num_replicas": num_devices(settings) // _copies(settings.strategy)},
    )


def num_devices(settings: Any) -> int:
    """Devices of all nodes that the arguments of a trainer ask for.

    Raises:
        InputError: When a number of devices or nodes is none.
    """
    if settings.num_nodes < 1:
        raise InputError(f"trainer.num_nodes is {settings.num_nodes}; expected at least 1.")
    return _num_devices(settings) * int(settings.num_nodes)


def _copies(strategy: Any) -> int:
    """On how many devices a batch is, by the arguments of a strategy: where matrices or rows are split over some."""
    own = getattr(strategy, "init_args", None) or {}
    sizes = [own.get(f"{kind}_parallel_size") for kind in ("tensor", "context")]
    return math.prod(size for size in sizes if isinstance(size, int))


def _is_on_cuda(settings: Any) -> bool:
    return settings.accelerator in ("cuda", "gpu") or (settings.accelerator == "auto" and torch.cuda.is_available())


def _num_devices(settings: Any) -> int:
    """Devices of a node, where ``devices`` is a number, a list of devices, or asks for all that are here."""
    devices = settings.devices
    if isinstance(devices, str) and "," in devices:
        devices = [name for name in devices.split(",") if name.strip()]
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return len(devices)
    if str(devices) in ("auto", "-1"):
        return 1 if settings.accelerator == "cpu" else max(1, torch.cuda.device_count())
    if not str(devices).isdecimal() or not int(devices):
        raise InputError(f"trainer.devices is {devices}; expected a number of devices, a list as [0, 1], or auto.")
    return int(devices)
