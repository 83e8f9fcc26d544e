"""One split of the data: its rows as encoded examples, and an account of every row that is not among them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from rich.progress import track
from transformers import PreTrainedTokenizerBase

from lightning_sft.data.encode import encode_many, encode_prompt
from lightning_sft.data.formats import FormatName
from lightning_sft.data.messages import Converter
from lightning_sft.data.overflow import Overflow, shorten
from lightning_sft.data.sources import Row, Source, read
from lightning_sft.types import Conversation, Example, InputError, Normalize, Prompt

_LISTED = 5  # rows named in a message
_ROWS_AT_A_TIME = 1000  # so many go through the tokenizer together


@dataclass
class Split:
    """Examples of one source, and what became of its other rows.

    Args:
        name: ``train``, ``val`` or ``test``.
        examples: What is trained on or evaluated.
        num_rows: Rows read.
        refused: One reason a row that cannot be used, with ``file:line``.
        too_long: ``file:line`` and length of each sequence left out because it is longer than ``max_length``.
        cut: The same of those that were truncated or split.
        ignored: How many rows have a key that means nothing.
    """

    name: str
    examples: list[Example] = field(default_factory=list)
    num_rows: int = 0
    refused: list[str] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(example) for example in self.examples]

    @property
    def weights(self) -> list[float]:
        """Sum of target weights of each example."""
        return [float(sum(example.target_weights)) for example in self.examples]

    @property
    def num_targets(self) -> int:
        """Tokens that are trained on."""
        return sum(weight > 0 for example in self.examples for weight in example.target_weights)

    def remarks(self) -> list[str]:
        """What is not trained on, in words; empty where every row is used whole."""
        said = []
        if self.refused:
            said.append(f"{len(self.refused)} of {self.num_rows} rows cannot be used:\n{_some(self.refused)}")
        if self.too_long:
            left_out = f"{len(self.too_long)} sequences are longer than data.max_length and left out"
            said.append(f"{left_out}:\n{_some(self.too_long)}")
        if self.cut:
            said.append(f"{len(self.cut)} sequences are longer than data.max_length and cut:\n{_some(self.cut)}")
        if self.ignored:
            keys = ", ".join(f"{key!r} ({count} rows)" for key, count in self.ignored.most_common())
            said.append(f"keys without a meaning in their format are ignored: {keys}")
        return [f"{self.name}: {remark}" for remark in said]


def load_split(
    name: str,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: FormatName | None = None,
    columns: Mapping[str, str] | None = None,
    normalize: Normalize = "token",
    max_length: int | None = None,
    overflow: Overflow = "drop",
    invalid_rows: Literal["error", "skip"] = "error",
    progress: bool = False,
) -> Split:
    """Read and encode a source.

    Args:
        name: ``train``, ``val`` or ``test``.
        source: Files or rows, see :func:`lightning_sft.data.sources.read`.
        tokenizer: With a chat template.
        format: The format of all rows; told from the keys of each by default.
        columns: The data's column for a key of the format, where it has another name.
        normalize: What target weights are scaled to.
        max_length: Most tokens in a sequence.
        overflow: What becomes of longer ones, which are counted, see :func:`lightning_sft.data.overflow.shorten`.
        invalid_rows: Whether a row that cannot be used stops everything, or is left out and counted.
        progress: Show a progress bar.

    Raises:
        InputError: When rows cannot be used and ``invalid_rows`` is ``error``, a sequence is too long and ``overflow``
            is, or nothing is left.
    """
    convert = Converter(format, columns)
    split, shortest = Split(name, ignored=convert.ignored), None
    rows = track(read(source), f"Encoding {name}", disable=not progress, transient=True)
    for provenance, result in _encoded(rows, convert, tokenizer, normalize):
        split.num_rows += 1
        if isinstance(result, InputError):
            split.refused.append(str(result))
            continue
        for example in result:
            shortest = min(len(example), shortest or len(example))
            if max_length is None or len(example) <= max_length:
                split.examples.append(example)
            else:
                pieces = shorten(example, max_length, overflow)
                split.examples += pieces
                (split.cut if pieces else split.too_long).append(f"{provenance} ({len(example):,} tokens)")
    if split.refused and invalid_rows == "error":
        raise InputError(f"{split.remarks()[0]}\nCorrect them, or leave them out with data.invalid_rows=skip.")
    if not split.examples:
        if shortest is not None:
            raise InputError(
                f"{name}: data.max_length={max_length} is less than the {shortest} tokens of the shortest sequence. "
                "Raise it, or leave it out for the model's own context."
            )
        raise InputError(f"{name}: no row can be used.\n{_some(split.refused)}")
    return split


def load_prompts(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: FormatName | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Prompt]:
    """The prompts of a source, for generation; rows may lack the answer.

    Raises:
        InputError: At the first row that cannot be used.
    """
    convert = Converter(format, columns, answered=False)
    return [encode_prompt(convert(row, where), tokenizer) for row, where in read(source)]


def _encoded(
    rows: Iterable[tuple[Row, str]], convert: Converter, tokenizer: PreTrainedTokenizerBase, normalize: Normalize
) -> Iterator[tuple[str, list[Example] | InputError]]:
    """The place of each row, and its sequences or why it has none; many rows at a time, which is faster."""
    rows = iter(rows)
    while chunk := list(islice(rows, _ROWS_AT_A_TIME)):
        converted = [_attempt(convert, row, provenance) for row, provenance in chunk]
        encoded = iter(encode_many([c for c in converted if isinstance(c, Conversation)], tokenizer, normalize))
        for (_, provenance), one in zip(chunk, converted, strict=True):
            yield provenance, next(encoded) if isinstance(one, Conversation) else one


def _attempt(convert: Converter, row: Row, provenance: str) -> Conversation | InputError:
    try:
        return convert(row, provenance)
    except InputError as error:
        return error


def _some(reasons: list[str]) -> str:
    more = [f"  ... and {len(reasons) - _LISTED} more"] if len(reasons) > _LISTED else []
    return "\n".join([f"  {reason}" for reason in reasons[:_LISTED]] + more)
