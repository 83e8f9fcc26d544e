"""``lightning-sft show``: the training data token by token, before training and without the model's weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from transformers import PreTrainedTokenizerBase

from lightning_sft.commands.base import ConfigCLI
from lightning_sft.commands.show.page import write_page
from lightning_sft.commands.show.terminal import show_audit, show_document, show_legend
from lightning_sft.data.batches.loader import EpochLoader
from lightning_sft.data.batches.plan import Division
from lightning_sft.data.batches.split_plan import SplitPlan
from lightning_sft.data.inspect.audit import Finding, Thresholds, audit
from lightning_sft.data.inspect.clean import clean_files, left_out, write_clean
from lightning_sft.data.inspect.documents import EpochDocuments, PlacedDocument, is_place
from lightning_sft.data.inspect.summary import place_of, show_counts, show_details
from lightning_sft.data.inspect.token_text import LOOKALIKE, PieceReader
from lightning_sft.data.rows.files import kind_of
from lightning_sft.data.rows.mixture import as_mixture
from lightning_sft.data.tokens.dataset import Split
from lightning_sft.datamodule import SFTDataModule
from lightning_sft.io.arguments import Index, check_arguments
from lightning_sft.io.words import counted
from lightning_sft.machine.terminal import Console
from lightning_sft.types import InputError


def show(
    data: LightningDataModule,
    module: LightningModule | None,
    trainer: Any,
    rows: Index = 3,
    row: str | None = None,
    html: str | Path | None = None,
    html_rows: Index = 1000,
    check: Thresholds | None = None,
    clean: str | Path | None = None,
    overwrite: bool = False,
) -> list[Finding]:
    """Show the training data token by token, with a report.

    Shown are the tensors of the micro-batches of the first epoch. Rows that cannot be used are skipped and listed,
    whatever the value of ``data.invalid_rows``.

    Args:
        data: Data module whose training and validation batches are shown.
        module: Module that determines the tokenizer and the normalization of weights.
        trainer: Settings of the trainer, which determine the distribution of micro-batches.
        rows: Number of sequences to print, each from a different micro-batch if there are enough.
        row: Row whose sequences are printed instead, as ``file:line``, or its number alone where there is one file. The
            report is then its first table alone.
        html: Path of a self-contained, searchable HTML page to write as well.
        html_rows: Maximum number of sequences on the page: the first ones of the epoch, which is in random order.
        check: Thresholds of an audit of the whole data set, which exits with 1 if a share exceeds one. ``--check`` uses
            the default thresholds; ``--check.max_refused 0.01``, or a section ``check`` in a YAML, changes one.
        clean: Path of a JSONL file to write with the usable rows of the training data in the normal form.
        overwrite: Whether ``clean`` may replace an existing file; never one of the files that are read.

    Returns:
        Findings of the audit; empty without ``check``.

    Raises:
        InputError: When the data module is not an SFTDataModule, the row does not exist, a file would be written
            over, or ``clean`` is set for a stream, of which only the first rows are read.
    """
    if not isinstance(data, SFTDataModule):
        raise InputError(f"show needs an SFTDataModule or a subclass, got {type(data).__name__}.")
    check_arguments(show, locals())
    is_stream = data.streaming
    if clean is not None and is_stream:
        raise InputError("clean needs all rows, and a stream is read only in part: set data.streaming=false.")
    sources = [
        part.source
        for given in data.sources.values()
        if given is not None
        for part in as_mixture(given).of_name.values()
    ]
    if clean is not None and data.sources["train"] is not None:
        clean_files(clean, as_mixture(data.sources["train"]), sources, overwrite)
    if html is not None and kind_of(Path(html)) is not None:
        raise InputError(f"html={html} would be a page with the name of a data file. Give one that ends in .html.")
    data, fit_stops = _previewed(data, module, trainer)
    assert data.tokenizer is not None
    console, reader, pad_id = Console(soft_wrap=True), PieceReader(data.tokenizer), data.pad_id
    train = EpochDocuments(cast(EpochLoader, data.train_dataloader()), pad_id)
    val: Iterable[PlacedDocument] = EpochDocuments(data.val_dataloader(), pad_id) if "val" in data.splits else ()

    chosen = train.first(rows) if row is None else _at(row, train, val, data.splits)
    shown = [reader.read(placed.document) for placed in chosen]
    for number, (placed, pieces) in enumerate(zip(chosen, shown, strict=True)):
        before = "\n" if number else ""
        show_document(pieces, placed.document.provenance, placed.remark, console, before)
    if chosen:
        show_legend(console, any(LOOKALIKE[0] in piece.text for pieces in shown for piece in pieces))

    show_counts(data.splits, data.planned("train"), console)
    for split in data.splits.values() if row is None else ():
        show_details(split, console)
    if is_stream:
        console.print(
            f"\nThe training data are streamed: these are the first {data.sample_rows:,} rows of each data set."
        )
    for why in fit_stops:
        console.print(f"\nfit stops at {why}.", style="bold red", highlight=False)

    findings: list[Finding] = []
    if check is not None:
        once = SplitPlan.of(
            data.splits["train"], Division(), data.packing, data.tokens_per_batch
        )  # whatever the mixture's shares
        trained = (placed.document for placed in EpochDocuments(once.loader(0, pad_id, 0), pad_id))
        held_out = (placed.document for placed in val)
        findings = audit(trained, held_out, data.splits, reader.special_ids, check, _unknown_id(data.tokenizer))
        show_audit(findings, console)
    if html is not None:
        first = {placed.document.provenance for placed in chosen} if row else set()
        others = (placed for placed in train if placed.document.provenance not in first)
        page = islice(chain(chosen if row else [], others), html_rows)
        read = ((placed.document.provenance, placed.remark, reader.read(placed.document)) for placed in page)
        write_page(html, read, data.splits, data.planned("train"), str(data.tokenizer.name_or_path), findings)
        console.print(f"\nPage: {html}", highlight=False)
    if clean is not None:
        mixture = data.splits["train"].mixture
        own = [split for split in data.splits.values() if split.mixture == mixture]  # also what is held out of it
        for path, count in write_clean(clean, own, data.reading).items():
            console.print(f"\nUsable rows: {count:,} in {path}", highlight=False)
        refused, too_long = left_out(own)
        console.print(f"Left out: {refused:,} refused, {too_long:,} too long", highlight=False)
        if data.reading.format is not None or data.reading.columns:
            console.print("Train on them without data.format and data.columns.", highlight=False)
    return findings


_ANSWERS = {"--check=true": "--check={}", "--check=false": "--check=null"}


class ShowCLI(ConfigCLI):
    """The command line of ``fit`` with the arguments of :func:`show`; its ``result`` is the list of findings."""

    verb = staticmethod(show)

    @property
    def passes(self) -> bool:
        """Whether all checks of the audit pass; true without an audit."""
        return all(finding.passes for finding in self.result)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Accept ``--check`` without a value or with true, for the thresholds of the config or the default ones."""
        assert isinstance(args, list)
        following = [*args[1:], "--"]
        bare = [
            f"{a}=true" if a == "--check" and b.startswith("--") else a for a, b in zip(args, following, strict=True)
        ]
        joined = "\0".join(bare).replace("--check\0", "--check=").split("\0")
        rest = [_ANSWERS.get(argument.lower(), argument) for argument in joined]
        super().parse_arguments(parser, sorted(rest, key=lambda argument: argument != _ANSWERS["--check=true"]))


def _previewed(data: SFTDataModule, module: LightningModule | None, trainer: Any) -> tuple[SFTDataModule, list[str]]:
    """All usable rows, and why ``fit`` would stop at others, if it would."""
    by_row, by_length = data.invalid_rows == "error", data.overflow == "error"
    data = copy(data)
    data._settle(invalid_rows="skip", overflow="drop" if by_length else data.overflow)
    data = data.preview(module, trainer, progress=True)
    accounts = [split.account for split in data.splits.values()]
    refused, too_long = any(account.refused for account in accounts), any(account.too_long for account in accounts)
    rows, sequences = (
        "the refused rows: data.invalid_rows is 'error'",
        "the sequences left out: data.overflow is 'error'",
    )
    return data, [rows] * (by_row and refused) + [sequences] * (by_length and too_long)


def _unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that stands for what a vocabulary does not have; some tokenizers name one that stops answers instead."""
    unknown: int | None = tokenizer.unk_token_id
    return None if unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id) else unknown


def _at(
    row: str, train: Iterable[PlacedDocument], val: Iterable[PlacedDocument], splits: Mapping[str, Split]
) -> list[PlacedDocument]:
    """The sequences of a row.

    Raises:
        InputError: When the row was refused, does not exist, or is that of several files.
    """
    found: list[PlacedDocument] = []
    for documents, name in ((train, "train"), (val, "val")):
        if name not in splits:
            continue
        account = splits[name].account
        unused = {place_of(text): text for text in account.refused}
        unused |= {place_of(text): f"{text}: longer than data.max_length" for text in account.too_long}
        read = [placed for placed in documents if is_place(row, placed.document.provenance)]
        places = dict.fromkeys([placed.document.provenance for placed in read])
        places |= dict.fromkeys(place for place in unused if is_place(row, place))
        exact = [place for place in places if f"/{place}".endswith(f"/{row}")]
        if len({place.rpartition(":")[0] for place in exact or places}) > 1 and ":" not in row:
            raise InputError(f"The row {row} is there in several files. Name one: {' or '.join(list(places)[:5])}.")
        if found := [placed for placed in read if placed.document.provenance in (exact or places)]:
            return found
        for place in exact or places:
            raise InputError(f"The row is not used. {unused[place]}")
    example = next(iter(splits.values())).examples[0].provenance
    sizes = " and ".join(f"{counted(split.account.num_rows, 'row')} of data.{name}" for name, split in splits.items())
    raise InputError(
        f"There is no row {row!r} among the {sizes}. Expected a place such as {example!r}, as the report has it, or "
        "the number of the row."
    )
