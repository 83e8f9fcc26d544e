"""The page of ``lightning-sft show --html``: one self-contained file that works offline."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from lightning_sft.data.batches.split_plan import SplitPlan
from lightning_sft.data.inspect.audit import Finding
from lightning_sft.data.inspect.summary import by_reason, counts, histogram, targets_in_words
from lightning_sft.data.inspect.token_text import Piece
from lightning_sft.data.tokens.dataset import Split

_TEMPLATE, _STYLE = Path(__file__).with_name("show.html"), Path(__file__).parents[1] / "page.css"
_LISTED = 200  # rows listed per reason


def write_page(
    path: str | Path,
    documents: Iterable[tuple[str, str, Sequence[Piece]]],
    splits: Mapping[str, Split],
    train: SplitPlan,
    tokenizer: str,
    findings: Iterable[Finding] = (),
) -> None:
    """Write the page.

    Args:
        path: Path of the HTML file.
        documents: Provenance, remark and pieces of each document on the page.
        splits: Splits by name.
        train: Training split with its epoch plan.
        tokenizer: Name or path of the tokenizer.
        findings: Findings of the audit, if there was one.
    """
    data = {
        "epoch": str(train),
        "counts": {"steps an epoch": f"{train.plan.num_steps:,}", "full": f"{train.fill:.0%}"},
        "mixture": train.mixture,
        "tokenizer": tokenizer,
        "splits": {name: counts(split) for name, split in splits.items()},
        "histogram": histogram(train.split.lengths, num_bins=24),
        "total": len(train.split.examples),
        "targets": targets_in_words(train.split),
        "remarks": [remark for name, split in splits.items() for remark in _remarks(name, split)],
        "checks": [[f.check, *f.cells, f.passes, f.places[:_LISTED]] for f in findings],
        **_compact(documents),
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    style = _STYLE.read_text(encoding="utf-8")
    page = _TEMPLATE.read_text(encoding="utf-8").replace("{{ style }}", style).replace("{{ data }}", escaped(text))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(page, encoding="utf-8")


def escaped(text: str) -> str:
    r"""Escape ``<`` in JSON, where it occurs only in strings, as ``\u003c``, so that no HTML parser finds a tag.

    >>> escaped('["</script>"]')
    '["\\u003c/script>"]'
    """
    return text.replace("<", "\\u003c")


def _compact(documents: Iterable[tuple[str, str, Sequence[Piece]]]) -> dict[str, Any]:
    """Distinct pieces, and each document as indices of pieces with run-length encoded weights."""
    numbers: dict[tuple[str, tuple[int, ...], bool], int] = {}
    rows = []
    for where, remark, pieces in documents:
        own = [numbers.setdefault((p.text, p.ids, p.is_special), len(numbers)) for p in pieces]
        runs = [(len(list(run)), weight) for weight, run in groupby(piece.weight for piece in pieces)]
        rows.append({"where": where, "remark": remark, "pieces": own, "weights": runs})
    return {"pieces": list(numbers), "rows": rows}


def _remarks(name: str, split: Split) -> Iterator[tuple[str, int, Sequence[str]]]:
    """Rows that are not used as they are: reason, count, and the places of the first ones."""
    account = split.account
    lengths = {"longer than data.max_length": account.too_long, "cut at data.max_length": account.cut}
    for reason, places in [*by_reason(account.refused), *lengths.items()]:
        if places:
            yield f"{name}: {reason}", len(places), places[:_LISTED]
    for key, count in account.ignored.most_common():
        yield f"{name}: the key {key!r}, which is ignored", count, []
    for what, count in account.notes.most_common():
        yield f"{name}: {what}", count, account.noted[what]
