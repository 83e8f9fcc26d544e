"""Summary tables of the training data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lightning_sft.data.batches.split_plan import SplitPlan
from lightning_sft.data.inspect.audit import repeated_tokens
from lightning_sft.data.inspect.overlap import overlap
from lightning_sft.data.tokens.dataset import Split
from lightning_sft.data.tokens.row_report import RowReport
from lightning_sft.io.words import counted, listed
from lightning_sft.machine.terminal import Console

_PLACE = re.compile(r"((?:shard \d+, )?row \d+|.+?:(?:\d+|(?:shard \d+, )?row \d+)): (.*)", re.DOTALL)
_TURN = re.compile(r"^turn (\d+): ")
_ALIKE = 5  # reasons that differ in names and numbers alone, each by itself
_LISTED = 20  # rows named for a reason
_FEW_STEPS = 10  # of an epoch
_BAR = 40  # characters of the longest bar


def show_report(splits: Mapping[str, Split], train: SplitPlan, is_trial: bool = False) -> None:
    """Print the account of all splits and the plan of the training epochs.

    Args:
        splits: Splits by name.
        train: Plan of the training data.
        is_trial: Whether a few steps are all that is wanted.
    """
    console = Console(soft_wrap=True)
    show_counts(splits, train, console)
    remarks = [remark for name, split in splits.items() for remark in split.account.remarks(name)]
    if train.plan.num_steps < _FEW_STEPS and not is_trial:
        remarks.append(
            "So few optimizer steps change a model little. Lower trainer.accumulate_grad_batches or "
            "data.tokens_per_batch for more of them, or raise trainer.max_epochs."
        )
    if found := overlap(splits):
        remarks.append(found)
    if train.outliers:
        remarks.append(f"train: {train.outliers}")
    for remark in remarks:
        console.print(remark, style="yellow", highlight=False)


def show_counts(splits: Mapping[str, Split], train: SplitPlan, console: Console) -> None:
    """Print the statistics of all splits, of the mixture, and of the training epochs."""
    console.print(table_of(splits))
    if mixture := train.mixture:
        console.print(_table(*mixture))
    console.print(str(train), highlight=False)


def show_stream_report(account: RowReport, targets: Mapping[str, int]) -> None:
    """Print the account of the rows read from a stream in an epoch, and the shares of its data sets."""
    console = Console(soft_wrap=True)
    rows, trained = counted(account.num_rows, "row"), counted(sum(targets.values()), "target")
    console.print(f"Read of the stream: {rows}, {trained}.", highlight=False)
    if len(targets) > 1:
        shares = ", ".join(f"{name} {count / sum(targets.values()):.1%}" for name, count in targets.items())
        console.print(f"Shares of the targets: {shares}", highlight=False)
    for remark in account.remarks("train"):
        console.print(remark, style="yellow", highlight=False)


def show_details(split: Split, console: Console) -> None:
    """Print how long the sequences of a split are, how much of them is trained, and each row that is not used."""
    console.print(f"\nLengths in {split.name}, in tokens", style="bold")
    bins = histogram(split.lengths)
    most, width = max(count for _, _, count in bins), len(f"{bins[-1][1]:,}")
    for low, high, count in bins:
        bar = "█" * -(-count * _BAR // most)
        console.print(Text.assemble(f"  {low:>{width},}–{high:<{width},} ", (bar, "green"), f" {count:,}"))
    console.print(targets_in_words(split), highlight=False)
    account = split.account
    for reason, places in by_reason(account.refused):
        console.print(f"\n{len(places):,} refused: {reason}", style="yellow", highlight=False)
        console.print(f"  {listed(places, _LISTED)}", highlight=False)
    for what, places in (("left out", account.too_long), ("cut", account.cut)):
        if places:
            console.print(f"\n{len(places):,} {what}, longer than data.max_length", style="yellow", highlight=False)
            console.print(f"  {listed(places, _LISTED)}", highlight=False)
    for key, count in account.ignored.most_common():
        rows = counted(count, "row", "have")
        console.print(f"\n{rows} the key {key!r}, which is ignored", style="yellow", highlight=False)
    for what, count in account.notes.most_common():
        console.print(f"\n{counted(count, 'row')}: {what}", style="yellow", highlight=False)
        console.print(f"  the first is {account.noted[what][0]}", highlight=False)


def table_of(splits: Mapping[str, Split]) -> Table:
    """The account of the splits, side by side."""
    columns = [counts(split) for split in splits.values()]
    return _table(["Data", *splits], *([name, *(column[name] for column in columns)] for name in columns[0]))


def counts(split: Split) -> dict[str, str]:
    """The account of a split, as it is shown. A row is expanded when it gives more than one sequence.

    Beside the number of such rows stands how many times as many tokens that makes as their longest sequences have.
    """
    tokens, account = int(split.lengths.sum()), split.account
    counts = {
        "rows": account.num_rows,
        "refused": len(account.refused),
        "left out": len(account.too_long),
        "cut": len(account.cut),
        "expanded": int((split.examples.sequences_per_row > 1).sum()),
        "sequences": len(split.examples),
        "tokens": tokens,
        "targets": split.num_targets,
        "longest": max(split.lengths),
    }
    shown = {name: f"{count:,}" for name, count in counts.items()}
    if repeated := repeated_tokens(split.examples):
        shown["expanded"] += f" (×{tokens / (tokens - repeated):.1f} tokens)"
    return shown | {"targets": f"{shown['targets']} ({counts['targets'] / tokens:.0%})"}


def targets_in_words(split: Split) -> str:
    """How many tokens of a sequence are trained."""
    counts = split.examples.num_targets
    least, middle, most = counts.min(), np.median(counts), counts.max()
    return f"Targets per sequence: minimum {least:,}, median {middle:,g}, maximum {most:,}."


def histogram(lengths: Sequence[int] | NDArray[np.int64], num_bins: int = 12) -> list[tuple[int, int, int]]:
    """Bins of equal width as (shortest, longest, how many), from the shortest length to the longest.

    >>> histogram([3, 4, 4, 9], num_bins=3)
    [(3, 5, 3), (6, 8, 0), (9, 11, 1)]
    """
    low, high = int(min(lengths)), int(max(lengths))
    width = -(-(high - low + 1) // num_bins)
    counts = Counter(((np.asarray(lengths) - low) // width).tolist())
    return [(low + i * width, low + (i + 1) * width - 1, counts[i]) for i in range((high - low) // width + 1)]


def place_of(text: str) -> str:
    """The place that begins a refusal, or stands before the length of a sequence; empty where there is none.

    >>> place_of("a.jsonl:3: turn 2: no text"), place_of("row 3: no text"), place_of("a.jsonl:3 (99 tokens)")
    ('a.jsonl:3', 'row 3', 'a.jsonl:3')
    """
    found = _PLACE.match(text)
    return found[1] if found else text.rpartition(" (")[0]


def by_reason(refused: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Refusals in groups, most frequent first: a text, and every place.

    Those that differ in the number of the turn alone are one group. Of those that differ in names and numbers, the few
    most frequent are groups of their own, and all others together: else rows with texts in them would be thousands.

    >>> by_reason(["a.jsonl:3: turn 2: no text", "a.jsonl:7: turn 4: no text", "row 1: no 'x'", "row 2: no 'y'"])
    [('turn 2 or another: no text', ['a.jsonl:3', 'a.jsonl:7']), ("no 'x'", ['row 1']), ("no 'y'", ['row 2'])]
    """
    kinds: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for text in refused:
        found = _PLACE.match(text)
        place, reason = found.groups() if found else ("?", text)
        own = _TURN.sub("", reason)
        kinds.setdefault(re.sub(r"'[^']*'|\d+", "", own), {}).setdefault(own, []).append((place, reason))
    groups = []
    for kind in kinds.values():
        own_first = sorted(kind.values(), key=lambda rows: -len(rows))
        few, others = own_first[:_ALIKE], own_first[_ALIKE:]
        groups += [(_in_common(rows), [place for place, _ in rows]) for rows in few]
        if others:
            more = f" (one of {len(others):,} such reasons)" if len(others) > 1 else ""
            groups.append((f"{_in_common(others[0])}{more}", [place for rows in others for place, _ in rows]))
    return sorted(groups, key=lambda group: -len(group[1]))


def _in_common(rows: Sequence[tuple[str, str]]) -> str:
    """The reason of rows, which may differ in the number of the turn."""
    reason = rows[0][1]
    return reason if all(own == reason for _, own in rows) else _TURN.sub(r"turn \1 or another: ", reason)


def _table(head: Sequence[str], *rows: Sequence[str]) -> Table:
    table = Table(*head, box=SIMPLE_HEAD, header_style="bold")
    for row in rows:
        table.add_row(*row)
    for column in table.columns[1:]:
        column.justify = "right"
    return table
