"""Rows that a program has in memory are read as a list of them is, or refused with how to make one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import ConcatDataset, Dataset, Subset

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.data.rows.mixture import Mixture
from lightning_sft.data.rows.sources import as_rows, leaves, read
from lightning_sft.types import InputError
from tests.helpers.gradients import ROWS

IDS = [{"input_ids": [5, 6, 7 + i], "labels": [-100, 6, 7 + i], "weight": 2.0} for i in range(3)]


class ByNumber(Dataset[Any]):
    """A map-style data set of torch, which has no ``__iter__``; some raise no IndexError at their end."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index % len(self.rows)]


def pandas_of(rows: list[Any]) -> Any:
    return pytest.importorskip("pandas").DataFrame(rows)


@pytest.mark.parametrize(
    ("make", "rows"),
    [
        (ByNumber, ROWS),
        (lambda rows: Subset(ByNumber([*rows, *rows]), range(len(rows))), ROWS),
        (lambda rows: ConcatDataset([ByNumber(rows[:2]), ByNumber(rows[2:])]), ROWS),
        (pandas_of, ROWS),
        (pandas_of, IDS),
        (pa.Table.from_pylist, ROWS),
        (ByNumber, IDS),
        (lambda rows: [{name: np.asarray(value) for name, value in row.items()} for row in rows], IDS),
        (lambda rows: [{name: torch.tensor(value) for name, value in row.items()} for row in rows], IDS),
        *(
            (lambda rows, f=f: datasets.Dataset.from_list(rows).with_format(f), IDS)
            for f in ("torch", "numpy", "pandas")
        ),
        (lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset().with_format("torch"), IDS),
    ],
)
def test_they_are_read_as_a_list_of_them_is(make: Callable[[Any], Any], rows: Any) -> None:
    given, wanted = make(rows), list(read(rows))
    assert list(read(given)) == wanted
    data = SFTDataModule(given, val=given)
    for name in ("train", "val"):
        assert list(read(data.sources[name])) == wanted  # type: ignore[arg-type]  # no mixture


def test_columns_that_a_format_hides_stay_hidden() -> None:
    data = datasets.Dataset.from_list(IDS).with_format("pandas", columns=["input_ids", "labels"])
    assert [set(row) for row, _ in read(data)] == [{"input_ids", "labels"}] * 3


def test_a_transform_of_the_user_is_kept() -> None:
    data = datasets.Dataset.from_list(IDS).with_transform(lambda rows: {"text": [str(i) for i in rows["input_ids"]]})
    assert [row for row, _ in read(data)] == [{"text": str(row["input_ids"])} for row in IDS]


def test_a_cell_without_a_value_is_none() -> None:
    frame = pandas_of([{"prompt": "a", "completion": "b", "weight": 1.0}, {"prompt": "c", "completion": "d"}])
    assert [row["weight"] for row, _ in read(frame)] == [1.0, None]


def test_a_fit_takes_them_also_as_parts_of_a_mixture(pretrained: str, quiet_trainer: Callable[..., Trainer]) -> None:
    def losses(first: Any, second: Any) -> dict[str, Any]:
        trainer = quiet_trainer(max_steps=1)
        trainer.fit(SFTModule(pretrained), SFTDataModule(Mixture({"a": first, "b": second})))
        return {name: value.item() for name, value in trainer.callback_metrics.items() if "loss" in name}

    assert losses(ByNumber(ROWS), pandas_of(ROWS[:3])) == losses(ROWS, ROWS[:3])


@pytest.mark.parametrize("columns", [{"prompt": ["a"], "completion": ["b"]}, {"messages": [[{"role": "user"}]]}])
def test_a_dictionary_of_columns_says_how_to_make_rows(columns: Any) -> None:
    with pytest.raises(InputError, match=r"dictionary of columns, \[.*datasets\.Dataset\.from_dict\(data\), or \[dict"):
        leaves(columns)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    assert [row for row, _ in read(rows)] == [row for row, _ in read(datasets.Dataset.from_dict(columns))]


@pytest.mark.parametrize(
    "splits", [{"train": ROWS, "mine": ROWS}, {"a": ByNumber(ROWS)}, {"train": [[]]}, {"one": ROWS}]
)
def test_splits_are_still_called_so(splits: Any) -> None:
    with pytest.raises(InputError, match=r"has the splits"):
        leaves(splits)


def test_what_is_no_data_set_is_left_as_it_is() -> None:
    for source in ("train.jsonl", ["a.jsonl"], ROWS, None, iter(ROWS)):
        assert as_rows(source) is source
