"""Data that nobody holds as a whole: read, encoded and packed block by block while the model is trained.

A block is some thousand rows of each rank, which it shuffles and packs among themselves. The ranks then tell each other
the weights of their packs: so each knows Z of every step beforehand, as with a plan, they take equally many
micro-batches, and end together. What a block holds depends on the seed, the epoch and the number of ranks alone, so a
run that was killed begins again at its block, without the rows before it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from lightning_sft.data.account import Account
from lightning_sft.data.chunks import Chunk, Chunks, Recipe
from lightning_sft.data.collate import collate
from lightning_sft.data.examples import Examples
from lightning_sft.data.interleave import stream
from lightning_sft.data.mixture import Mixture
from lightning_sft.data.packing import group, pack
from lightning_sft.types import Batch, InputError, Normalize

_ROWS_AT_A_TIME = 256  # of a chunk
_LISTED = 1000  # rows of a kind that are remembered


@dataclass(frozen=True)
class Shape:
    """What decides which rows a micro-batch holds. A run goes on only with the shape that it began with.

    Args:
        num_ranks: Data-parallel size.
        accumulate: Micro-batches of a rank in one optimiser step.
        capacity: Most positions in a micro-batch; longer sequences have one of their own.
        packing: ``packed`` or ``padded``.
        buffer_rows: Rows of a rank that are shuffled and packed among themselves.
        seed: Seed of the order.
    """

    num_ranks: int
    accumulate: int
    capacity: int
    packing: str
    buffer_rows: int
    seed: int


@dataclass(frozen=True)
class Share:
    """What one rank tells the others of its part of a block.

    Args:
        weights: Sum of target weights of each of its packs.
        account: What became of its rows.
        is_over: Whether its rows have ended.
        error: Why it cannot go on.
    """

    weights: Sequence[float]
    account: Account
    is_over: bool
    error: str | None = None


class StreamLoader:
    """The micro-batches of one rank of a stream, epoch after epoch. Its length is not known.

    Args:
        mixture: The data sets.
        recipe: How rows become examples.
        shape: What decides which rows a micro-batch holds.
        rank: Data-parallel rank.
        gather: The values of all ranks, in order of the ranks, from that of each.
        limit: Micro-batches of a rank that an epoch will use. The Z of a step that it cuts is that of what is left.
        is_strict: Whether a row that cannot be used is an error.
        pad_id: Token id of padding.
        num_workers: Worker processes that encode ahead; 0 encodes in the training process.
        place: Gives the epoch, and how many micro-batches of it are done.
        finished: Is told what became of the rows of all ranks when an epoch has ended.
    """

    def __init__(
        self,
        mixture: Mixture,
        recipe: Recipe,
        shape: Shape,
        rank: int = 0,
        *,
        gather: Callable[[Share], list[Share]] = lambda share: [share],
        limit: int | float = 1.0,
        is_strict: bool = True,
        pad_id: int = 0,
        num_workers: int = 0,
        place: Callable[[], tuple[int, int]] = lambda: (0, 0),
        finished: Callable[[Account], None] = lambda account: None,
    ) -> None:
        self.mixture, self.shape, self.rank, self.gather, self.place = mixture, shape, rank, gather, place
        self.recipes = [recipe.of(part) for part in mixture.of_name.values()]
        self.limit = limit if isinstance(limit, int) else math.inf
        self.is_strict, self.num_workers, self.finished = is_strict, num_workers, finished
        self._collate = partial(collate, packed=shape.packing == "packed", pad_id=pad_id, part_names=mixture.names)
        self._blocks: deque[tuple[int, int, int]] = deque(maxlen=4)  # epoch, number and first micro-batch of the last
        self._resumed: dict[str, Any] = {}

    def __iter__(self) -> Iterator[Batch]:
        epoch, done = self.place()
        block, begin = self._start(epoch, done)
        chunks, total = self._chunks(epoch, block), Account()
        while True:
            own, error = self._take(chunks)
            examples = Examples([chunk.batch for chunk in own])
            parts = np.repeat([chunk.part for chunk in own], [len(chunk.batch) for chunk in own])
            packs, weights = self._packs(examples.lengths, (epoch, block)), examples.weights
            account = Account()
            for chunk in own:
                account.add(chunk.account)
            share = Share([math.fsum(weights[pack]) for pack in packs], account, not own, error)
            shares = self._agreed(share, total)
            if all(share.is_over for share in shares):
                break
            self._blocks.append((epoch, block, begin))
            dealt = deal([share.weights for share in shares], self.shape.accumulate, self.rank, self.limit - begin)
            for number, normalizer in dealt[max(0, done - begin) :]:
                chosen = packs[number] if number is not None else []
                yield self._collate([examples[i] for i in chosen], normalizer, parts=[int(parts[i]) for i in chosen])
            begin, block = begin + len(dealt), block + 1
        self.finished(total)

    def state_dict(self) -> dict[str, Any]:
        """The last blocks and where they begin: the same on every rank, so that any rank's can be saved."""
        epoch, _ = self.place()
        blocks = [[block, begin] for number, block, begin in self._blocks if number == epoch]
        return {"shape": asdict(self.shape), "epoch": epoch, "blocks": blocks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            InputError: When micro-batches would not be those of the run that saved it.
        """
        saved, own = state.get("shape", {}), asdict(self.shape)
        if differing := [f"{name}={saved.get(name)}, now {own[name]}" for name in own if saved.get(name) != own[name]]:
            raise InputError(
                f"The stream of the checkpoint was read with {'; '.join(differing)}. Resume with what it was, or begin "
                "a new run from its weights."
            )
        self._resumed = state

    def _start(self, epoch: int, done: int) -> tuple[int, int]:
        """The block to begin with, and the number of its first micro-batch."""
        blocks = self._resumed.get("blocks", []) if self._resumed.get("epoch") == epoch else []
        block, begin = max(([block, begin] for block, begin in blocks if begin <= done), default=(0, 0))
        return block, begin

    def _chunks(self, epoch: int, block: int) -> Iterator[Chunk]:
        size = min(_ROWS_AT_A_TIME, self.shape.buffer_rows)
        rows = partial(stream, self.mixture, size, self.shape.seed, epoch)
        first, num_ranks = block * self._chunks_per_block, self.shape.num_ranks
        ahead = max(2, math.ceil(self._chunks_per_block / max(1, self.num_workers)))  # a block, while one is trained
        return Chunks(rows, self.recipes, self.rank, num_ranks, first).run(self.num_workers, ahead)

    @property
    def _chunks_per_block(self) -> int:
        return math.ceil(self.shape.buffer_rows / _ROWS_AT_A_TIME)

    def _take(self, chunks: Iterator[Chunk]) -> tuple[list[Chunk], str | None]:
        try:
            return list(islice(chunks, self._chunks_per_block)), None
        except InputError as error:
            return [], str(error)

    def _packs(self, lengths: Any, place: tuple[int, int]) -> list[list[int]]:
        """The packs of this rank in a block, in their order."""
        random = np.random.default_rng([self.shape.seed, *place, self.rank])
        order = random.permutation(len(lengths))
        partition = pack if self.shape.packing == "packed" else group
        packs = partition(lengths[order].tolist(), max(self.shape.capacity, *lengths.tolist(), 0))
        return [order[packs[i]].tolist() for i in random.permutation(len(packs))]

    def _agreed(self, share: Share, total: Account) -> list[Share]:
        """What all ranks tell each other; all of them stop at the error of one."""
        shares = self.gather(share)
        for other in shares:
            total.add(other.account)
        total.trim(_LISTED)
        if errors := [other.error for other in shares if other.error]:
            raise InputError(errors[0])
        if total.refused and self.is_strict:
            raise total.refusal("train")
        return shares


def check_stream(mixture: Mixture, normalize: Normalize) -> None:
    """Refuse what a stream cannot do.

    Raises:
        InputError: When something would have to be known of all of the data beforehand, or a source can be read once.
    """
    if normalize == "dataset":
        raise InputError("model.normalize=dataset needs all of the data beforehand: set data.streaming=false.")
    if mixture.temperature is not None or mixture.by != "rows":
        raise InputError(
            "How large the parts of a stream are is not known beforehand, so there is no temperature, and shares are "
            "by rows: give each part a share, or set data.streaming=false."
        )
    for name, part in mixture.of_name.items():
        if isinstance(part.source, Iterator):
            raise InputError(
                f"{name or 'train'}: a {type(part.source).__name__} can be read only once, but a stream is read once "
                "an epoch. Give files, a list or a datasets.IterableDataset."
            )


def deal(
    weights: Sequence[Sequence[float]], accumulate: int, rank: int, limit: float = math.inf
) -> list[tuple[int | None, float]]:
    """The packs of a rank in order, each with the Z of its step; ``None`` keeps the others company.

    Args:
        weights: Of each pack of each rank.
        accumulate: Micro-batches of a rank in one optimiser step.
        rank: Whose packs.
        limit: How many micro-batches are used.

    >>> deal([[1.0, 2.0, 4.0], [8.0]], accumulate=2, rank=0)
    [(0, 1.0), (None, 1.0), (1, 14.0), (2, 14.0)]
    >>> deal([[1.0, 2.0, 4.0], [8.0]], accumulate=2, rank=1)
    [(None, 1.0), (None, 1.0), (0, 14.0), (None, 14.0)]
    """
    num_steps = math.ceil(max(map(len, weights)) / accumulate)
    dealt: list[tuple[int | None, float]] = []
    for step in range(num_steps):
        windows = [range(len(w) * step // num_steps, len(w) * (step + 1) // num_steps) for w in weights]
        left = limit - step * accumulate
        counted = [window[: int(min(left, accumulate))] if left > 0 else window for window in windows]
        normalizer = math.fsum(own[i] for own, window in zip(weights, counted, strict=True) for i in window)
        mine = [*windows[rank], *[None] * accumulate]
        dealt += [(pack, normalizer) for pack in mine[:accumulate]]
    return dealt
