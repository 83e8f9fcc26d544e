"""Several data sets as one: how much of an epoch each has, and how much its tokens count."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning_sft.data.rows.formats import FormatName, check_columns
from lightning_sft.data.rows.sources import Source, as_rows
from lightning_sft.io.arguments import Count, Positive, check_arguments, made, plain
from lightning_sft.io.named import our_names
from lightning_sft.types import InputError


@our_names
@dataclass
class Part:
    """One data set of a mixture.

    Args:
        source: Files or rows, see :func:`lightning_sft.data.rows.sources.read`.
        share: Share of an epoch, relative to those of the other parts. Either all parts have one or none.
        weight: Multiplies the weight of each of its target tokens in the objective.
        format: The format of its rows, where it is not that of the data module.
        columns: Column of each key of the format; by default those of the data module.
        system: System prompt of its conversations that have none, where it is not that of the data module.
        train_on: Target turns of its conversations, where they are not those of the data module: ``all`` answers, the
            ``last`` one, or with ``prompts`` every other turn too.
        chat_template_kwargs: Variables of the chat template for its rows, over those of the data module.
        first: Number of its first rows that are used, where not all are.
    """

    source: Source
    share: Positive | None = None
    weight: Positive = 1.0
    format: FormatName | None = None
    columns: dict[str, str] | None = None
    system: str | None = None
    train_on: Literal["all", "last", "prompts"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    first: Count | None = None

    def __post_init__(self) -> None:
        self.source, self.columns = as_rows(plain(self.source)), plain(self.columns)
        self.chat_template_kwargs = plain(self.chat_template_kwargs)
        check_arguments(Part, vars(self))
        try:
            check_columns(self.columns or {})
        except InputError as error:
            raise InputError(f"The part of {str(self.source)[:60]}: {error}") from error


@our_names
@dataclass
class Mixture:
    """Several data sets.

    Without shares and temperature every row is used once an epoch. With them, an epoch is as large as all parts
    together, and parts have their shares of it: rows of some are used several times, those of others not in every
    epoch, but all rows of a part equally often.

    Args:
        parts: Each data set by its name: a :class:`Part`, its arguments as a dictionary, or a source alone.
        by: Unit of shares and sizes: ``rows``, or ``targets`` for target tokens.
        temperature: Shares in proportion to size ** (1 / temperature): 1 leaves sizes as they are, and the higher it
            is, the more alike the parts.

    >>> mixture = Mixture({"math": Part("gsm8k.jsonl", share=3), "chat": "chat.jsonl"})
    Traceback (most recent call last):
        ...
    lightning_sft.types.InputError: Either all parts of a mixture have a share or none: 'chat' has none.
    """

    parts: dict[str, Part | str | Path]
    by: Literal["rows", "targets"] = "rows"
    temperature: Positive | None = None

    def __post_init__(self) -> None:
        self.parts = plain(self.parts)
        check_arguments(Mixture, vars(self))
        if not self.parts:
            raise InputError("A mixture has no parts. Give each data set a name: parts={'math': 'gsm8k.jsonl'}.")
        if unsafe := [name for name in self.parts if not name.isprintable()]:
            raise InputError(f"The name of a part of a mixture has characters that cannot be printed: {unsafe[0]!r}.")
        without = [name for name, part in self.of_name.items() if part.share is None]
        if without and len(without) < len(self.parts):
            raise InputError(f"Either all parts of a mixture have a share or none: {without[0]!r} has none.")
        if self.temperature is not None and not without:
            raise InputError("A mixture has shares or a temperature, not both: the temperature makes the shares.")
        if self.by != "rows" and not self.has_shares:
            warnings.warn(f"by={self.by} has no effect in a mixture without shares or temperature.", stacklevel=2)

    @property
    def has_shares(self) -> bool:
        """Whether anything but the sizes of the parts says how much of an epoch each has."""
        return self.temperature is not None or any(part.share is not None for part in self.of_name.values())

    @property
    def names(self) -> list[str]:
        """The names of the parts; none where there is one part alone, which needs no name."""
        return list(self.parts) if len(self.parts) > 1 else []

    @property
    def of_name(self) -> dict[str, Part]:
        """The parts, all as a :class:`Part`."""
        return {name: _as_part(part, name) for name, part in self.parts.items()}

    def repeats(self, sizes: Sequence[float]) -> list[float]:
        """How often an epoch uses each row of each part.

        Args:
            sizes: Size of each part, in rows or targets.

        >>> Mixture({"a": Part("a.jsonl", share=1), "b": Part("b.jsonl", share=1)}).repeats([300, 100])
        [0.6666666666666666, 2.0]
        """
        shares = [part.share for part in self.of_name.values()]
        if self.temperature is not None:
            shares = [size ** (1 / self.temperature) for size in sizes]
        known = [share for share in shares if share is not None]
        if not known:
            return [1.0] * len(sizes)
        return [sum(sizes) * share / sum(known) / size for share, size in zip(known, sizes, strict=True)]


def _as_part(given: Any, name: str) -> Any:
    try:
        return made(Part, given if isinstance(given, (Part, Mapping)) else {"source": given})
    except InputError as error:
        raise InputError(f"The part {name!r} of a mixture: {error}") from error


def as_mixture(source: Source | Mixture) -> Mixture:
    """A lone data set as a mixture of one, without a name."""
    return source if isinstance(source, Mixture) else Mixture({"": Part(source)})
