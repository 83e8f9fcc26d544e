"""What is going to be trained on, as a table."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from lightning_sft.data.dataset import Split
from lightning_sft.data.plan import Plan


def show_report(splits: Mapping[str, Split], plan: Plan, capacity: int, packing: str) -> None:
    """Print the account of all splits and the plan of the training epochs.

    Args:
        splits: What was read.
        plan: The plan of the training split.
        capacity: Most positions in a micro-batch.
        packing: How they are filled.
    """
    table = Table(title="Data", title_justify="left", title_style="bold")
    for column in ("", "rows", "not used", "sequences", "tokens", "targets", "longest"):
        table.add_column(column, justify="left" if not column else "right")
    for name, split in splits.items():
        tokens, targets = sum(split.lengths), split.num_targets
        cells = (split.num_rows, len(split.refused) + len(split.too_long), len(split.examples), tokens)
        share = f"{targets:,} ({targets / tokens:.0%})"
        table.add_row(name, *(f"{cell:,}" for cell in cells), share, f"{max(split.lengths):,}")
    console = Console(soft_wrap=True)
    console.print(table)
    fill = sum(splits["train"].lengths) / (len(plan.packs) * capacity)
    console.print(
        f"An epoch: {plan.num_steps:,} optimiser steps of {plan.num_ranks * plan.accumulate} {packing} micro-batches "
        f"of at most {capacity:,} tokens ({fill:.0%} full)."
    )
    for remark in (remark for split in splits.values() for remark in split.remarks()):
        console.print(f"[yellow]{remark}[/yellow]")
