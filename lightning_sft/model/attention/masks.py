"""What kind of mask an architecture asks transformers for, learnt once and without waiting for a device.

transformers describes a mask by a function of the indices of a query and a key. Most of these depend on nothing else,
so what they say about one document they say about all, and they can be asked on the CPU.
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
from lightning_sft.types import InputError

_is_plain: dict[Any, bool] = {}  # by what a mask function is, its window, and how far it was asked


class Rows:
    """The documents of a batch, for as long as a backbone runs on it.

    Args:
        positions: Position of each token in its document, ``[B, N]``.
        spans: Lengths of all documents in row-major order, as the host knows them; empty where it does not.

    Raises:
        InputError: When the lengths are not those of whole rows.
    """

    def __init__(self, positions: Tensor, spans: tuple[int, ...] = ()) -> None:
        self.positions, self._given = positions, spans
        self._made: dict[tuple[Any, ...], Documents] = {}
        num_rows, length = positions.shape
        if spans and not (sum(spans) == num_rows * length and set(accumulate(spans)) >= set(_ends(num_rows, length))):
            raise InputError(
                f"Documents of {list(spans)} tokens do not fill {num_rows} rows of {length}. Give Batch.spans the "
                "lengths of all documents row by row, padding included, or leave it out."
            )

    @cached_property
    def spans(self) -> list[int]:
        """Lengths of all documents; where nobody has counted them, the device is waited for."""
        return list(self._given) or lengths_from(
            (self.positions.diff(dim=1, prepend=self._before) != 1).flatten().cpu()
        )

    @property
    def are_documents(self) -> bool:
        """Whether each row is one document."""
        num_rows, length = self.positions.shape
        return self.spans == [length] * num_rows

    @cached_property
    def numbers(self) -> Tensor | None:
        """Number of each token's document in its row, ``[B, N]``, or ``None`` where each row is one document."""
        return None if self.are_documents else self.counted()

    def counted(self) -> Tensor:
        """Number of each token's document in its row, ``[B, N]``, counted on the device."""
        return (self.positions.diff(dim=1, prepend=self.positions[:, :1] - 1) != 1).cumsum(1)

    @property
    def _before(self) -> Tensor:
        return self.positions[:, :1] + 1  # a position that none comes after, so that each row begins a document

    def documents(self, sees: Callable[..., Tensor], window: int | None, dtype: torch.dtype | None) -> Documents | None:
        """The documents in which tokens see what is before them, or ``None`` where that is not what a mask says.

        Args:
            sees: A mask function of transformers.
            window: That of the mask function.
            dtype: See :class:`~lightning_sft.model.attention.documents.Documents`.
        """
        within = self._within(sees)
        if within is None or not is_plain(within, window, self.positions.shape[1]):
            return Documents.found(sees, self.positions, window, dtype)
        if (window, dtype) not in self._made:
            self._made[window, dtype] = Documents(self.spans, window, self.positions.device, dtype)
        return self._made[window, dtype]

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


def _ends(num_rows: int, length: int) -> range:
    """Where each row ends, in row-major order."""
    return range(length, num_rows * length + 1, length)


_rows: ContextVar[Rows | None] = ContextVar("rows", default=None)


def current() -> Rows | None:
    """The rows that a backbone runs on, or ``None`` outside of :func:`rows_of_documents`."""
    return _rows.get()


@contextmanager
def rows_of_documents(position_ids: Tensor | None, spans: tuple[int, ...] = ()) -> Iterator[None]:
    """While it lasts, a model's rows are documents whose positions begin anew; elsewhere attention is stock attention.

    Generation, caches and padding masks are so never touched. transformers looks for packed documents by itself, and
    waits for the device each time; it is told instead.

    Args:
        position_ids: Position of each token in its document, ``[B, N]``.
        spans: Lengths of all documents in row-major order, padding included, where the host knows them.
    """
    rows = None if position_ids is None else Rows(position_ids, spans)
    find: Any = getattr(masking_utils, "find_packed_sequence_indices", None)

    def told(position_ids: Tensor) -> Tensor | None:
        numbers: Tensor | None = rows.numbers if rows and position_ids is rows.positions else find(position_ids)
        return numbers

    token = _rows.set(rows)
    try:
        if find is not None:
            masking_utils.find_packed_sequence_indices = told
        yield
    finally:
        if find is not None:
            masking_utils.find_packed_sequence_indices = find
        _rows.reset(token)


def is_plain(sees: Callable[..., Tensor], window: int | None, length: int) -> bool:
    """Whether a mask function means causal attention with this window, for any indices up to a length.

    ``False`` also where it may depend on something else than the indices, as on a tensor.
    """
    kind, length = _kind(sees), 1 << (length - 1).bit_length()
    if kind is None:
        return False
    key = kind, window, length
    if key not in _is_plain:
        with _disable_current_modes():  # it is asked for real, also where a model runs on shapes alone
            found = Documents.found(sees, torch.arange(length, device="cpu")[None], window, None)
        _is_plain[key] = found is not None and found.lengths == [length]
    return _is_plain[key]


def _kind(thing: Any) -> Any:
    """What a mask function is: its code and the numbers in it. ``None`` where it knows something else."""
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
    """The variables of the surrounding function that a function uses."""
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


_AND = masking_utils.and_masks().__code__
_PACKED = masking_utils.packed_sequence_mask_function(torch.empty(0, device="cpu")).__code__
_REMAPPED = masking_utils.remap_positions_for_packed_sequence(
    masking_utils.causal_mask_function, torch.empty(0, device="cpu")
).__code__
