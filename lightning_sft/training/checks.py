"""Checks that stop a run before it computes wrong results."""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_sft.io.words import listed
from lightning_sft.training.losses import warn_of_unused_inputs
from lightning_sft.training.monitors import check_monitors
from lightning_sft.training.schedules import check_length
from lightning_sft.training.trainer import check_numbers, context_parallel, gather
from lightning_sft.types import Batch, InputError, LogLikelihood, Prompt

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

_NAMED = 10  # maximum number of samples in the message
_TRIED = 200  # suspects of each rank that are computed alone: all of a large step would take minutes
OF_USERS = (RuntimeError, ValueError, LookupError, TypeError)
"""What a ``forward`` of a user's own may raise that takes no single document."""


def not_finite(seen: Iterable[tuple[Batch, LogLikelihood]], module: LightningModule) -> FloatingPointError:
    """The error for a non-finite loss, naming the samples of all ranks that cause it. Every rank must call this.

    Args:
        seen: Micro-batches of this rank to search, each with its log-likelihood.
        module: Lightning module that computes the log-likelihoods.
    """
    seen = list(seen)
    of_ranks = gather(module.trainer, [float(likelihood.weight) for _, likelihood in seen])
    if not any(map(sum, of_ranks)) and any(of_ranks):
        return FloatingPointError(
            "The loss is 0/0: no token of this step is a target, since all labels are -100 or have weight 0. Look at "
            "the labels of your batches."
        )
    suspects = [suspect for batch, likelihood in seen for suspect in _suspects(batch, likelihood)]
    where = samples_in_words(module, suspects, lambda batch: bool(module(batch).total.isfinite()))
    return FloatingPointError(
        f"The loss is NaN or infinite. Samples: {where or 'none by itself'}. Nothing was updated with it. Look at "
        "these samples; if they are sound, lower the learning rate (model.optimizer.lr), clip gradients "
        "(trainer.gradient_clip_val=1) or use trainer.precision=bf16-mixed instead of 16-mixed."
    )


def _suspects(batch: Batch, likelihood: LogLikelihood) -> list[tuple[Batch, int]]:
    """The documents of a micro-batch that may make its loss non-finite.

    They are those with such a target. If there are none, a ``forward`` of the user's own has computed the loss from
    something else, and all with a target are.
    """
    is_sound = likelihood.log_probs.isfinite()
    if likelihood.losses is not None:
        is_sound = is_sound & likelihood.losses.isfinite()
    documents = batch.at_targets(batch.documents())
    found = documents if is_sound.all() and not likelihood.total.isfinite() else documents[~is_sound]
    return [(batch, number) for number in found.unique().tolist()]


def samples_in_words(
    module: LightningModule, suspects: Sequence[tuple[Batch, int]], is_sound: Callable[[Batch], bool]
) -> str:
    """The samples of all ranks that are to blame, for a message, or all suspects. Every rank must call this.

    Documents packed together can share a NaN (0 · NaN is NaN in attention), so each suspect is computed again by
    itself. Under strategies that shard the model every rank has to take part in each of these forward passes: a rank
    with no suspects left computes a dummy document of two tokens.

    Args:
        module: Lightning module of the fit.
        suspects: Batches of this rank, each with the number of a document in it.
        is_sound: Whether a document in a batch of its own is not to blame; it is called without gradients, and may
            raise where a loss of the user's own takes no single document.
    """
    filler = Batch.of(dict.fromkeys(("input_ids", "labels"), torch.zeros(1, 2, dtype=torch.long, device=module.device)))
    names = [
        batch.provenance[number] if batch.provenance else f"document {number} of its micro-batch"
        for batch, number in suspects
    ]
    guilty = set[str]()
    for i in range(min(_TRIED, max(gather(module.trainer, len(suspects))))):
        batch, number = suspects[i] if i < len(suspects) else (filler, 0)
        with torch.no_grad(), suppress(*OF_USERS):
            if not is_sound(batch.document(number)) and i < len(suspects):
                guilty.add(names[i])
    of_ranks = gather(module.trainer, (guilty, set(names)))
    named = sorted(set().union(*(own for own, _ in of_ranks)) or set().union(*(own for _, own in of_ranks)))
    return listed(named, _NAMED)


def check_trainer(trainer: Trainer, stage: str) -> None:
    """Refuse settings that would make the gradient of a step wrong, or would deadlock.

    Args:
        trainer: The Lightning trainer.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        InputError: With numbers that :func:`~lightning_sft.training.trainer.check_numbers` refuses, with FSDP1, with
            float16 on a CPU, with callbacks that wait for a metric that nothing logs; for answers of a sharded model,
            whose ranks would have to write equally many tokens; for validation with ZeRO-3 out of fit; for what needs
            whole rows where they are split.
    """
    shards = trainer.strategy.restore_checkpoint_after_setup  # as those do that shard the model
    is_zero3 = getattr(trainer.strategy, "zero_stage_3", False)  # with it, DeepSpeed cannot load weights to validate
    if (stage == "predict" and shards) or (stage in ("validate", "test") and is_zero3):
        raise InputError(
            f"{type(trainer.strategy).__name__} shards the model, and {stage} needs it whole. Export the checkpoint "
            f"(lightning-sft export), and {stage} with model.pretrained=FOLDER on one device or with ddp."
        )
    if type(trainer.strategy).__name__ == "FSDPStrategy":
        raise InputError(
            "trainer.strategy=fsdp is FSDP1, which cannot clip by norm, and adds gradients of ranks in half precision. "
            "Use trainer.strategy=fsdp2."
        )
    if trainer.precision == "16-true" and trainer.strategy.root_device.type == "cpu":
        raise InputError("A CPU does not train in float16. Use trainer.precision=32-true, or bf16-mixed.")
    check_numbers(trainer)
    if stage == "fit":
        warn_of_unused_inputs(trainer.lightning_module)
        check_monitors(trainer)
    needs_rows = [name for name in ("neftune_alpha", "router_loss") if getattr(trainer.lightning_module, name, None)]
    if needs_rows and context_parallel(trainer)[1] > 1:
        raise InputError(f"model.{needs_rows[0]} needs whole rows: set trainer.strategy.context_parallel_size=1.")


def check_module(callback: Callback, module: LightningModule) -> None:
    """Refuse a Lightning module that lacks the parts of ``SFTModule`` that a callback needs.

    Args:
        callback: A callback of this library.
        module: Lightning module, possibly user-defined.

    Raises:
        InputError: If it is not like an ``SFTModule``.
    """
    if not hasattr(module, "scorer"):
        raise InputError(
            f"{type(callback).__name__} looks into the model of an SFTModule, and {type(module).__name__} is none. "
            "Derive the class from SFTModule, or leave the callback out."
        )


def check_data(callback: Callback, data: LightningDataModule | None) -> None:
    """Refuse a data module that lacks the parts of ``SFTDataModule`` that a callback needs.

    Args:
        callback: A callback of this library.
        data: Data module, possibly user-defined, or ``None``.

    Raises:
        InputError: When it has no prompts.
    """
    if not hasattr(data, "prompts_of"):
        raise InputError(
            f"{type(callback).__name__} takes prompts and the tokenizer from SFTDataModule. Use it, or leave the "
            "callback out."
        )


def check_ids(module: LightningModule | None, name: str, largest: int, tokenizer: Any) -> None:
    """Refuse token ids that the model has no embeddings for.

    Args:
        module: The Lightning module, or ``None``; it may say ``num_embeddings``.
        name: Name of the split.
        largest: Largest token id in it.
        tokenizer: Name of the tokenizer.

    Raises:
        InputError: When there are some.
    """
    size = getattr(module, "num_embeddings", None)
    if size is not None and largest >= size:
        raise InputError(
            f"data.{name} has the token id {largest:,}, but the model has embeddings for {size:,}: the tokenizer "
            f"{tokenizer!r} is not its own. Leave data.tokenizer out, or take the model it goes with."
        )


def check_lengths(module: LightningModule | None, name: str, longest: int) -> None:
    """Refuse sequences that are longer than the table of positions of the model.

    Args:
        module: The Lightning module, or ``None``; it may say ``num_positions``.
        name: Name of the split.
        longest: Tokens of the longest sequence, or that one may have.

    Raises:
        InputError: When one is longer.
    """
    positions = getattr(module, "num_positions", None)
    if positions is not None and longest > positions:
        raise InputError(
            f"data.{name} has sequences of {longest:,} tokens, but the model has {positions:,} positions. Set "
            f"data.max_length={positions}, and data.overflow to what becomes of longer ones."
        )


def check_prompts(prompts: Sequence[Prompt], positions: int | None) -> None:
    """Refuse prompts that fill the position table of a model and leave no room for an answer.

    Args:
        prompts: Prompts to generate answers for.
        positions: Size of the position table; ``None`` if the model has none.

    Raises:
        InputError: When there are such prompts; the first is named.
    """
    too_long = [prompt for prompt in prompts if positions is not None and len(prompt.input_ids) >= positions]
    if too_long:
        more = f", as have {len(too_long) - 1} more prompts" if len(too_long) > 1 else ""
        raise InputError(
            f"{too_long[0].provenance}: the prompt has {len(too_long[0].input_ids):,} tokens{more}, but the model has "
            f"{positions:,} positions, and an answer needs one at least. Shorten it, or leave it out."
        )


def say_if_cached_apart(trainer: Trainer | None, name: str, built: tuple[str, ...]) -> None:
    """Say that machines do not share the cache of encoded data; every process calls it with what it has read.

    Args:
        trainer: The Lightning trainer, or ``None``.
        name: Name of the split.
        built: Names of the builds of the cache entries that this process has read.
    """
    if getattr(trainer, "world_size", 1) == 1 or not torch.distributed.is_initialized():
        return
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, built)
    if (count := len(set(found))) > 1:
        rank_zero_info(
            f"{name} was encoded {count} times, by machines that do not share the folder data.cache. Set it to one "
            "that all see to encode once."
        )


def check_precision(asked: Any, trainer: Trainer) -> None:
    """Refuse a precision other than the requested one; Lightning falls back on a CPU with only a warning.

    Args:
        asked: Precision as the user wrote it.
        trainer: Lightning trainer created with it.

    Raises:
        InputError: If float16 was requested but is not available.
    """
    if str(asked) in ("16", "16-mixed") and trainer.precision != "16-mixed":
        raise InputError(
            f"trainer.precision={asked} is not available: a CPU does not train in float16. Use 32-true, or bf16-mixed."
        )


def check_epoch(trainer: Trainer) -> None:
    """Refuse epochs that cannot be divided into whole optimizer steps or over all ranks, or that outlast a scheduler.

    Raises:
        InputError: When an epoch ends inside an optimizer step of DeepSpeed, which would carry it on into the next;
            when there are more ranks than micro-batches; when a scheduler of torch ends before the fit; or when the
            loader of a data module does not know the trainer.
    """
    check_length(trainer)
    place = getattr(trainer.train_dataloader, "place", None)  # where the data module's loaders ask for the epoch
    if trainer not in getattr(place, "args", (trainer,)):
        raise InputError(
            "The loader of SFTDataModule was made without this trainer, so each process would compute the first epoch "
            "of a single one, again and again. Pass the data module itself: trainer.fit(module, datamodule=data)."
        )
    accumulate, per_epoch = trainer.accumulate_grad_batches, trainer.num_training_batches
    if trainer.strategy.handles_gradient_accumulation and math.isfinite(per_epoch) and per_epoch % accumulate:
        raise InputError(
            f"An epoch of {per_epoch} micro-batches does not end with a step of {accumulate}, and DeepSpeed would take "
            "the rest of that step from the next epoch. Set trainer.limit_train_batches to a multiple of "
            f"trainer.accumulate_grad_batches, as {per_epoch // accumulate * accumulate or accumulate}."
        )
    plan = getattr(trainer.train_dataloader, "plan", None)  # not of a stream, nor of a loader of the user
    if plan is not None and len(plan.packs) < plan.num_ranks:
        raise InputError(
            f"data.train fills {len(plan.packs):,} micro-batches, so of {plan.num_ranks} ranks some would never have "
            "anything to do. Lower data.tokens_per_batch, or use fewer devices."
        )


@functools.cache  # one answer a process: what `init` chooses is what `fit` finds
def bfloat16_is_slow(size: int = 192) -> bool:
    """Whether this CPU multiplies bfloat16 matrices more slowly than float32 ones, by trying it.

    Without AMX or AVX-512-BF16, torch falls back to a loop that is a hundred times slower. The two are timed in turn
    and the fastest of each is taken, so that other work of the machine does not look like slow arithmetic.

    Args:
        size: Rows and columns of the matrices; a few milliseconds even in the slow loop.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, waiting for each other would be most of the time
    try:
        matrices = {dtype: torch.ones(size, size, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
        seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in matrices}
        for dtype, a in list(matrices.items()) * 8:
            begin = time.perf_counter()
            a @ a
            seconds[dtype].append(time.perf_counter() - begin)
    finally:
        torch.set_num_threads(threads)
    return min(seconds[torch.bfloat16]) > 4 * min(seconds[torch.float32])


def warn_if_bfloat16_is_slow() -> None:
    """Warn that float32 would be faster, where it would."""
    if bfloat16_is_slow():
        warnings.warn(
            "This CPU has no fast bfloat16 arithmetic, so trainer.precision=bf16-* is many times slower here than "
            "32-true. Use trainer.precision=32-true.",
            stacklevel=2,
        )


def keeps_documents_apart(module: LightningModule | None) -> bool:
    """Whether documents may be packed into a row, as ``module.isolates_documents`` says; warns where not, or unsaid.

    Args:
        module: The Lightning module, or ``None``.
    """
    if module is None:
        return True
    said = getattr(module, "isolates_documents", None)
    if said is None:
        rank_zero_warn(
            f"data.packing=packed puts several documents into a row, and {type(module).__name__} does not say whether "
            "its model keeps them apart by batch.position_ids. If it does, set isolates_documents = True on the class; "
            "if not, use data.packing=padded."
        )
        return True
    if not said:
        layer = getattr(getattr(getattr(module, "scorer", None), "findings", None), "leaks_in", None)
        where = f" in {layer}" if layer else ""
        rank_zero_warn(
            f"In this model, documents packed into one row see each other{where} (measured on it just now). Each gets "
            "a row of its own instead, as with data.packing=padded: exact, but slower."
        )
    return bool(said)
