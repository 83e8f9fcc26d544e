"""The report counts every row, and prints the text of users as it is."""

from __future__ import annotations

from collections import Counter
from io import StringIO
from itertools import pairwise

import pytest

from lightning_sft.data.batches.packing import pack
from lightning_sft.data.batches.plan import Division, EpochPlan
from lightning_sft.data.batches.split_plan import SplitPlan
from lightning_sft.data.inspect.summary import by_reason, counts, histogram, show_details, show_report
from lightning_sft.data.tokens.dataset import Split
from lightning_sft.data.tokens.examples import Examples, to_record_batch
from lightning_sft.data.tokens.row_report import RowReport
from lightning_sft.machine.terminal import Console
from lightning_sft.types import Example

EXAMPLES = [Example([1, 2, 3], [0, 1, 1], "a:1"), Example([1, 2], [0, 1], "a:2"), Example([1, 4], [0, 1], "a:2")]
SPLIT = Split(
    "train",
    Examples([to_record_batch(EXAMPLES)]),
    RowReport(
        num_rows=5,
        refused=["a:3: turn 2: [/bold] is 'x'", "a:4: turn 4: [/bold] is 'x'"],
        too_long=["a:5 (99 tokens)"],
        ignored=Counter({"[id]": 3}),
    ),
)


def test_a_trial_of_a_few_steps_gets_no_advice_to_have_more(capsys: pytest.CaptureFixture[str]) -> None:
    plan = SplitPlan.of(SPLIT, Division(), "packed", 100)
    for is_trial in (False, True):
        show_report({"train": SPLIT}, plan, is_trial)
        assert ("So few optimizer steps" in capsys.readouterr().out) is not is_trial


def printed(split: Split) -> str:
    console = Console(file=(out := StringIO()), width=80)
    show_details(split, console)
    return out.getvalue()


def test_every_row_is_accounted_for() -> None:
    assert counts(SPLIT) == {
        "rows": "5",
        "refused": "2",
        "left out": "1",
        "cut": "0",
        "expanded": "1",
        "sequences": "3",
        "tokens": "7",
        "targets": "4 (57%)",
        "longest": "3",
    }


def test_how_many_times_as_many_tokens_expansion_makes_is_said() -> None:
    rows = [Example([1] * n, [0] * n, "a:1", before) for before, n in enumerate((2, 4, 6))]
    assert counts(Split("train", Examples([to_record_batch(rows)])))["expanded"] == "1 (×2.0 tokens)"


def test_refusals_are_together_by_reason_with_their_places_and_markup_is_text() -> None:
    text = printed(SPLIT)
    assert "2 refused: turn 2 or another: [/bold] is 'x'\n  a:3, a:4" in text
    assert "1 left out, longer than data.max_length\n  a:5 (99 tokens)" in text
    assert "3 rows have the key '[id]', which is ignored" in text
    assert "Targets per sequence: minimum 1, median 1, maximum 2." in text


def test_many_places_are_cut_and_counted() -> None:
    text = printed(Split("train", SPLIT.examples, RowReport(refused=[f"a:{i}: no" for i in range(50)])))
    assert "a:19 and 30 more" in text.replace("\n", " ")


def test_a_path_may_have_a_colon_and_a_reason_may_have_none() -> None:
    assert by_reason(["C:/a.jsonl:3: no: text", "nothing known"]) == [
        ("no: text", ["C:/a.jsonl:3"]),
        ("nothing known", ["?"]),
    ]


def test_the_histogram_has_every_length_once() -> None:
    lengths = [1, 1, 7, 100, 1000]
    bins = histogram(lengths)
    assert sum(count for _, _, count in bins) == len(lengths)
    assert all(high + 1 == low for (_, high, _), (low, _, _) in pairwise(bins))
    assert histogram([5, 5]) == [(5, 5, 2)]


def test_the_fill_is_the_share_of_positions_that_a_token_takes() -> None:
    plan = EpochPlan(SPLIT.lengths, SPLIT.examples.weights, lambda lengths: pack(lengths, 4))
    assert SplitPlan(SPLIT, plan, 4, "packed").fill == 7 / 8
    assert "2 optimizer steps" in str(SplitPlan(SPLIT, plan, 4, "packed"))


@pytest.mark.parametrize(
    ("num_packs", "ranks", "accumulate", "said"),
    [
        (
            28,
            1,
            1000,
            "1 optimizer step of 28 packed micro-batches of at most 4 tokens (100% full), filled up to 1,000 ",
        ),
        (28, 2, 7, "2 optimizer steps of 14 packed micro-batches of at most 4 tokens (100% full)."),
        (10, 2, 2, "3 optimizer steps of 3 or 4 packed micro-batches of at most 4 tokens (100% full), filled up to 4 "),
        (1, 1, 1, "1 optimizer step of 1 packed micro-batch of at most 4 tokens (100% full)."),
    ],
)
def test_a_plan_says_how_many_micro_batches_of_a_step_hold_a_sequence(
    num_packs: int, ranks: int, accumulate: int, said: str
) -> None:
    examples = [Example([1, 2, 3, 4], [0, 1, 1, 1], f"a:{number}") for number in range(num_packs)]
    split = Split("train", Examples([to_record_batch(examples)]), RowReport(num_rows=num_packs))
    plan = SplitPlan.of(split, Division(num_ranks=ranks, accumulate=accumulate), tokens_per_batch=4, seed=0)
    held = [
        sum(bool(plan.plan.micro_batches(0, rank)[number].examples) for rank in range(ranks) for number in numbers)
        for numbers in (range(step * accumulate, (step + 1) * accumulate) for step in range(plan.plan.num_steps))
    ]
    assert f"An epoch: {said}" in f"{plan}"
    assert f" of {' or '.join(map(str, sorted(set(held))))} packed" in f"{plan}"


def test_an_epoch_of_few_steps_is_remarked(capsys: pytest.CaptureFixture[str]) -> None:
    for count, is_remarked in ((9, True), (10, False)):
        split = Split(
            "train", Examples([to_record_batch([Example([1, 2, 3], [0, 1, 1])] * count)]), RowReport(num_rows=count)
        )
        show_report({"train": split}, SplitPlan.of(split, Division(), tokens_per_batch=3, seed=0))
        assert ("So few optimizer steps" in capsys.readouterr().out) == is_remarked


def test_different_causes_are_different_groups_and_thousands_of_them_are_few() -> None:
    keys = ["k:1: turn 1: the keys ['mood'] have no meaning", "k:2: turn 4: the keys ['verdict'] have no meaning"]
    assert [places for _, places in by_reason(keys)] == [["k:1"], ["k:2"]]
    cells = [f"k:{i}: the row has {i % 2} cells, the header 2." for i in range(5)]
    assert by_reason(cells) == [
        ("the row has 0 cells, the header 2.", ["k:0", "k:2", "k:4"]),
        ("the row has 1 cells, the header 2.", ["k:1", "k:3"]),
    ]
    groups = by_reason([f"k:{i}: 'prompt' must be a string, got int {i}." for i in range(3000)])
    assert len(groups) == 6
    assert sum(len(places) for _, places in groups) == 3000
    assert groups[0][0] == "'prompt' must be a string, got int 5. (one of 2,995 such reasons)"
