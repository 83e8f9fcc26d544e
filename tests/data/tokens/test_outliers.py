from __future__ import annotations

import pytest

from lightning_sft.data.batches.plan import Division
from lightning_sft.data.batches.split_plan import SplitPlan
from lightning_sft.data.inspect.summary import show_report
from lightning_sft.data.tokens.dataset import load_split
from lightning_sft.data.tokens.encode_rows import EncodingConfig
from lightning_sft.data.tokens.outliers import outlier_remark, outliers
from lightning_sft.demos import tiny_tokenizer


@pytest.mark.parametrize(
    ("lengths", "found"),
    [
        ([100] * 50 + [401], [50]),
        ([100] * 50 + [400], []),
        ([100] * 10 + [7000], []),  # too few to tell
        ([7000, *[100] * 200, 9000], [201, 0]),
        ([100] * 50 + [1000] * 20, []),  # a second kind of rows
        ([10] * 60 + [30] * 60 + [90, 360 + 1], [121]),
        ([], []),
    ],
)
def test_outliers_are_few_and_several_times_as_long_as_any_other(lengths: list[int], found: list[int]) -> None:
    assert outliers(lengths).tolist() == found


def test_what_is_said_names_the_place_the_length_and_the_remedy() -> None:
    said = outlier_remark([131] * 300 + [7237, 5000], lambda index: f"a.jsonl:{index + 1}")
    assert said is not None
    assert said.startswith(
        "2 of 302 sequences are far longer than the others, which have at most 131 tokens: a.jsonl:301 has 7,237."
    )
    assert "data.max_length=131" in said


@pytest.mark.parametrize(("tokens", "is_said"), [(None, True), (4000, False)])
def test_the_report_names_an_outlier_that_decides_the_size_of_a_micro_batch(
    tokens: int | None, is_said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "a", "completion": "b" * (3000 if i == 40 else 9)} for i in range(80)]
    split = load_split("train", rows, EncodingConfig(tiny_tokenizer()))
    show_report({"train": split}, SplitPlan.of(split, Division(), tokens_per_batch=tokens, seed=0))
    assert ("row 41 has 3,0" in capsys.readouterr().out) is is_said
