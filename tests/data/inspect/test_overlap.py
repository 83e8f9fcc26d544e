"""A fit says in one line that its validation data are training data."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.data.inspect.overlap import overlap
from lightning_sft.data.tokens.dataset import Split
from lightning_sft.data.tokens.examples import Examples, to_record_batch
from lightning_sft.types import Example
from tests.helpers.gradients import ROWS


def split(name: str, rows: Any) -> Split:
    """A split with these rows of ids."""
    examples = [
        Example(list(map(int, ids)), [0.0] + [1.0] * (len(ids) - 1), f"{name}:{i}") for i, ids in enumerate(rows)
    ]
    return Split(
        name,
        Examples([to_record_batch(examples[: len(examples) // 2]), to_record_batch(examples[len(examples) // 2 :])]),
    )


def said(train: Any, val: Any) -> str:
    return overlap({"train": split("train", train), "val": split("val", val)})


def test_the_share_of_the_validation_in_the_training_is_said() -> None:
    rows = np.random.default_rng(0).integers(0, 1000, (1200, 7))
    assert said(rows[:600], rows[600:]) == ""
    assert said(rows[:600], rows[590:690]).startswith("val: 10% of its sequences are also in the training")
    assert said(rows[:600], rows[595:695]) == ""  # a few are no mistake
    assert said(rows, rows[::-1]).startswith("val: 100% of its")
    assert said(rows, rows[:, :6]) == ""
    assert overlap({"train": split("train", rows[:8])}) == ""


def test_large_data_are_sampled() -> None:
    rows = np.random.default_rng(0).integers(0, 1000, (60_000, 3))
    splits = {"train": split("train", rows), "val": split("val", rows)}
    begin = time.perf_counter()
    found = overlap(splits)
    assert time.perf_counter() - begin < 2  # a quarter of a second alone
    assert "at least of its sequences" in found


@pytest.mark.parametrize(
    ("val", "is_said"), [("train.jsonl", True), ("val.jsonl", False), ("20%", False), (None, False)]
)
def test_a_fit_on_its_own_validation_data_says_it(
    pretrained: str, jsonl: Any, quiet_trainer: Any, val: Any, is_said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    train, other = jsonl(ROWS), jsonl([{"prompt": "another", "completion": "row"}], "val.jsonl")
    given = {"train.jsonl": train, "val.jsonl": other}.get(val, val)
    quiet_trainer().fit(SFTModule(pretrained), SFTDataModule(train, given, cache=None))
    assert ("val: 100% of its sequences are also in the training" in capsys.readouterr().out) == is_said
