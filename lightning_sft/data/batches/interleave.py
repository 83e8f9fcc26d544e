"""The rows of streams in chunks, one data set's after another's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from lightning_sft.data.rows.mixture import Mixture, Part
from lightning_sft.data.rows.sources import leaves, shards
from lightning_sft.data.tokens.encode_rows import Lane, Rows, in_chunks

Pass = Callable[[int], Iterator[Rows]]
"""Function that returns the chunks of a data set for a pass, given the number of passes done in this epoch."""


_LANES = 8  # of a rank, at most: each of 1, 2, 4 or 8 workers has its own


def num_lanes(mixture: Mixture, num_ranks: int) -> int:
    """Lanes of a stream: several where it is one data set in shards that the ranks can share evenly.

    A mixture has one, since which part a chunk is of depends on how many rows those before it had. So has a data set of
    which only the first rows are used.

    Args:
        mixture: The data sets.
        num_ranks: Data-parallel size.

    Raises:
        InputError: When a data set is missing.
    """
    [part, *others] = mixture.of_name.values()
    count = 0 if others or part.first else len(shards(part.source))
    if not count or count % num_ranks:
        return 1
    return num_ranks * next(lanes for lanes in (_LANES, 4, 2, 1) if lanes * num_ranks <= count)


def lanes(mixture: Mixture, size: int, seed: int, epoch: int, count: int) -> list[Lane]:
    """All rows of an epoch in so many lanes, which share the shards of the data set; one lane is a :func:`stream`."""
    if count == 1:
        return [stream(mixture, size, seed, epoch)]
    [part] = mixture.of_name.values()
    found = shards(part.source)
    order = _order(len(found), (seed, epoch, 0, 0))
    return [((0, rows) for rows in in_chunks([found[i] for i in order[lane::count]], size)) for lane in range(count)]


def stream(mixture: Mixture, size: int, seed: int, epoch: int) -> Lane:
    """All rows of an epoch in chunks, each with the number of its data set.

    The files of a data set are shuffled in each epoch; within a file rows stay as they are.

    Args:
        mixture: The data sets.
        size: Rows of a chunk.
        seed: Seed of the order of files.
        epoch: Number of the epoch.

    Raises:
        InputError: When a source is missing.
    """
    parts = mixture.of_name.values()
    passes = [partial(_chunks, part, size, (seed, epoch, number)) for number, part in enumerate(parts)]
    yield from interleave(passes, [part.share for part in parts])


def interleave(passes: Sequence[Pass], shares: Sequence[float | None]) -> Iterator[tuple[int, Rows]]:
    """Chunks of several data sets, always of the one that is furthest behind its share of the rows so far.

    Without shares all have the same share, and a data set that has ended drops out: every row comes once. With shares
    it starts again until each has ended at least once; then those that are behind catch up, to the row.

    Args:
        passes: Function for the passes over each data set.
        shares: Share of each data set; given for all or none.

    >>> a, b = (lambda number: iter([["a"]] * 3)), (lambda number: iter([["b"]]))
    >>> "".join(rows[0] for _, rows in interleave([a, b], [None, None]))
    'abaa'
    >>> "".join(rows[0] for _, rows in interleave([a, b], [1.0, 2.0]))
    'abbabbabb'
    >>> once = [lambda number: iter([["a"] * 4]), lambda number: iter([["b"] * 3])]
    >>> "".join("".join(rows) for _, rows in interleave(once, [1.0, 1.0]))
    'aaaabbbb'
    """
    repeats, size = None not in shares, [share or 1.0 for share in shares]
    taken, rounds, goal = [0.0] * len(passes), [0] * len(passes), math.inf
    chunks = [begin(0) for begin in passes]
    coming = [next(own, None) for own in chunks]  # the next chunk of each, so that an end is seen when it is reached
    left = [number for number, rows in enumerate(coming) if rows]
    while left:
        number = min(left, key=lambda i: (taken[i], i))
        if coming[number] is None:
            chunks[number] = passes[number](rounds[number])
            coming[number] = next(chunks[number], None)
        rows = coming[number] or []
        if goal < math.inf:
            rows = rows[: round((goal - taken[number]) * size[number])]
        if not rows:
            left.remove(number)
            continue
        yield number, rows
        taken[number] += len(rows) / size[number]
        coming[number] = next(chunks[number], None)
        if coming[number] is None:
            rounds[number] += 1
            if not repeats:
                left.remove(number)
            elif all(rounds[other] for other in left):
                goal = min(goal, max(taken))


def _chunks(part: Part, size: int, seeds: Sequence[int], number: int) -> Iterator[Rows]:
    files = leaves(part.source, streaming=True)
    order = (
        list(range(len(files))) if part.first else _order(len(files), (*seeds, number))
    )  # the first are always the same
    yield from in_chunks((files[i] for i in order), size, part.first)


def _order(count: int, seeds: Sequence[int]) -> list[int]:
    order: list[int] = np.random.default_rng(seeds).permutation(count).tolist()
    return order
