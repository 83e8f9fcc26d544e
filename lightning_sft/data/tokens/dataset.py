"""One split of the data: its rows as encoded examples, and an account of every row that is not among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerBase

from lightning_sft.data.rows.messages import Converter, Reading
from lightning_sft.data.rows.mixture import Mixture, Part, as_mixture
from lightning_sft.data.rows.sources import Source, files_behind, folders_of, globs_of, leaves, parsed, size_of
from lightning_sft.data.tokens.cache import cached, key_of
from lightning_sft.data.tokens.encode import encode_prompt
from lightning_sft.data.tokens.encode_rows import Chunk, Chunks, EncodingConfig, Lane, in_chunks
from lightning_sft.data.tokens.examples import Examples
from lightning_sft.data.tokens.held_out import Side
from lightning_sft.data.tokens.row_report import RowReport, some
from lightning_sft.data.tokens.workers import num_cores
from lightning_sft.machine.terminal import Console
from lightning_sft.types import InputError, Prompt

_ROWS_AT_A_TIME = 1000  # so many go through the tokenizer together
_CHARACTERS = 2_000_000  # of the rows that do
_LARGE = 4_000_000  # bytes of files that take so long, some seconds, that it pays to start processes
_HELD_OUT = "held out of data.train, chosen by their content"


@dataclass
class Split:
    """Examples of one source, or of a mixture of them, and an account of the other rows.

    Args:
        name: ``train``, ``val`` or ``test``.
        examples: Examples to train on or evaluate, data set after data set.
        account: Account of the rows that are not used whole.
        mixture: The data sets.
        part_sizes: Number of examples of each data set.
        built: Names of the builds of the cache entries that they are of.
    """

    name: str
    examples: Examples
    account: RowReport = field(default_factory=RowReport)
    mixture: Mixture = field(default_factory=lambda: as_mixture(()))
    part_sizes: list[int] = field(default_factory=list)
    built: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.part_sizes = self.part_sizes or [len(self.examples)]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example."""
        return self.examples.lengths

    @property
    def num_targets(self) -> int:
        """Tokens that are trained on."""
        return int(self.examples.num_targets.sum())

    @property
    def parts(self) -> NDArray[np.int64]:
        """Number of the data set that each example comes from."""
        return np.repeat(np.arange(len(self.part_sizes)), self.part_sizes)


Encoded = tuple[Examples, RowReport]


def _here(work: Callable[[], Encoded]) -> Encoded:
    return work()


def load_split(
    name: str,
    source: Source | Mixture,
    recipe: EncodingConfig,
    *,
    invalid_rows: Literal["error", "skip"] = "error",
    cache: Path | None = None,
    num_workers: int | None = None,
    progress: bool = False,
    first: int | None = None,
    once: Callable[[Callable[[], Encoded]], Encoded] = _here,
) -> Split:
    """Read and encode a source.

    Args:
        name: ``train``, ``val`` or ``test``.
        source: Files or rows, see :func:`lightning_sft.data.rows.sources.read`, or several data sets.
        recipe: Settings for encoding rows as examples.
        invalid_rows: Whether a row that cannot be used stops everything, or is left out and counted.
        cache: Folder of encoded data sets; none by default.
        num_workers: Worker processes that encode; 0 encodes in this one. By default large files have one a core.
        progress: Show the progress.
        first: Read no more than so many rows of each data set.
        once: Runs what encodes a source that has no entry in the cache, such as on one rank for all.

    Raises:
        InputError: When rows cannot be used and ``invalid_rows`` is ``error``, a sequence is too long and
            ``recipe.overflow`` is, or nothing is left.
    """
    mixture, account, found = as_mixture(source), RowReport(), []
    for part_name, part in mixture.of_name.items():
        if recipe.side is None or not recipe.side.is_held_out:
            _say_folders(name, part.source)
        title, own_recipe = f"{name}, {part_name}" if part_name else name, recipe.of(part)
        if own_recipe.side is not None:
            own_recipe = replace(own_recipe, side=own_recipe.side.within(part, own_recipe.reading))
        chunks = Chunks(partial(_lanes, part, first), [own_recipe])
        files = files_behind(part.source) if first is None else None
        key = key_of(files, own_recipe) if cache else None
        is_large = files is not None and size_of(files) >= _LARGE
        workers = (num_cores() if is_large else 0) if num_workers is None else num_workers
        is_shown = progress or key is not None  # of the ranks that want an entry, any may be the one that makes it
        shown = partial(_shown, chunks, workers, title if is_shown else None)
        examples, own = _loaded(shown, title, cache, key) if key else once(partial(_loaded, shown, title))
        if own.refused and invalid_rows == "error":
            raise own.refusal(title)
        if recipe.side is not None and recipe.side.is_held_out:
            own.notes[_HELD_OUT] = own.num_rows
            own.noted[_HELD_OUT] = [examples[0].provenance if len(examples) else title]
        if not examples:
            raise _nothing_left(title, own, own_recipe.max_length)
        account.add(own)
        found.append(examples)
    together = Examples([batch for examples in found for batch in examples.batches])
    built = tuple(examples.built for examples in found if examples.built)
    return Split(name, together, account, mixture, [len(examples) for examples in found], built)


def load_prompts(
    source: Source | Mixture,
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading | None = None,
    *,
    invalid_rows: Literal["error", "skip"] = "error",
    first: int | None = None,
    title: str | None = None,
    side: Side | None = None,
) -> list[Prompt]:
    """The prompts of a source, for generation; rows may lack the answer.

    Args:
        source: Files or rows, or several data sets, one after the other.
        tokenizer: Tokenizer with a chat template.
        reading: How rows are read.
        invalid_rows: Whether a row that cannot be used is an error, or left out.
        first: No more than so many rows of each data set.
        title: Name of the prompts in a warning of rows that are left out; none by default.
        side: The rows that are used, where a share is held out for validation.

    Raises:
        InputError: At the first row that cannot be used, unless ``invalid_rows`` is ``skip``; or, with a title, when
            none can.
    """
    found, account = list[Prompt](), RowReport()
    for part in as_mixture(source).of_name.values():
        if title:
            _say_folders(title, part.source)
        own_reading, begin = (reading or Reading()).of(part), len(found)
        convert, own_side = Converter(own_reading, answered=False), side and side.within(part, own_reading)
        for row, where in islice((row for leaf in leaves(part.source) for row in leaf()), part.first):
            if first is not None and len(found) - begin >= first:
                break
            account.num_rows += 1
            try:
                conversation = convert(parsed(row, where), where)
                if own_side is not None and not own_side.has(conversation):
                    continue
                found.append(replace(encode_prompt(conversation, tokenizer), number=len(found)))
            except InputError as error:
                if invalid_rows == "error":
                    raise
                account.refused.append(str(error))
    if title and account.refused:
        if not found:
            raise _nothing_left(title, account, None)
        rank_zero_warn(account.remarks(title)[0])
    return found


def _say_folders(name: str, source: Source) -> None:
    """Say which files of folders are read.

    Raises:
        InputError: When they are for another split, as their names say.
    """
    for pattern in globs_of(source):
        pattern.check(name)
    for folder in folders_of(source):
        folder.check(name)
        (rank_zero_warn if folder.left_out else rank_zero_info)(f"{name}: {folder}")


def _lanes(part: Part, first: int | None) -> list[Lane]:
    files, used = leaves(part.source, streaming=first is not None), [n for n in (part.first, first) if n is not None]
    return [((0, rows) for rows in in_chunks(files, _ROWS_AT_A_TIME, min(used, default=None), _CHARACTERS))]


def _loaded(
    chunks: Callable[[], Iterator[Chunk]], title: str, cache: Path | None = None, key: str | None = None
) -> Encoded:
    """The examples of chunks, and their account: from the cache, or else in memory."""
    if cache is not None and key is not None:
        try:
            return cached(cache, key, chunks, title)
        except OSError as error:  # a source's own would be an InputError
            rank_zero_warn(f"Encoded data cannot be kept in {cache} ({error}). Set data.cache to another folder.")
    account, batches = RowReport(), []
    for chunk in chunks():
        account.add(chunk.account)
        batches.append(chunk.records)
    return Examples(batches), account


def _shown(chunks: Chunks, num_workers: int, title: str | None) -> Iterator[Chunk]:
    """The chunks, with their progress on the screen where there is a title."""
    columns = (
        SpinnerColumn(),
        TextColumn("Encoding {task.description}: {task.completed:,} rows", markup=False),
        TimeElapsedColumn(),
    )
    console = Console()
    is_seen = title is not None and (console.is_terminal or console.is_jupyter)  # elsewhere it is an empty line
    with Progress(*columns, console=console, transient=True, disable=not is_seen) as progress:
        task = progress.add_task(title or "", total=None)
        for chunk in chunks.run(num_workers):
            yield chunk
            progress.advance(task, chunk.account.num_rows)


def _nothing_left(name: str, account: RowReport, max_length: int | None) -> InputError:
    if account.shortest:
        return InputError(
            f"{name}: data.max_length={max_length} is less than the {account.shortest} tokens of the shortest "
            "sequence. Raise it, or leave it out for the model's own context."
        )
    return InputError(f"{name}: no row can be used.\n{some(account.refused, len(account.refused))}")
