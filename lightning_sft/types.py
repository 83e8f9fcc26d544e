"""The data types that are passed between the stages of the library.

Shape legend, used in every file: B rows, N tokens in a row, T target tokens, D documents, H hidden, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_sft.machine.host_copy import without_waiting
from lightning_sft.machine.terminal import printable

IGNORE = -100
"""Label of a position that has no target, as in ``torch.nn.functional.cross_entropy``."""

Normalize = Literal["token", "sequence", "sqrt", "dataset"]
"""Normalization of the loss of an optimizer step, see :mod:`lightning_sft.objective`."""

Message = dict[str, Any]
"""One turn of a conversation, ``{"role": ..., "content": ...}``, as chat templates take it."""


class InputError(ValueError):
    """Invalid user input. The message states the given value, the expected one, and how to fix it.

    Args:
        message: Text of the error; control characters quoted from data and file names are escaped.
    """

    def __init__(self, message: object) -> None:
        super().__init__(printable(str(message)))


@dataclass(frozen=True)
class Conversation:
    """One row of a data set as chat messages.

    Args:
        messages: The turns in order.
        tools: Tool descriptions handed to the chat template, or ``None``.
        weights: Weight of each message's tokens as targets; 0 makes the message context.
        provenance: Location of the row, ``file:line``.
        template_kwargs: Variables for the chat template, over those of the run: ``{"enable_thinking": False}``.
    """

    messages: Sequence[Message]
    tools: Sequence[Any] | None = None
    weights: Sequence[float] = ()
    provenance: str = "?"
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """One training sequence: the tokens, and how much each counts as a target.

    Args:
        input_ids: Token ids, length N.
        target_weights: Weight of each token as a target, length N; 0 for context. Token 0 is never a target.
        provenance: Location of the row, ``file:line``.
        answers_before: Number of trained answers of the same conversation in earlier sequences.
    """

    input_ids: Sequence[int] | NDArray[np.int32]
    target_weights: Sequence[float] | NDArray[np.float64]
    provenance: str = "?"
    answers_before: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Prompt:
    """A prompt for generation, with the reference answer from the data set.

    Args:
        input_ids: Token ids of ``apply_chat_template(messages, add_generation_prompt=True)``.
        reference: Reference answer from the data set, or ``None`` where the row ends with the user's turn.
        provenance: Location of the row, ``file:line``.
        number: Index of the row in its source, from 0; part of the seed for sampling its answer.
    """

    input_ids: Sequence[int]
    reference: str | None = None
    provenance: str = "?"
    number: int = 0


_LIST = (
    "If train_dataloader or val_dataloader returns a list: Lightning takes it for several loaders, whose batches come "
    "together. Return one loader, as torch.utils.data.DataLoader(batches, batch_size=None)."
)


class Batch:
    """One micro-batch, ready for the model: labels are shifted once, here, and nowhere else.

    Deliberately not a dataclass: Lightning's true-precision plugins walk into dataclasses, dictionaries and tuples and
    would round ``target_weights`` to bfloat16.

    Args:
        input_ids: Token ids ``[B, N]``.
        labels: The token that follows each position, or ``IGNORE``, ``[B, N]``.
        position_ids: Position within its document, ``[B, N]``; a new document starts where it is 0.
        target_weights: Weight of each label, ``[B, N]``, float; 0 where there is no target.
        normalizer: Z of the whole optimizer step that this micro-batch belongs to, over all its micro-batches and all
            ranks. ``None`` if steps are not planned ahead: the module then normalizes after the fact.
        provenance: ``file:line`` of each document, in order; ``padding`` for one that only fills a pack up.
        parts: Number of the data set that each document comes from, where they are a mixture.
        part_names: The names of all data sets of the mixture.
        lengths: Tokens of each document, 0 for one of padding; empty where nobody has counted them.
        answers_before: Number of trained answers of each document's conversation that stand in earlier sequences.
        spans: Positions of each document in order, padding included: they add up to B · N. Empty where nobody has
            counted them. It is known on the host, so that attention need not ask the device where documents begin.
        targets: Flat index ``[T]`` of each position that has a label. By default, it is looked up when first asked for,
            and that waits for the device.
        step_weight: Planned sum of the target weights of the step, which is held against what it is made of. By default
            it is the normalizer.
    """

    tensors = ("input_ids", "labels", "position_ids", "target_weights")

    def __init__(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        target_weights: Tensor,
        normalizer: float | None = None,
        provenance: Sequence[str] = (),
        parts: Sequence[int] = (),
        part_names: Sequence[str] = (),
        lengths: Sequence[int] = (),
        answers_before: Sequence[int] = (),
        spans: Sequence[int] = (),
        targets: Tensor | None = None,
        step_weight: float | None = None,
    ) -> None:
        self.input_ids = input_ids
        self.labels = labels
        self.position_ids = position_ids
        self.target_weights = target_weights
        self.normalizer = normalizer
        self.step_weight = normalizer if step_weight is None else step_weight
        self.provenance = tuple(provenance)
        self.parts, self.part_names = tuple(parts), tuple(part_names)
        self.lengths, self.answers_before, self.spans = tuple(lengths), tuple(answers_before), tuple(spans)
        self._targets, self._targets_of = targets, (labels, _version(labels))

    @classmethod
    def of(cls, batch: Batch | Mapping[str, Any]) -> Batch:
        """A batch as it is, or one made from the ``input_ids`` and ``labels`` of a plain Hugging Face collator.

        Hugging Face labels stand at their own position (``labels[i]`` is ``input_ids[i]`` or -100); they are shifted.
        Rows are taken to be padded on the right, unless ``position_ids`` says otherwise.

        Raises:
            InputError: If a key is missing, the mask is not one of right padding or leaves out tokens with a label, a
                value is not a tensor of integers ``[B, N]`` in its range, or another key asks for what only a Batch can
                say.

        >>> batch = Batch.of({"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[-100, 6, 7]])})
        >>> batch.labels.tolist(), batch.target_weights.tolist()
        ([[6, 7, -100]], [[1.0, 1.0, 0.0]])
        """
        if isinstance(batch, Batch):
            return batch
        if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= batch.keys():
            given = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            hint = f" {_LIST}" if isinstance(batch, (list, tuple)) else ""
            raise InputError(f"A batch must be a Batch or have 'input_ids' and 'labels', got {given}.{hint}")
        ids, own_labels = batch["input_ids"], batch["labels"]
        mask, positions = batch.get("attention_mask"), batch.get("position_ids")
        of_rows: Sequence[int] = () if mask is None else _check_mask(mask, own_labels)
        _check_values(batch)
        lengths = of_rows if positions is None else ()
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        labels = torch.full_like(ids, IGNORE)
        labels[:, :-1] = own_labels[:, 1:]
        labels[:, :-1][positions[:, 1:] == 0] = IGNORE  # a document's first token is never a target
        return cls(ids, labels, positions, (labels != IGNORE).to(widest(ids.device)), lengths=lengths)

    def keys(self) -> NoReturn:
        """Refuse ``model(**batch)``, whose loss would be a mean over labels that are shifted a second time.

        Raises:
            InputError: Always.
        """
        raise InputError(
            "A Batch is no dictionary for a model of transformers, which would shift its labels a second time and take "
            "the mean of a micro-batch. Pass input_ids=batch.input_ids and position_ids=batch.position_ids, without "
            "labels, and compute the loss from the logits, as docs/howto/drop_in.md does under Our data, your module."
        )

    def __getitem__(self, name: Any) -> NoReturn:
        if isinstance(name, int):  # of whoever iterates over it
            raise InputError(f"A Batch is no list; its tensors have a row for each, as batch.input_ids. {_LIST}")
        raise InputError(f"The fields of a Batch are attributes: batch.{name} instead of batch[{name!r}].")

    @property
    def targets(self) -> Tensor:
        """Flat index of each position that has a label, ``[T]``, in order; recomputed when the labels change."""
        found = self._known_targets
        if found is None:
            found = (self.labels != IGNORE).flatten().nonzero().squeeze(1)
            self._targets, self._targets_of = found, (self.labels, _version(self.labels))
        return found

    @property
    def _known_targets(self) -> Tensor | None:
        labels, version = self._targets_of
        return self._targets if labels is self.labels and version == _version(labels) else None

    def at_targets(self, values: Tensor) -> Tensor:
        """Select the entries of ``values`` ``[B, N]`` at target positions, ``[T]``."""
        return values.flatten().index_select(0, self.targets)

    def target_parts(self) -> Tensor:
        """Number of the data set that each target comes from, ``[T]``; 0 where there is no mixture."""
        documents = self.at_targets(self.documents())
        return self.of_documents(self.parts).index_select(0, documents) if self.parts else documents * 0

    def of_documents(self, numbers: Sequence[int]) -> Tensor:
        """A number for each document, ``[D]``, on the batch's device; the copy does not wait for the device."""
        return without_waiting(torch.tensor(numbers, device="cpu"), self.input_ids.device)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_targets": self._known_targets, "_targets_of": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _targets_of=(state["labels"], _version(state["labels"])))

    @property
    def _others(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in self.tensors and name[0] != "_"}

    def _map(self, change: Any) -> Batch:
        tensors = {name: change(getattr(self, name)) for name in self.tensors}
        targets = self._known_targets
        return Batch(**tensors, **self._others, targets=None if targets is None else change(targets))

    def to(self, device: Any, non_blocking: bool | None = None) -> Batch:
        """The same batch on another device; Lightning calls it.

        Args:
            device: Target device.
            non_blocking: Whether the host does not wait for the copy; by default only for page-locked memory.
        """

        def moved(tensor: Tensor) -> Tensor:
            own = tensor.to(widest(device)) if tensor.dtype == torch.float64 else tensor
            return own.to(device, non_blocking=own.is_pinned() if non_blocking is None else non_blocking)

        return self._map(moved)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; the data loader calls it."""
        return self._map(lambda tensor: tensor.pin_memory())

    def documents(self) -> Tensor:
        """The number of the document that each position belongs to, ``[B, N]``, counted over the whole batch."""
        return ((self.position_ids == 0).flatten().cumsum(0) - 1).view_as(self.position_ids)

    def document(self, number: int) -> Batch:
        """One document of the batch, as a separate batch ``[1, N]``."""
        here = self.documents() == number
        tensors = {name: getattr(self, name)[here][None] for name in self.tensors}
        of_documents = ("provenance", "parts", "lengths", "answers_before", "spans")
        return Batch(**tensors, **self._others | {n: getattr(self, n)[number : number + 1] for n in of_documents})

    @property
    def is_packed(self) -> bool:
        """Whether a row holds more than one document."""
        return bool((self.position_ids[:, 1:] == 0).any())


_OF_BATCH = ("target_weights", "normalizer")  # fields of a Batch that plain batches have no keys for
_MASKS = ("loss_mask", "loss_weights", "weights", "completion_mask", "assistant_masks")  # of other libraries


def _check_values(batch: Mapping[str, Any]) -> None:
    """Refuse values of a plain batch that would end in an error of an index, and keys that would be passed over.

    Raises:
        InputError: With what is expected.
    """
    names = ("input_ids", "labels", "position_ids", "attention_mask")
    values = {name: batch[name] for name in names if batch.get(name) is not None}
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in values.items()}
    dtypes = {name: getattr(value, "dtype", type(value).__name__) for name, value in values.items()}
    shape = shapes["input_ids"]
    are_integers = all(dtypes[name] in (torch.int32, torch.int64) for name in values if name != "attention_mask")
    if not are_integers or len(shape) != 2 or 0 in shape or set(shapes.values()) != {shape}:
        given = ", ".join(f"{name} {list(shapes[name])} of {dtypes[name]}" for name in values)
        raise InputError(
            f"Expected tensors of integers of the same shape [B, N], as torch.long; got {given}. labels[i] is "
            f"input_ids[i], or {IGNORE} where it is no target."
        )
    if name := next((name for name in (*_OF_BATCH, "inputs_embeds") if name in batch), None):
        instead = "Leave it out" if name == "inputs_embeds" else "Give a lightning_sft.types.Batch, which has it"
        raise InputError(f"A batch with 'input_ids' and 'labels' cannot have {name!r} as well. {instead}.")
    if masks := [name for name in _MASKS if name in batch]:
        warnings.warn(
            f"{masks[0]!r} of the batches has no effect: a label of {IGNORE} is no target, and weights are the "
            "target_weights of a lightning_sft.types.Batch.",
            stacklevel=2,
        )
    positions = values.get("position_ids")
    if positions is not None and positions[:, 0].any():
        raise InputError("position_ids begin with 0 in each row, and again where another document begins.")


def _check_mask(mask: Tensor, labels: Any) -> Sequence[int]:
    """The tokens of each row of a plain batch that its mask keeps; the host waits once, whatever there is to see.

    Raises:
        InputError: When rows are not padded on the right, or padding has labels.
    """
    lengths: list[int] = []
    gaps = labelled = 0
    if mask.ndim == 2:
        padding = (mask == 0) & (labels != IGNORE) if getattr(labels, "shape", None) == mask.shape else mask[:0]
        counts = (mask[:, 1:] > mask[:, :-1]).sum(), padding.sum()
        gaps, labelled, *lengths = torch.cat([torch.stack(counts), mask.sum(1)]).long().tolist()
    if mask.ndim != 2 or gaps:
        raise InputError(
            "An attention_mask [B, N] can only say that rows are padded on the right. Set "
            "tokenizer.padding_side = 'right'; for packed documents, give position_ids and no mask."
        )
    if labelled:
        raise InputError(
            f"{labelled:,} labels of a batch stand where attention_mask is 0, so padding would be trained. Set them to "
            f"{IGNORE}: labels[attention_mask == 0] = {IGNORE}."
        )
    return lengths


def widest(device: torch.device | str) -> torch.dtype:
    """The widest floating-point dtype of a device: float64, but float32 on Apple's MPS."""
    return torch.float32 if torch.device(device).type in _WITHOUT_FLOAT64 else torch.float64


_WITHOUT_FLOAT64 = {"mps"}


def _version(tensor: Tensor) -> int:
    """How often a tensor has been changed in place; torch does not count in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


@dataclass(frozen=True)
class LogLikelihood:
    """The weighted log-likelihood of the targets of one batch; unpacks as ``total, weight``.

    Args:
        total: Sum over targets of w_t · log Pr(t | its context), a scalar with a gradient.
        weight: Sum of w_t, a scalar.
        log_probs: log Pr of each target in order, ``[T]``, without a gradient.
        correct: Whether each target is the most likely token, ``[T]``.
        entropy: −Σ_v Pr(v) · log Pr(v) over the vocabulary where each target stands, in nats, ``[T]``.
        router_loss: Auxiliary loss of the routers, a scalar with a gradient, or ``None``; see
            :mod:`lightning_sft.model.experts`.
        expert_load: Number of tokens of each expert of each layer, ``[layers · experts]``, or ``None``.
        losses: What is minimized at each target in place of −log Pr, ``[T]``, without a gradient; ``None`` without a
            loss of the user's own.
    """

    total: Tensor
    weight: Tensor
    log_probs: Tensor = field(repr=False)
    correct: Tensor = field(repr=False)
    entropy: Tensor = field(repr=False)
    router_loss: Tensor | None = field(default=None, repr=False)
    expert_load: Tensor | None = field(default=None, repr=False)
    losses: Tensor | None = field(default=None, repr=False)

    def detached(self) -> LogLikelihood:
        """The same values without gradients, whose graph is thus freed."""
        router_loss = None if self.router_loss is None else self.router_loss.detach()
        return replace(self, total=self.total.detach(), router_loss=router_loss)

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.total, self.weight))
