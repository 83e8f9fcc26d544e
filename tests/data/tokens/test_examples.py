from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft.data.tokens.examples import Examples, save, to_record_batch
from lightning_sft.types import Example

EXAMPLE = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.sampled_from([0.0, 1.0, 1 / 3, 5e-324])), min_size=1).map(
    lambda pairs: Example([i for i, _ in pairs], [w for _, w in pairs], "a.jsonl:1")
)


@given(st.lists(st.lists(EXAMPLE, max_size=4), max_size=4))
def test_examples_come_back_to_the_bit_from_any_batches(batches: list[list[Example]]) -> None:
    columns, wanted = Examples([to_record_batch(batch) for batch in batches]), [e for batch in batches for e in batch]
    assert len(columns) == len(wanted)
    for got, example in zip(columns, wanted, strict=True):
        assert list(got.input_ids) == example.input_ids
        assert list(got.target_weights) == example.target_weights
    assert columns.lengths.tolist() == [len(e) for e in wanted]
    assert columns.num_targets.tolist() == [sum(w > 0 for w in e.target_weights) for e in wanted]
    np.testing.assert_allclose(columns.weights, [sum(e.target_weights) for e in wanted], rtol=1e-12)


def test_rows_that_gave_several_sequences_are_counted_once() -> None:
    examples = Examples([to_record_batch([Example([1], [0.0], name) for name in part]) for part in ("aab", "ccc", "d")])
    assert examples.sequences_per_row.tolist() == [2, 1, 3, 1]
    assert examples.shares_of_row.tolist() == pytest.approx([1 / 2, 1 / 2, 1, 1 / 3, 1 / 3, 1 / 3, 1])
    assert Examples([]).sequences_per_row.tolist() == []


def test_indices_are_those_of_a_list() -> None:
    examples = Examples([to_record_batch([Example([i], [0.0])]) for i in range(4)])
    assert [examples[i].input_ids[0] for i in (0, 3, -1, -4)] == [0, 3, 3, 0]
    assert [e.input_ids[0] for e in examples[1:3]] == [1, 2]
    with pytest.raises(IndexError):
        examples[4]


def test_a_file_of_examples_is_read_by_datasets_too(tmp_path: Path) -> None:
    save(
        [to_record_batch([Example([5, 6], [0.0, 1.0], "a:1")]), to_record_batch([Example([7], [0.0], "a:2")])],
        tmp_path / "x.arrow",
    )
    assert [list(e.input_ids) for e in Examples.open(tmp_path / "x.arrow")] == [[5, 6], [7]]
    assert Dataset.from_file(str(tmp_path / "x.arrow"))["input_ids"][:] == [[5, 6], [7]]
