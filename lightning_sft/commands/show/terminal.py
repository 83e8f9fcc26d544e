"""Documents and findings for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lightning_sft.data.inspect.audit import IN_DETAILS, Finding
from lightning_sft.data.inspect.token_text import Piece
from lightning_sft.machine.terminal import Console

_TARGETS = ("#0c2b1a on #cdeed9", "#0c2b1a on #a5ddbb")  # alternating, to show token boundaries
_SPECIAL_TARGETS = ("bold #6d28d9 on #cdeed9", "bold #6d28d9 on #a5ddbb")
_SPECIAL = "bold magenta"
_LISTED = 100  # rows named below the table of the audit, for each check


def show_document(pieces: Sequence[Piece], title: str, remark: str, console: Console, before: str = "\n") -> None:
    """Print a document token by token: targets highlighted, context dim, control tokens in another color.

    Without colors (a file, a pipe, ``NO_COLOR``), targets are enclosed in « and ». With colors or without, plain text
    that reads like a control token is enclosed in ⟨ and ⟩.

    Args:
        pieces: Pieces of the document.
        title: Title, the provenance of the document.
        remark: Place of the document in the epoch.
        console: Console to print to.
        before: What stands before it: an empty line, but not at the beginning of the output.
    """
    console.print(Text.assemble(before, (title, "bold"), (f"  {remark}", "dim")))
    console.print(_colored(pieces, marks=console.color_system is None))


def show_legend(console: Console, has_lookalikes: bool = False) -> None:
    """Print the meaning of the colors.

    Args:
        console: Console to print to.
        has_lookalikes: Whether plain text that reads like a control token has been shown.
    """
    legend = Text.assemble(
        "\n", (" context ", "dim"), "  ", (" target ", _TARGETS[0]), "  ", ("control token", _SPECIAL)
    )
    if console.color_system is None:
        legend = Text("\nTargets stand between « and ».")
    if has_lookalikes:
        legend.append("  ⟨plain text that reads like a control token⟩")
    console.print(legend.append("  ×2 after targets: their weight, where it is not 1", style="dim"))


def show_audit(findings: Iterable[Finding], console: Console) -> None:
    """Print the table of the audit, and the first rows of each check that fails, but for those that are listed before.

    Rows that are refused, left out or cut are among the details of their split.
    """
    findings = list(findings)
    table = Table("Check", box=SIMPLE_HEAD, header_style="bold")
    for column in ("count", "of", "share", "threshold", "verdict"):
        table.add_column(column, justify="right")
    for finding in findings:
        table.add_row(finding.check, *finding.cells, style=None if finding.passes else "bold red")
    console.print(table)
    for finding in findings:
        if not finding.passes and finding.places and finding.check not in IN_DETAILS:
            places = finding.places[:_LISTED]
            more = f"\n  ... and {finding.count - len(places):,} more" if finding.count > len(places) else ""
            listed = "\n".join(f"  {place}" for place in places)
            console.print(f"{finding.check}:\n{listed}{more}", style="yellow", highlight=False)


def weight_mark(weight: float) -> str:
    """The mark of a weight behind targets; empty for weights 0 and 1."""
    return "" if weight in (0, 1) else f"×{weight:.3g}"


def _colored(pieces: Sequence[Piece], marks: bool) -> Text:
    text = Text()
    for weight, stretch in groupby(pieces, key=lambda piece: piece.weight):
        text.append("«" if marks and weight else "")
        for number, piece in enumerate(stretch):
            grounds = _SPECIAL_TARGETS if piece.is_special else _TARGETS
            context = _SPECIAL if piece.is_special else "dim"
            text.append(piece.text, style=grounds[number % 2] if weight else context)
        text.append("»" if marks and weight else "")
        text.append(weight_mark(weight), style="bold yellow")
    return text
