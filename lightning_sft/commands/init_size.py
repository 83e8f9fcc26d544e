"""How much data ``lightning-sft init`` has before it, and into how many optimizer steps it cuts them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_sft.data.batches.split_plan import default_tokens_per_batch
from lightning_sft.data.rows.messages import Converter, Reading
from lightning_sft.data.rows.sources import leaves, parsed
from lightning_sft.data.tokens.encode import encode_many
from lightning_sft.io.words import counted
from lightning_sft.types import Conversation, Example, InputError

_COUNTED = 100_000  # rows at most
_ENCODED = 5_000  # rows at most
_TOKENS = 1_000_000  # that are encoded at most, some seconds
_AT_A_TIME = 100  # rows
_FEW_ROWS = 2_000  # that are used three times: an epoch of so few changes a model little
_STEPS = 50  # of a run, at least, where the data allow it
_SMALLEST = 256  # tokens per micro-batch
_MOST_EPOCHS = 5


@dataclass
class Size:
    """Size of a data set.

    Args:
        num_rows: Number of its rows, or of those that were counted.
        lengths: Tokens of the sequences of its first rows, but for those that are too long for the model.
        places: Location of each of these sequences.
        num_encoded: Number of rows that were encoded for it.
        too_long: Location and length of each sequence that is longer than the model's context.
        problem: Error of the first row that cannot be used, or ``None``.
        trained: Share of the rows that is trained, where one is held out.
    """

    num_rows: int = 0
    lengths: list[int] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    num_encoded: int = 0
    too_long: list[str] = field(default_factory=list)
    problem: InputError | None = None
    trained: float = 1.0

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows that are trained, estimated from those that were encoded."""
        return int(sum(self.lengths) * self.num_rows * self.trained / max(1, self.num_encoded))

    @property
    def rows_make(self) -> str:
        """Number of rows with a verb, as it is shown."""
        return counted(self.num_rows, "row", "make") if self.num_rows < _COUNTED else f"{_COUNTED:,} rows or more make"


def size_of_data(
    data: str, columns: dict[str, str] | None, tokenizer: PreTrainedTokenizerBase, context: int | None = None
) -> Size:
    """Count the rows of a data set, and encode the first of them.

    Args:
        data: Data source, as for ``data.train``.
        columns: Column for each key of the format.
        tokenizer: Tokenizer of the model.
        context: Maximum number of tokens of the model's context, if known: longer sequences are left out, as by
            ``fit``.

    Raises:
        InputError: When a file cannot be read, or no sequence is short enough.
    """
    size, convert = Size(), Converter(Reading(columns=columns))
    rows = islice((row for leaf in leaves(data) for row in leaf()), _COUNTED)
    while chunk := list(islice(rows, _AT_A_TIME)):
        size.num_rows += len(chunk)
        if size.num_encoded < _ENCODED and sum(size.lengths) < _TOKENS:
            size.num_encoded += len(chunk)
            for sequences in encode_many(list(_usable(chunk, convert, size)), tokenizer):
                if isinstance(sequences, InputError):
                    size.problem = size.problem or sequences
                else:
                    _take_in(sequences, context, size)
    if size.too_long and not size.lengths:
        raise InputError(
            f"{data}: every sequence of the first {size.num_encoded:,} rows is longer than the model's context of "
            f"{context:,} tokens, such as {size.too_long[0]}. Shorten the rows, or take a model with a longer context."
        )
    return size


def _usable(rows: list[tuple[Any, str]], convert: Converter, size: Size) -> Iterator[Conversation]:
    for row, place in rows:
        try:
            yield convert(parsed(row, place), place)
        except InputError as error:
            size.problem = size.problem or error


def _take_in(sequences: Sequence[Example], context: int | None, size: Size) -> None:
    """Take in the sequences of a row that ``fit`` will use, and name the others."""
    for sequence in sequences:
        if context is not None and len(sequence) > context:
            size.too_long.append(f"{sequence.provenance} ({len(sequence):,} tokens)")
        else:
            size.lengths.append(len(sequence))
            size.places.append(sequence.provenance)


@dataclass(frozen=True)
class Schedule:
    """How data are cut into optimizer steps.

    Args:
        tokens_per_batch: Maximum number of tokens in a micro-batch; ``None`` for the default.
        accumulate: Micro-batches of a device in one optimizer step.
        epochs: Number of passes over the data.
        num_steps: Number of optimizer steps, about.
    """

    tokens_per_batch: int | None
    accumulate: int
    epochs: int
    num_steps: int

    @classmethod
    def of(cls, size: Size, devices: int, on_cuda: bool) -> Schedule:
        """Some tens of steps at least, where the data allow it: by smaller steps first, then by more epochs.

        Args:
            size: Size of the training data.
            devices: Number of devices.
            on_cuda: Whether they are GPUs.

        >>> Schedule.of(Size(268, [100] * 268, [], 268), devices=1, on_cuda=False)
        Schedule(tokens_per_batch=1024, accumulate=1, epochs=3, num_steps=81)
        >>> Schedule.of(Size(100_000, [500] * 100, [], 100), devices=1, on_cuda=True)
        Schedule(tokens_per_batch=None, accumulate=4, epochs=1, num_steps=763)
        """
        longest, accumulate = max(size.lengths), 4
        epochs = 3 if size.num_rows < _FEW_ROWS else 1
        default = tokens = max(default_tokens_per_batch(on_cuda), longest)

        def steps() -> int:
            return math.ceil(math.ceil(size.num_tokens / tokens) / (devices * accumulate))

        while epochs * steps() < _STEPS and accumulate > 1:
            accumulate //= 2
        while epochs * steps() < _STEPS and tokens // 2 >= max(longest, _SMALLEST):
            tokens //= 2
        epochs = min(max(epochs, math.ceil(_STEPS / steps())), _MOST_EPOCHS if steps() < _STEPS else epochs)
        return cls(None if tokens == default else tokens, accumulate, epochs, epochs * steps())
