"""The kind of mask an architecture requests from transformers, determined once and without waiting for a device.

transformers describes a mask by a function of the indices of a query and a key. Most of these depend on nothing else,
so their values for one document hold for all, and they can be evaluated on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from transformers import masking_utils

from lightning_sft.model.attention.documents import Documents, lengths_from
from lightning_sft.model.parallel.context import Context
from lightning_sft.types import InputError

_is_plain: dict[Any, bool] = {}  # by kind of mask function, window, and length up to which it was evaluated


class Rows:
    """The documents of a batch, while a backbone runs on it.

    Args:
        positions: Position of each token in its document, ``[B, N]``.
        spans: Lengths of all documents in row-major order; empty if the host does not know them.
        context: Ranks that share the rows; the backbone then runs on this rank's part of them.
        lengths: Tokens of each document without its padding; by default all of its span.

    Attributes:
        here: Positions of the tokens that the backbone runs on, ``[B, N]``, or of this rank's ``[B, N / C]``.

    Raises:
        InputError: When the lengths do not fill whole rows.
    """

    def __init__(
        self,
        positions: Tensor,
        spans: tuple[int, ...] = (),
        context: Context | None = None,
        lengths: tuple[int, ...] = (),
    ) -> None:
        self.context, self._lengths = context, lengths
        self._of_lengths = spans  # before padding for the context
        if context is not None:
            positions, spans = context.padded(positions, spans)
        self.positions, self._given = positions, spans
        self.here = positions if context is None else context.part(positions)
        self._made: dict[tuple[Any, ...], Documents] = {}
        num_rows, length = positions.shape
        if spans and not (sum(spans) == num_rows * length and set(accumulate(spans)) >= set(_ends(num_rows, length))):
            raise InputError(
                f"Documents of {list(spans)} tokens do not fill {num_rows} rows of {length}. Set Batch.spans to "
                "the lengths of all documents row by row, padding included, or leave it out."
            )

    @cached_property
    def spans(self) -> list[int]:
        """Lengths of all documents; if they were not given, this waits for the device."""
        return list(self._given) or lengths_from(
            (self.positions.diff(dim=1, prepend=self._before) != 1).flatten().cpu()
        )

    def lengths(self) -> Tensor:
        """Length of the document of each token that the backbone runs on, ``[B, N]``, on the CPU."""
        spans = list(self._of_lengths) or self.spans
        own = self._lengths if len(self._lengths) == len(spans) else spans
        pair = (torch.tensor(values, device="cpu") for values in (own, spans))
        of_tokens = torch.repeat_interleave(*pair).view(len(self.positions), -1)
        return of_tokens if self.context is None else self.context.part(of_tokens)

    @property
    def are_documents(self) -> bool:
        """Whether each row is one document."""
        num_rows, length = self.positions.shape
        return self.spans == [length] * num_rows

    @cached_property
    def numbers(self) -> Tensor | None:
        """Index of each token's document in its row, ``[B, N]``, or ``None`` if each row is one document."""
        return None if self.are_documents else self.counted()

    def counted(self) -> Tensor:
        """Index of each token's document in its row, ``[B, N]``, counted on the device from 1."""
        return (self.positions.diff(dim=1, prepend=self.positions[:, :1] - 1) != 1).cumsum(1)

    @property
    def _before(self) -> Tensor:
        # not the predecessor of the first position, so that each row begins a document
        return self.positions[:, :1] + 1

    def documents(self, sees: Callable[..., Tensor], window: int | None, dtype: torch.dtype | None) -> Documents | None:
        """The documents that a mask function describes, or ``None`` if it is not causal attention within documents.

        Args:
            sees: Mask function of transformers, of row, head, query and key indices.
            window: Sliding window of the mask function, in tokens.
            dtype: Dtype of additive masks, or ``None`` for boolean masks.
        """
        within = self._within(sees)
        if within is None or not is_plain(within, window, self.positions.shape[1]):
            found = None
            if self.context is None:
                found = Documents.found(sees, self.positions, window, dtype)
            elif within is not None:  # the function has the positions of this rank's tokens only
                found = Documents.found(self._of_all(within), self.positions, window, dtype)
        elif (window, dtype) in self._made:
            return self._made[window, dtype]
        else:
            found = self._made[window, dtype] = Documents(self.spans, window, self.positions.device, dtype)
        if found is not None:
            found.context = self.context
        return found

    def _within(self, sees: Callable[..., Tensor]) -> Callable[..., Tensor] | None:
        """What a mask function says within a document, where it is put together as transformers does for packs."""
        if self.numbers is None or sees.__code__ is not _AND:
            return sees
        inner, *others = _free(sees)["mask_functions"]
        if len(others) != 1 or others[0].__code__ is not _PACKED or inner.__code__ is not _REMAPPED:
            return sees
        same = _free(others[0])["packed_sequence_mask"] is self.numbers
        function: Callable[..., Tensor] = _free(inner)["mask_function"]
        return function if same else None

    def _of_all(self, within: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A mask function of all tokens of the rows, from what it says within a document."""
        if self.numbers is None:
            return within
        remapped = masking_utils.remap_positions_for_packed_sequence(within, self.positions)
        apart = masking_utils.packed_sequence_mask_function(self.numbers)
        function: Callable[..., Tensor] = masking_utils.and_masks(remapped, apart)
        return function


def _ends(num_rows: int, length: int) -> range:
    """Ends of the rows, in row-major order."""
    return range(length, num_rows * length + 1, length)


_rows: ContextVar[Rows | None] = ContextVar("rows", default=None)


def current() -> Rows | None:
    """The rows that a backbone is running on, or ``None`` outside of :func:`rows_of_documents`."""
    return _rows.get()


@contextmanager
def rows_of_documents(
    position_ids: Tensor | None,
    spans: tuple[int, ...] = (),
    context: Context | None = None,
    lengths: tuple[int, ...] = (),
) -> Iterator[Rows | None]:
    """Inside this context, rows hold documents whose positions restart at 0; outside, attention is stock attention.

    Generation, caches and padding masks are therefore never affected. transformers searches for packed documents
    itself, which waits for the device each time; here it receives the known answer.

    Args:
        position_ids: Position of each token in its document, ``[B, N]``.
        spans: Lengths of all documents in row-major order, padding included; empty if the host does not know them.
        context: Ranks that share the rows; the backbone is to run on the positions that the context's result has here.
        lengths: Tokens of each document without its padding; empty if the host does not know them.
    """
    rows = None if position_ids is None else Rows(position_ids, spans, context, lengths)
    find: Any = getattr(masking_utils, "find_packed_sequence_indices", None)

    def told(position_ids: Tensor) -> Tensor | None:
        numbers: Tensor | None = rows.numbers if rows and position_ids is rows.here else find(position_ids)
        return numbers

    token = _rows.set(rows)
    try:
        if find is not None:
            masking_utils.find_packed_sequence_indices = told
        yield rows
    finally:
        if find is not None:
            masking_utils.find_packed_sequence_indices = find
        _rows.reset(token)


def is_plain(sees: Callable[..., Tensor], window: int | None, length: int) -> bool:
    """Whether a mask function is causal attention with this window, for all indices up to a length.

    ``False`` also if it may depend on anything but the indices, such as a tensor.
    """
    kind, length = _kind(sees), 1 << (length - 1).bit_length()
    if kind is None:
        return False
    key = kind, window, length
    if key not in _is_plain:
        with _disable_current_modes():  # evaluate it even if the model runs on fake tensors
            found = Documents.found(sees, torch.arange(length, device="cpu")[None], window, None)
        _is_plain[key] = found is not None and found.lengths == [length]
    return _is_plain[key]


def _kind(thing: Any) -> Any:
    """Identity of a mask function: its code and the numbers it captures; ``None`` if it captures anything else."""
    if thing is None or isinstance(thing, bool | int | float | str):
        return type(thing), thing
    if isinstance(thing, tuple):
        parts = tuple(map(_kind, thing))
        return None if None in parts else parts
    if not hasattr(thing, "__code__"):
        return None
    parts = tuple(_kind(value) for value in (thing.__defaults__, *_free(thing).values()))
    return None if None in parts else (thing.__code__, parts)


def _free(function: Any) -> dict[str, Any]:
    """The variables that a function captures from its enclosing scope."""
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


_AND = masking_utils.and_masks().__code__
_PACKED = masking_utils.packed_sequence_mask_function(torch.empty(0, device="cpu")).__code__
_REMAPPED = masking_utils.remap_positions_for_packed_sequence(
    masking_utils.causal_mask_function, torch.empty(0, device="cpu")
).__code__
