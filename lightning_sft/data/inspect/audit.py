"""An audit of the whole data set: counts of common problems, checked against thresholds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from lightning_sft.data.inspect.documents import Document
from lightning_sft.data.tokens.dataset import Split
from lightning_sft.data.tokens.examples import Examples
from lightning_sft.data.tokens.not_shown import CALLS_NOT_SHOWN, SYSTEM_NOT_SHOWN, TOOLS_NOT_SHOWN
from lightning_sft.data.tokens.thoughts import UNREAD
from lightning_sft.io.arguments import Fraction, check_arguments

IN_DETAILS = ("refused", "left out for length", "cut")
"""Checks whose rows are listed by :func:`lightning_sft.data.inspect.summary.show_details`."""

_NOT_SHOWN = {TOOLS_NOT_SHOWN: "tools", SYSTEM_NOT_SHOWN: "system turns", CALLS_NOT_SHOWN: "tool calls"}


@dataclass
class Thresholds:
    """Shares between 0 and 1 up to which a data set passes: the section ``check`` of a YAML.

    Args:
        max_refused: Rows that cannot be used, of all rows.
        max_left_out: Sequences left out because they are longer than ``data.max_length``, of all sequences.
        max_cut: Sequences that are cut for it, of all sequences.
        max_no_stop: Sequences with an answer that does not end in a trained stop token.
        max_masked: Sequences without any target.
        max_unknown: Sequences that train the tokenizer's unknown token, where a text has what its vocabulary has not.
        max_not_shown: Rows with tools, a system turn or an earlier tool call that the chat template does not show.
        max_unread: Rows with a thought in an answer that ``data.thoughts`` is to split off or mask, and does not read.
        max_duplicated: Training sequences with the ids of an earlier one.
        max_overlap: Validation sequences with the ids of a training sequence, of all validation sequences.
        max_repeated: Tokens that stand in several sequences of their row, of all training tokens. A chat template that
            rewrites earlier turns needs a sequence for each answer: half of all tokens means twice the work.
        min_targets: Tokens that are trained, of all training tokens.
    """

    max_refused: Fraction = 0.0
    max_left_out: Fraction = 0.01
    max_cut: Fraction = 0.01
    max_no_stop: Fraction = 0.0
    max_masked: Fraction = 0.0
    max_unknown: Fraction = 0.0
    max_not_shown: Fraction = 0.0
    max_unread: Fraction = 0.0
    max_duplicated: Fraction = 0.01
    max_overlap: Fraction = 0.0
    max_repeated: Fraction = 0.5
    min_targets: Fraction = 0.01

    def __post_init__(self) -> None:
        check_arguments(Thresholds, vars(self), "check")


@dataclass
class Finding:
    """One line of the audit.

    Args:
        check: Name of the check.
        limit: The share up to which (or, ``is_least``, from which) it passes.
        count: Number of cases found.
        total: Number of cases examined.
        places: ``file:line`` of the first of them.
        is_least: Whether the share has to reach the limit, and not to stay below it.
    """

    check: str
    limit: float
    count: int = 0
    total: int = 0
    places: list[str] = field(default_factory=list)
    is_least: bool = False

    @property
    def share(self) -> float:
        """Of the total; 0 where there is nothing."""
        return self.count / self.total if self.total else 0.0

    @property
    def passes(self) -> bool:
        """Whether the share is within the limit."""
        return self.share >= self.limit if self.is_least else self.share <= self.limit

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """Count, total, share, threshold and verdict, as they are shown."""
        verdict, bound = "passes" if self.passes else "FAILS", "≥" if self.is_least else "≤"
        return f"{self.count:,}", f"{self.total:,}", f"{self.share:.2%}", f"{bound} {self.limit:.2%}", verdict

    def add(self, is_found: bool, place: str = "") -> None:
        """Count one of the total, and keep its place if it is found."""
        self.total += 1
        if is_found:
            self.count += 1
            self.places.append(place)


def audit(
    train: Iterable[Document],
    val: Iterable[Document],
    splits: Mapping[str, Split],
    special_ids: Iterable[int],
    thresholds: Thresholds,
    unknown_id: int | None = None,
) -> list[Finding]:
    """What is found in the documents of all micro-batches, and among the rows that none of them has.

    Args:
        train: The documents of an epoch.
        val: Documents of the validation.
        splits: Splits by name, with the accounts of their rows.
        special_ids: Control tokens: one of them has to be the last trained token of each answer.
        thresholds: Limits that the shares have to meet.
        unknown_id: Id of the tokenizer's unknown token, if it has one.

    >>> document = Document(torch.tensor([5, 6, 7]), torch.tensor([0.0, 1.0, 1.0]), "a.jsonl:1")
    >>> [(f.check, f.share) for f in audit([document] * 2, [], {}, [7], Thresholds()) if f.count]
    [('duplicated', 0.5), ('target tokens', 0.6666666666666666)]
    """
    refused = Finding("refused", thresholds.max_refused)
    left_out, cut = Finding("left out for length", thresholds.max_left_out), Finding("cut", thresholds.max_cut)
    noted = {note: Finding(f"{what} not shown", thresholds.max_not_shown) for note, what in _NOT_SHOWN.items()}
    noted[UNREAD] = Finding("thoughts not read", thresholds.max_unread)
    repeated = Finding("repeated tokens", thresholds.max_repeated)
    for split in splits.values():
        account = split.account
        repeated.count += repeated_tokens(split.examples)
        repeated.total += int(split.lengths.sum())
        for note, finding in noted.items():
            finding.count += account.notes[note]
            finding.total += account.num_rows
            finding.places += account.noted.get(note, [])
        refused.places += account.refused
        refused.total += account.num_rows
        for finding, places in ((left_out, account.too_long), (cut, account.cut)):
            finding.places += places
            finding.total += len(account.too_long) + len(split.examples)
    for finding in (refused, left_out, cut):
        finding.count = len(finding.places)
    stop = torch.tensor(sorted(special_ids))
    no_stop = Finding("no trained stop token", thresholds.max_no_stop)
    masked = Finding("no target at all", thresholds.max_masked)
    unknown = Finding("unknown token trained", thresholds.max_unknown)
    duplicated = Finding("duplicated", thresholds.max_duplicated)
    overlap = Finding("validation rows in training", thresholds.max_overlap)
    targets = Finding("target tokens", thresholds.min_targets, is_least=True)
    seen: dict[bytes, str] = {}
    for documents, is_training in ((train, True), (val, False)):
        for document in documents:
            digest = hashlib.blake2b(document.input_ids.numpy().tobytes(), digest_size=16).digest()
            first = seen.get(digest)
            (duplicated if is_training else overlap).add(first is not None, f"{document.provenance} (repeats {first})")
            unknown.add(_trains(document, unknown_id), document.provenance)
            masked.add(document.num_targets == 0, document.provenance)
            no_stop.add(not _stops(document, stop), document.provenance)
            if is_training:
                seen.setdefault(digest, document.provenance)
                targets.count += document.num_targets
                targets.total += len(document)
    of_rows, of_sequences = [refused, *noted.values(), left_out, cut], [no_stop, masked, unknown, duplicated]
    return [*of_rows, *of_sequences, overlap, repeated, targets]


def repeated_tokens(examples: Examples) -> int:
    """Tokens of the sequences of a row beyond its longest sequence; pieces of a text that was split repeat nothing.

    >>> from lightning_sft.data.tokens.examples import to_record_batch
    >>> from lightning_sft.types import Example
    >>> rows = [Example([5] * 4, [0] * 4, "a:1"), Example([5] * 6, [0] * 6, "a:1", 1), Example([5] * 3, [0] * 3, "a:2")]
    >>> repeated_tokens(Examples([to_record_batch(rows)]))
    4
    """
    if not len(examples):
        return 0
    begins = np.append(0, np.cumsum(examples.sequences_per_row)[:-1])
    before = np.concatenate([batch.column("answers_before").to_numpy() for batch in examples.batches])
    is_new = np.append(True, before[1:] != before[:-1])
    is_new[begins] = True
    sequences = np.add.reduceat(examples.lengths, np.flatnonzero(is_new))  # pieces of one together
    longest = np.maximum.reduceat(sequences, (np.cumsum(is_new) - 1)[begins])
    return int(sequences.sum() - longest.sum())


def _trains(document: Document, token: int | None) -> bool:
    return token is not None and bool(((document.input_ids == token) & (document.target_weights > 0)).any())


def _stops(document: Document, stop: torch.Tensor) -> bool:
    """Whether each stretch of targets ends in a stop token."""
    is_target = document.target_weights > 0
    is_last = is_target & ~torch.cat([is_target[1:], is_target.new_zeros(1)])
    return bool(torch.isin(document.input_ids[is_last], stop).all())
