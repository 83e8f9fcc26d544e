"""Streamed data that is never in memory as a whole: read, encoded and packed block by block while the model is trained.

The ranks tell each other the weights of the packs of a block. So each knows Z of every step beforehand, as with a plan,
they take equally many micro-batches, and end together. What a block holds depends on the seed, the epoch and the number
of ranks alone, so a run that was killed begins again at its block, without the rows before it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_sft.data.batches.interleave import lanes, num_lanes
from lightning_sft.data.batches.stream_blocks import Block, RankSummary, StreamLayout, deal
from lightning_sft.data.rows.mixture import Mixture
from lightning_sft.data.tokens.encode_rows import Chunk, Chunks, EncodingConfig
from lightning_sft.data.tokens.row_report import RowReport
from lightning_sft.objective import NORMALIZATIONS
from lightning_sft.types import Batch, InputError, Normalize

_ROWS_AT_A_TIME = 256  # of a chunk
_LISTED = 1000  # rows of a kind that are remembered


class StreamLoader:
    """The micro-batches of one rank of a stream, epoch after epoch. Its length is not known.

    Args:
        mixture: The data sets.
        recipe: Settings for encoding rows as examples.
        shape: Settings that determine the rows of a micro-batch.
        rank: Data-parallel rank.
        gather: The values of all ranks, in order of the ranks, from that of each.
        limit: Micro-batches of a rank that an epoch will use. The Z of a step that it cuts is that of what is left.
        is_strict: Whether a row that cannot be used is an error.
        pad_id: Token id of padding.
        full: Whether packed rows are filled up to the capacity, so that they are of one shape.
        num_workers: Worker processes that encode ahead; 0 encodes in the training process.
        place: Gives the epoch, and how many micro-batches of it are done.
        finished: Callback of :meth:`report`, at the end of an epoch or of training, for the account of the rows of all
            ranks so far, and how many target tokens each data set had.
    """

    def __init__(
        self,
        mixture: Mixture,
        recipe: EncodingConfig,
        shape: StreamLayout,
        rank: int = 0,
        *,
        gather: Callable[[RankSummary], list[RankSummary]] = lambda share: [share],
        limit: int | float = 1.0,
        is_strict: bool = True,
        pad_id: int = 0,
        full: bool = False,
        num_workers: int = 0,
        place: Callable[[], tuple[int, int]] = lambda: (0, 0),
        finished: Callable[[RowReport, dict[str, int]], None] = lambda account, targets: None,
    ) -> None:
        self.mixture, self.shape, self.rank, self.gather, self.place = mixture, shape, rank, gather, place
        self.recipes = [recipe.of(part) for part in mixture.of_name.values()]
        self.num_lanes = num_lanes(mixture, shape.num_ranks)
        self.limit = limit if isinstance(limit, int) else math.inf
        self.is_strict, self.num_workers, self.finished = is_strict, num_workers, finished
        self.pad_id, self.full = pad_id, full
        self._blocks: deque[tuple[int, int, int]] = deque(maxlen=4)  # epoch, number and first micro-batch of the last
        self._resumed: dict[str, Any] = {}
        self._unreported: tuple[RowReport, NDArray[Any]] | None = None

    def __iter__(self) -> Iterator[Batch]:
        epoch, done = self.place()
        block, begin = self._start(epoch, done)
        chunks, account, targets = self._chunks(epoch, block), RowReport(), np.zeros(len(self.recipes), int)
        while max(done, begin) < self.limit:
            own, error = self._take(chunks)
            where = epoch, block, self.rank
            encoded = Block(own, self.shape, where, self.mixture.names, self.pad_id, full=self.full)
            shares = self.gather(encoded.share(error))
            for share in shares:
                account.add(share.account)
                targets += share.targets
            self._unreported = account, targets
            self._stop_at_errors(shares, account)
            if all(share.is_over for share in shares):
                break
            self._blocks.append((epoch, block, begin))
            dealt = deal([share.weights for share in shares], self.shape.accumulate, self.rank, self.limit - begin)
            left = len(dealt) if self.limit is math.inf else int(self.limit) - begin
            for number, normalizer in dealt[max(0, done - begin) : left]:
                yield encoded.batch(number, normalizer)
            begin, block = begin + len(dealt), block + 1
        self.report()

    def report(self) -> None:
        """Say what became of the rows, unless it has been said."""
        if self._unreported is not None:
            (account, targets), self._unreported = self._unreported, None
            self.finished(account, dict(zip(self.mixture.parts, targets.tolist(), strict=True)))

    def state_dict(self) -> dict[str, Any]:
        """The last blocks and where they begin: the same on every rank, so that any rank's can be saved."""
        epoch = self._blocks[-1][0] if self._blocks else 0
        blocks = [[block, begin] for number, block, begin in self._blocks if number == epoch]
        return {"shape": self._shape, "epoch": epoch, "blocks": blocks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state.

        Raises:
            InputError: When micro-batches would not be those of the run that saved it.
        """
        saved, own = {"lanes": 1, **state.get("shape", {})}, self._shape
        if differing := [f"{name}={saved.get(name)}, now {own[name]}" for name in own if saved.get(name) != own[name]]:
            raise InputError(
                f"The stream of the checkpoint was read with {'; '.join(differing)}. Resume with what it was, or begin "
                "a new run from its weights."
            )
        self._resumed = state

    @property
    def _shape(self) -> dict[str, Any]:
        return {**asdict(self.shape), "lanes": self.num_lanes}

    def _start(self, epoch: int, done: int) -> tuple[int, int]:
        """The block to begin with, and the number of its first micro-batch."""
        blocks = self._resumed.get("blocks", []) if self._resumed.get("epoch") == epoch else []
        block, begin = max(([block, begin] for block, begin in blocks if begin <= done), default=(0, 0))
        return block, begin

    def _chunks(self, epoch: int, block: int) -> Iterator[Chunk]:
        size = min(_ROWS_AT_A_TIME, self.shape.buffer_rows)
        rows = partial(lanes, self.mixture, size, self.shape.seed, epoch, self.num_lanes)
        first, num_ranks = block * self._chunks_per_block, self.shape.num_ranks
        ahead = max(2, math.ceil(self._chunks_per_block / max(1, self.num_workers)))  # a block, while one is trained
        return Chunks(rows, self.recipes, self.rank, num_ranks, first, self.num_lanes).run(self.num_workers, ahead)

    @property
    def _chunks_per_block(self) -> int:
        return math.ceil(self.shape.buffer_rows / _ROWS_AT_A_TIME)

    def _take(self, chunks: Iterator[Chunk]) -> tuple[list[Chunk], str | None]:
        try:
            return list(islice(chunks, self._chunks_per_block)), None
        except InputError as error:
            return [], str(error)

    def _stop_at_errors(self, shares: Sequence[RankSummary], account: RowReport) -> None:
        """All ranks stop at the error of one, with the same message."""
        if errors := [share.error for share in shares if share.error]:
            raise InputError(errors[0])
        if account.refused and self.is_strict:
            raise account.refusal("train")
        account.trim(_LISTED)


def check_stream(mixture: Mixture, normalize: Normalize, held_out: float | None = None) -> None:
    """Refuse what a stream cannot do.

    Args:
        mixture: The data sets.
        normalize: Normalization of the objective.
        held_out: Share of the rows that is held out for validation, if any.

    Raises:
        InputError: When something would have to be known of all of the data beforehand, or a source can be read once.
    """
    if NORMALIZATIONS[normalize].is_constant:
        raise InputError(f"model.normalize={normalize} needs all of the data beforehand: set data.streaming=false.")
    if held_out is not None:
        raise InputError(
            f"data.val={100 * held_out:g}% of a stream would be known only after all of it has been read. Give "
            "validation data of their own, or set data.streaming=false."
        )
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
