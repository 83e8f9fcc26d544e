"""Rows to encoded examples, many at a time, in worker processes where that pays; in the order of the rows all the same.

The rows are cut into chunks, each is one worker's, and chunks come back in order. So nothing that is computed depends
on how many workers there are, and a rank of a stream takes every ``num_ranks``-th chunk. Rows may lie in several lanes
that are read apart, chunk by chunk in turn: then who takes the chunks of one lane does not read those of another.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Any

import pyarrow as pa
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerBase

from lightning_sft.data.rows.files import Line
from lightning_sft.data.rows.messages import Converter, Reading
from lightning_sft.data.rows.mixture import Part
from lightning_sft.data.rows.sources import Leaf, parsed
from lightning_sft.data.rows.values import check_weight
from lightning_sft.data.tokens.encode import Encoded, encode_all
from lightning_sft.data.tokens.examples import to_record_batch
from lightning_sft.data.tokens.given_ids import check_ids, weighted
from lightning_sft.data.tokens.held_out import Side
from lightning_sft.data.tokens.overflow import Overflow, shorten
from lightning_sft.data.tokens.row_report import RowReport
from lightning_sft.data.tokens.template_config import TemplateConfig
from lightning_sft.data.tokens.workers import iterate, leave_signals, take_turn
from lightning_sft.io.arguments import check_arguments
from lightning_sft.types import Conversation, Example, InputError, Normalize

Rows = list[tuple[Any, str]]
"""Rows of a :data:`~lightning_sft.data.rows.sources.Leaf`, each with where it came from."""

Lane = Iterator[tuple[int, Rows]]
"""Chunks of rows, each with the number of the data set that it comes from."""


@dataclass(frozen=True)
class EncodingConfig:
    """How the rows of a data set become examples.

    Args:
        tokenizer: Tokenizer with a chat template.
        reading: How rows are read.
        normalize: Normalization that target weights are scaled for.
        max_length: Maximum number of tokens in a sequence.
        overflow: Handling of longer sequences, see :func:`lightning_sft.data.tokens.overflow.shorten`.
        weight: Multiplies all target weights.
        template: How conversations are rendered; by default as the tokenizer says.
        first: Number of the first rows that are used; by default all.
        side: The rows that are used, where a share is held out for validation.
    """

    tokenizer: PreTrainedTokenizerBase
    reading: Reading = field(default_factory=Reading)
    normalize: Normalize = "token"
    max_length: int | None = None
    overflow: Overflow = "drop"
    weight: float = 1.0
    template: TemplateConfig | None = None
    first: int | None = None
    side: Side | None = None

    def __post_init__(self) -> None:
        others = {name: value for name, value in vars(self).items() if name != "normalize"}
        check_arguments(EncodingConfig, {"normalize": self.normalize}, "model")
        check_arguments(EncodingConfig, others, "data")

    def of(self, part: Part) -> EncodingConfig:
        """The recipe for a part of a mixture, which may override how its rows are read, and has a weight."""
        return replace(self, reading=self.reading.of(part), weight=part.weight, first=part.first)


@dataclass(frozen=True)
class Chunk:
    """The result of encoding a chunk of consecutive rows.

    Args:
        records: Examples of the usable rows, see :mod:`lightning_sft.data.tokens.examples`.
        account: Account of the other rows.
        part: Number of the data set that they come from.
        has_ended: Whether there were no rows, because their lane has ended.
    """

    records: pa.RecordBatch
    account: RowReport
    part: int = 0
    has_ended: bool = False


class Chunks(IterableDataset[Chunk | InputError]):
    """Encodes the chunks of one rank; in a worker process, those that are this worker's turn.

    An error stands in the place of the chunk that it stops at.

    Args:
        lanes: Gives all rows, as chunks in one lane or several. Chunk number n is of lane n modulo their number, and
            empty where that has ended.
        recipes: Recipe of each data set.
        rank: Takes the chunks ``rank``, ``rank + num_ranks``, …
        num_ranks: Among how many ranks the chunks are dealt out.
        first: Number of this rank's chunks to skip at the beginning.
        num_lanes: Number of lanes: 1, or a multiple of ``num_ranks``.
    """

    def __init__(
        self,
        lanes: Callable[[], Sequence[Lane]],
        recipes: Sequence[EncodingConfig],
        rank: int = 0,
        num_ranks: int = 1,
        first: int = 0,
        num_lanes: int = 1,
    ) -> None:
        self.lanes, self.recipes, self.first, self.num_lanes = lanes, recipes, first, num_lanes
        self.rank, self.num_ranks = rank, num_ranks

    def __iter__(self) -> Iterator[Chunk | InputError]:
        turn, num_workers = take_turn()
        converters = [Converter(recipe.reading) for recipe in self.recipes]
        try:
            lanes = [enumerate(lane) for lane in self.lanes()]
            for own in count(self.first + turn, num_workers):
                number, lane = divmod(self.rank + own * self.num_ranks, self.num_lanes)
                part, rows = _chunk(lanes[lane], number, converters)
                yield _encoded(rows, converters[part], self.recipes[part], part)
        except InputError as error:
            yield error

    def run(self, num_workers: int = 0, ahead: int = 2) -> Iterator[Chunk]:
        """The chunks in order.

        Args:
            num_workers: Worker processes; 0 encodes in this one.
            ahead: Chunks that each worker keeps ready.

        Raises:
            InputError: If a source cannot be read, or a sequence is too long and ``overflow`` is ``error``.
        """
        settings: dict[str, Any] = {"prefetch_factor": ahead, "worker_init_fn": leave_signals} if num_workers else {}
        loader = DataLoader(self, batch_size=None, num_workers=num_workers, collate_fn=_as_it_is, **settings)
        own_lanes, ended = max(1, self.num_lanes // self.num_ranks), 0
        for chunk in iterate(loader):
            if isinstance(chunk, InputError):
                raise chunk
            ended = ended + 1 if chunk.has_ended else 0
            if ended == own_lanes:
                return
            yield chunk


def _chunk(
    lane: Iterator[tuple[int, tuple[int, Rows]]], number: int, converters: Sequence[Converter]
) -> tuple[int, Rows]:
    """The chunk of a lane with a number, without rows where the lane has ended; those before it are skipped."""
    for at, (part, rows) in lane:
        if at == number:
            return part, rows
        _learn(rows, converters[part])
    return 0, []


def in_chunks(
    leaves: Iterable[Leaf], size: int, first: int | None = None, characters: float = math.inf
) -> Iterator[Rows]:
    """The rows of files or lists in chunks.

    Args:
        leaves: Files or lists.
        size: Rows of a chunk; the last one may have fewer.
        first: Number of the first rows that are given; by default all.
        characters: Text of a chunk at which it ends, however few rows it has.
    """
    chunk, length = Rows(), 0
    for row, place in islice((row for leaf in leaves for row in leaf()), first):
        chunk.append((row, place))
        length += _length(row) if characters < math.inf else 0
        if len(chunk) == size or length >= characters:
            yield chunk
            chunk, length = Rows(), 0
    if chunk:
        yield chunk


def _length(value: Any) -> int:
    """Characters of all texts of a row, and of each other value one."""
    if isinstance(value, Line):
        return len(value.content)
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_length, value.values()))
    return sum(map(_length, value)) if isinstance(value, list) else 1


def _encoded(rows: Rows, convert: Converter, recipe: EncodingConfig, part: int) -> Chunk:
    """One call of the tokenizer for all rows."""
    convert.ignored = Counter()
    attempts = [(place, _attempt(convert, recipe, row, place)) for row, place in rows]
    conversations = [(place, attempt) for place, attempt in attempts if attempt is not None]
    good = [conversation for _, conversation in conversations if isinstance(conversation, Conversation)]
    encoded = encode_all(good, recipe.tokenizer, recipe.normalize, recipe.template)
    account, examples = RowReport(num_rows=len(conversations), ignored=convert.ignored), []
    for place, conversation in conversations:
        result = next(encoded) if isinstance(conversation, Conversation) else conversation
        if result.refusal is not None:
            account.refused.append(str(result.refusal))
            continue
        for note in sorted(result.notes):
            account.note(note, place)
        account.add(RowReport(shortest=min(map(len, result.examples))))
        examples += [piece for example in result.examples for piece in _fitted(example, recipe, account)]
    return Chunk(to_record_batch(examples), account, part, has_ended=not rows)


def _attempt(convert: Converter, recipe: EncodingConfig, row: Any, provenance: str) -> Conversation | Encoded | None:
    """A conversation to encode; or what there is already, of a row of token ids or one that is refused.

    ``None`` is a row of the other side; that it is refused is said once, of the training data.
    """
    ignored = convert.ignored.copy() if recipe.side else convert.ignored
    try:
        read = convert.read(parsed(row, provenance), provenance)
    except InputError as error:
        return None if recipe.side and recipe.side.is_held_out else Encoded(refusal=error)
    if recipe.side and not recipe.side.has(read):
        convert.ignored = ignored
        return None
    try:
        given = read.target_weights if isinstance(read, Example) else read.weights
        for weight in set(given) if recipe.weight != 1 else ():
            check_weight(float(weight) * recipe.weight, f"{provenance}: a weight times that of the data set")
        if isinstance(read, Example):
            check_ids(read, recipe.tokenizer)
            return Encoded([weighted(read, recipe.normalize, recipe.weight)])
    except InputError as error:
        return Encoded(refusal=error)
    return replace(read, weights=[own * recipe.weight for own in read.weights])


def _fitted(example: Example, recipe: EncodingConfig, account: RowReport) -> Sequence[Example]:
    if recipe.max_length is None or len(example) <= recipe.max_length:
        return [example]
    pieces = shorten(example, recipe.max_length, recipe.overflow)
    if pieces and recipe.overflow == "truncate_prompt":
        account.note("the beginning is cut off, so answers lack a part of their context", example.provenance)
    (account.cut if pieces else account.too_long).append(f"{example.provenance} ({len(example):,} tokens)")
    return pieces


def _learn(rows: Rows, convert: Converter) -> None:
    """See of which format the files are whose first rows are in a chunk of somebody else."""
    for row, provenance in rows:
        if not convert.knows(provenance):
            try:
                convert.learn(parsed(row, provenance), provenance)
            except InputError:  # that row's worker will say so
                continue


def _as_it_is(chunk: Any) -> Any:
    return chunk
