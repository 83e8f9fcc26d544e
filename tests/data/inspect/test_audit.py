"""Each thing that goes wrong is counted, and its place is kept."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from lightning_sft.commands.show.terminal import show_audit
from lightning_sft.data.inspect.audit import Finding, Thresholds, audit, repeated_tokens
from lightning_sft.data.inspect.documents import Document
from lightning_sft.data.tokens.dataset import Split
from lightning_sft.data.tokens.examples import Examples, to_record_batch
from lightning_sft.data.tokens.row_report import RowReport
from lightning_sft.data.tokens.thoughts import UNREAD
from lightning_sft.machine.terminal import Console
from lightning_sft.types import Example, InputError

STOP = 9


def document(ids: list[int], weights: list[float], place: str = "a.jsonl:1") -> Document:
    return Document(torch.tensor(ids), torch.tensor(weights), place)


GOOD = document([5, 6, STOP], [0, 1, 1])


def findings(*train: Document, val: Any = (), unknown_id: int | None = None, **limits: float) -> dict[str, Finding]:
    examples = Examples([to_record_batch([Example([5], [0], f"a.jsonl:{n}") for n in (1, 4, 5)])])
    account = RowReport(num_rows=10, refused=["a.jsonl:2: no"], too_long=["a.jsonl:3 (9)"])
    account.note("the chat template does not show the tools", "a.jsonl:1")
    found = audit(train, val, {"train": Split("train", examples, account)}, [STOP], Thresholds(**limits), unknown_id)
    return {finding.check: finding for finding in found}


def test_rows_that_no_micro_batch_has_are_counted() -> None:
    found = findings(GOOD)
    assert found["refused"].cells == ("1", "10", "10.00%", "≤ 0.00%", "FAILS")
    assert found["left out for length"].cells == ("1", "4", "25.00%", "≤ 1.00%", "FAILS")


@pytest.mark.parametrize(
    ("bad", "check"),
    [
        (document([5, 6, 7], [0, 1, 1], "b:1"), "no trained stop token"),
        (document([5, 8, STOP], [0, 1, 0], "b:1"), "no trained stop token"),
        (document([5, 6, 5, STOP], [0, 1, 0, 1], "b:1"), "no trained stop token"),  # the first answer of two
        (document([5, 7, STOP], [0, 0, 0], "b:1"), "no target at all"),
        (document([5, 6, STOP], [0, 1, 1], "b:1"), "duplicated"),
    ],
)
def test_a_bad_document_is_found_and_named(bad: Document, check: str) -> None:
    found = findings(GOOD, bad)
    places = ["b:1 (repeats a.jsonl:1)" if check == "duplicated" else "b:1"]
    assert (found[check].count, found[check].total, found[check].places) == (1, 2, places)
    others = {"no trained stop token", "no target at all", "duplicated"} - {check}
    assert not any(found[other].count for other in others)


def test_validation_rows_in_training_are_found() -> None:
    other = document([5, 8, STOP], [0, 1, 1], "val:2")
    found = findings(GOOD, val=[document([5, 6, STOP], [0, 1, 1], "val:1"), other, other])
    assert (found["validation rows in training"].share, found["validation rows in training"].places) == (
        1 / 3,
        ["val:1 (repeats a.jsonl:1)"],
    )
    assert found["duplicated"].total == 1  # of the training data alone


def test_an_unknown_token_that_is_trained_is_found() -> None:
    context, target = document([1, 6, STOP], [0, 1, 1], "b:1"), document([5, 1, STOP], [0, 1, 1], "b:2")
    found = findings(GOOD, context, target, unknown_id=1)["unknown token trained"]
    assert (found.count, found.total, found.places, found.passes) == (1, 3, ["b:2"], False)
    assert not findings(GOOD, target)["unknown token trained"].count  # the vocabulary has none


def test_tools_that_the_template_does_not_show_are_found() -> None:
    found = findings(GOOD)
    assert found["tools not shown"].cells == ("1", "10", "10.00%", "≤ 0.00%", "FAILS")
    assert found["tools not shown"].places == ["a.jsonl:1"]
    assert found["system turns not shown"].passes
    assert findings(GOOD, max_not_shown=0.1)["tools not shown"].passes


def test_all_rows_of_a_note_are_named_up_to_a_number() -> None:
    account = RowReport(num_rows=500)
    for part in range(5):
        own = RowReport()
        for row in range(part * 100, part * 100 + 100):
            own.note(UNREAD, f"a.jsonl:{row}")
        account.add(own)
    split = Split("train", Examples([to_record_batch([Example([5], [0], "a.jsonl:1")])]), account)
    found = {f.check: f for f in audit([GOOD], [], {"train": split}, [STOP], Thresholds())}["thoughts not read"]
    assert (found.count, found.passes) == (500, False)
    assert found.places == [f"a.jsonl:{row}" for row in range(200)]
    printed = io.StringIO()
    show_audit([found], Console(file=printed, width=200))
    assert "a.jsonl:99\n  ... and 400 more" in printed.getvalue()


def test_what_is_repeated_in_several_sequences_of_a_row_is_counted() -> None:
    rows = [Example([5] * n, [0] * n, "a:1", before) for before, n in enumerate((2, 4, 6))]  # three answers
    rows += [Example([5] * 9, [0] * 9, "a:2"), Example([5] * 9, [0] * 9, "a:2")]  # a text that was split
    assert repeated_tokens(Examples([to_record_batch(rows[:2]), to_record_batch(rows[2:])])) == 6
    split = Split("train", Examples([to_record_batch(rows)]))
    found = {f.check: f for f in audit([GOOD], [], {"train": split}, [STOP], Thresholds(max_repeated=0.2))}
    assert (found["repeated tokens"].count, found["repeated tokens"].total) == (6, 30)
    assert found["repeated tokens"].passes


def test_a_share_at_its_threshold_passes() -> None:
    assert findings(GOOD, max_refused=0.1)["refused"].passes
    assert not findings(GOOD, max_refused=0.09)["refused"].passes
    assert findings(GOOD, min_targets=2 / 3)["target tokens"].passes
    assert not findings(GOOD, min_targets=0.7)["target tokens"].passes


@pytest.mark.parametrize("value", [-0.1, 5])
def test_a_threshold_is_a_share(value: float) -> None:
    with pytest.raises(InputError, match=r"check.max_masked is .*; expected a number >= 0 and <= 1"):
        Thresholds(max_masked=value)
