"""Examples as columns of Arrow, in memory or mapped from a file: four bytes a token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import ipc

from lightning_sft.types import Example

_SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "run_lengths": pa.list_(pa.int32()),  # target weights as runs of equal ones: most have two, of 0 and of 1
        "run_weights": pa.list_(pa.float64()),
        "provenance": pa.string(),
        "answers_before": pa.int32(),
    }
)
_Lists = tuple[NDArray[Any], NDArray[Any]]  # where each list begins and ends, and the values of all


class Examples(Sequence[Example]):
    """A sequence of examples in Arrow record batches.

    Args:
        batches: The record batches, as :func:`to_record_batch` makes them.
        built: Name of the build of the cache entry that they are of, the same for all that read it; ``None`` for none.

    >>> rows = [Example([5, 6, 7], [0.0, 1.0, 1.0], "a.jsonl:1"), Example([8, 9], [0.0, 0.5])]
    >>> examples = Examples([to_record_batch(rows)])
    >>> examples.lengths.tolist(), examples.weights.tolist(), examples.num_targets.tolist()
    ([3, 2], [2.0, 0.5], [2, 1])
    >>> examples[1].input_ids.tolist(), examples[1].target_weights.tolist()
    ([8, 9], [0.0, 0.5])
    """

    def __init__(self, batches: Sequence[pa.RecordBatch], built: str | None = None) -> None:
        self.built = built
        self.batches = [batch for batch in batches if len(batch)]
        self._begins = np.cumsum([0, *map(len, self.batches)])
        self._lists = [[_lists(batch.column(i)) for i in range(3)] for batch in self.batches]

    def __reduce__(self) -> tuple[Any, ...]:
        return Examples, (self.batches, self.built)  # the columns are views of them

    @classmethod
    def open(cls, path: Path, built: str | None = None) -> Examples:
        """The examples of a file, mapped: pages that are not accessed stay on disk."""
        return cls(list(ipc.open_stream(pa.memory_map(str(path)))), built)

    def __len__(self) -> int:
        return int(self._begins[-1])

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        number, row = self._place(index % len(self))
        lists = self._lists[number]
        ids, run_lengths, run_weights = (values[bounds[row] : bounds[row + 1]] for bounds, values in lists)
        provenance, answers_before = (self.batches[number].column(i)[row].as_py() for i in (3, 4))
        return Example(ids, np.repeat(run_weights, run_lengths), provenance, answers_before)

    def ids(self, index: int) -> bytes:
        """The token ids of an example, to be compared with those of others."""
        number, row = self._place(index)
        bounds, values = self._lists[number][0]
        return bytes(values[bounds[row] : bounds[row + 1]])

    def _place(self, index: int) -> tuple[int, int]:
        """Number of the record batch that an example is in, and its row there."""
        number = int(np.searchsorted(self._begins, index, side="right")) - 1
        return number, index - int(self._begins[number])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example."""
        return self._each(lambda ids, lengths, weights: np.diff(ids[0]), np.int64)

    @cached_property
    def weights(self) -> NDArray[np.float64]:
        """Sum of target weights of each example."""
        return self._each(lambda ids, lengths, weights: _sums(lengths, lengths[1] * weights[1]), np.float64)

    @property
    def largest_id(self) -> int:
        """The largest token id."""
        return max(int(ids[1].max()) for ids, _, _ in self._lists)

    @cached_property
    def num_targets(self) -> NDArray[np.int64]:
        """Tokens of each example that are trained on."""
        return self._each(lambda ids, lengths, weights: _sums(lengths, lengths[1] * (weights[1] > 0)), np.int64)

    @property
    def shares_of_row(self) -> NDArray[np.float64]:
        """Share of its row that each example is: 1, or less where the row gave several, which follow each other."""
        counts = self.sequences_per_row
        return np.repeat(1 / counts, counts)

    @cached_property
    def sequences_per_row(self) -> NDArray[np.int64]:
        """How many of them each row gave."""
        names = [batch.column(3).to_numpy(zero_copy_only=False) for batch in self.batches]
        together = np.concatenate(names or [np.zeros(0, object)])
        begins = np.flatnonzero(np.append(True, together[1:] != together[:-1])) if len(self) else np.zeros(0, int)
        return np.diff(np.append(begins, len(self)))

    def _each(self, figure: Any, dtype: Any) -> NDArray[Any]:
        found = [figure(*lists) for lists in self._lists]
        return np.concatenate(found).astype(dtype) if found else np.zeros(0, dtype)


def to_record_batch(examples: Iterable[Example]) -> pa.RecordBatch:
    """Examples as one record batch."""
    examples = list(examples)
    begins = _begins(examples)
    weights = _flat((example.target_weights for example in examples), np.float64)
    run_begins = np.union1d(begins, np.flatnonzero(np.diff(weights)) + 1)
    runs_before = np.searchsorted(run_begins, begins)
    columns = [
        _list_array(begins, _flat((example.input_ids for example in examples), np.int32)),
        _list_array(runs_before, np.diff(run_begins).astype(np.int32)),
        _list_array(runs_before, weights[run_begins[:-1]]),
        _text_array([example.provenance.encode() for example in examples]),
        _array(np.array([example.answers_before for example in examples], np.int32)),
    ]
    return pa.record_batch(columns, schema=_SCHEMA)


def save(batches: Iterable[pa.RecordBatch], path: Path) -> None:
    """Write record batches to a file, one after another; ``datasets.Dataset.from_file`` reads it too."""
    with ipc.new_stream(str(path), _SCHEMA) as file:
        for batch in batches:
            file.write_batch(batch)


def _lists(column: pa.ListArray) -> _Lists:
    return column.offsets.to_numpy(), column.values.to_numpy()


def _sums(lists: _Lists, values: NDArray[Any]) -> NDArray[Any]:
    """The sum of each list's own values; no list is empty."""
    return np.add.reduceat(values[: lists[0][-1]], lists[0][:-1])


def _begins(lists: Iterable[Sized]) -> NDArray[np.int64]:
    """Where each list would begin, were they laid end to end; and where the last ends."""
    return np.cumsum([0, *map(len, lists)], dtype=np.int64)


def _flat(lists: Iterable[Sequence[Any] | NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *(np.asarray(own, dtype) for own in lists)])


def _array(values: NDArray[Any]) -> pa.Array:
    """As an array of Arrow; `pa.array` would import pandas: a third of a second in each process that encodes."""
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def _list_array(begins: NDArray[Any], values: NDArray[Any]) -> pa.ListArray:
    return pa.ListArray.from_arrays(_array(begins.astype(np.int32)), _array(values))


def _text_array(texts: Sequence[bytes]) -> pa.StringArray:
    offsets = pa.py_buffer(_begins(texts).astype(np.int32))
    return pa.StringArray.from_buffers(len(texts), offsets, pa.py_buffer(b"".join(texts)))
