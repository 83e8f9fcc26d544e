"""A validation split of the training data: disjoint, stable, the same for what needs it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.data.batches.stream import check_stream
from lightning_sft.data.rows.messages import Reading
from lightning_sft.data.rows.mixture import Mixture, Part, as_mixture
from lightning_sft.data.tokens import cache, dataset
from lightning_sft.data.tokens.dataset import load_prompts, load_split
from lightning_sft.data.tokens.encode_rows import EncodingConfig
from lightning_sft.data.tokens.held_out import Side, share_of, side_of
from lightning_sft.demos import tiny_tokenizer
from lightning_sft.export import parity
from lightning_sft.types import InputError

TOKENIZER = tiny_tokenizer()
ROWS = [{"prompt": f"Say {i}", "completion": f"{i} it is"} for i in range(200)]
Make = Callable[..., Trainer]


def places(source: Any, split: str, share: float = 0.1, **settings: Any) -> list[str]:
    """Where the rows of a side come from."""
    recipe = EncodingConfig(TOKENIZER, side=side_of(split, share))
    return [example.provenance for example in load_split(split, source, recipe, **settings).examples]


def texts(source: list[dict[str, Any]], split: str, share: float = 0.1) -> set[str]:
    return {source[int(place.split()[1]) - 1]["prompt"] for place in places(source, split, share)}


def test_each_row_is_on_one_side_and_the_share_is_about_as_asked() -> None:
    train, val = places(ROWS, "train"), places(ROWS, "val")
    assert sorted([*train, *val]) == sorted(f"row {i + 1}" for i in range(200))
    assert 10 <= len(val) <= 30


def test_equal_rows_are_on_one_side_whatever_else_they_say() -> None:
    twice = [*ROWS, *({**row, "id": i, "weight": 0.5} for i, row in enumerate(ROWS))]
    turns = [(("user", row["prompt"]), ("assistant", row["completion"])) for row in ROWS]
    same = [{"messages": [{"role": role, "content": text} for role, text in pair]} for pair in turns]
    for source in (twice, [*ROWS, *same]):
        train, val = ({int(place.split()[1]) % 200 for place in places(source, split)} for split in ("train", "val"))
        assert val
        assert not train & val


def test_a_row_stays_on_its_side_when_the_data_are_shuffled_or_grow() -> None:
    before = texts(ROWS, "val")
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    more = [{"prompt": f"Ask {i}", "completion": "x"} for i in range(50)]
    assert texts(shuffled, "val") == before
    assert texts([*more, *shuffled], "val") & {row["prompt"] for row in ROWS} == before
    assert before < texts(ROWS, "val", share=0.3)


def test_rows_of_token_ids_have_a_side() -> None:
    rows = [{"input_ids": [5, 6, i + 7], "labels": [-100, 6, i + 7]} for i in range(100)]
    train, val = places(rows, "train"), places(rows, "val")
    assert len(train) + len(val) == 100
    assert val


@pytest.mark.parametrize("num_workers", [0, 2])
def test_chunks_without_a_row_of_a_side_do_not_end_the_data(num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "_ROWS_AT_A_TIME", 3)
    assert len(places(ROWS, "val", num_workers=num_workers)) > 10


def test_each_data_set_of_a_mixture_is_split() -> None:
    mixture = Mixture({"a": Part(ROWS[:100], share=2), "b": Part(ROWS[100:], share=1, first=60)})
    recipe = EncodingConfig(TOKENIZER, side=Side(0.2, True))
    val = load_split("val", mixture, recipe)
    train = load_split("train", mixture, EncodingConfig(TOKENIZER, side=Side(0.2, False)))
    assert min(val.part_sizes) > 0
    assert [a + b for a, b in zip(train.part_sizes, val.part_sizes, strict=True)] == [100, 60]


def test_what_is_refused_or_ignored_is_said_once_and_the_split_is_said() -> None:
    rows = [*({**row, "id": 1} for row in ROWS), {"prompt": "x", "completion": 7}]
    accounts = {}
    for split in ("train", "val"):
        recipe = EncodingConfig(TOKENIZER, side=side_of(split, 0.1))
        accounts[split] = load_split(split, rows, recipe, invalid_rows="skip").account
    assert [len(accounts[split].refused) for split in accounts] == [1, 0]
    assert sum(account.num_rows for account in accounts.values()) == 201
    assert sum(account.ignored["id"] for account in accounts.values()) == 200
    [said] = [remark for remark in accounts["val"].remarks("val") if "held out" in remark]
    assert f"held out of data.train, chosen by their content: {accounts['val'].num_rows} rows" in said
    assert not any("held out" in remark for remark in accounts["train"].remarks("train"))


def test_prompts_of_the_validation_are_those_that_are_held_out() -> None:
    prompts = load_prompts(ROWS, TOKENIZER, side=Side(0.1, True))
    assert [prompt.provenance for prompt in prompts] == places(ROWS, "val")


def test_the_cache_tells_shares_and_sides_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_SMALL", 0)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for split, share in (("train", 0.1), ("val", 0.1), ("val", 0.3), ("train", 0.1)):
        assert places(path, split, share, cache=tmp_path / "kept") == places(path, split, share)
    assert len(list((tmp_path / "kept").glob("*.arrow"))) == 3


@pytest.mark.parametrize(("share", "num_held_out"), [(0.001, 1), (0.999, 2)])
def test_of_few_rows_at_least_one_is_on_each_side(share: float, num_held_out: int) -> None:
    held_out = texts(ROWS[:3], "val", share)
    assert len(held_out) == num_held_out
    assert texts(ROWS[:3], "train", share) == {row["prompt"] for row in ROWS[:3]} - held_out
    assert texts(ROWS[2::-1], "val", share) == held_out
    twice = [*ROWS[:3], *({**row, "id": 1} for row in ROWS[:3])]
    assert texts(twice, "val", share) == held_out
    assert not held_out & texts(twice, "train", share)
    prompts = load_prompts(ROWS[:3], TOKENIZER, side=side_of("val", share))
    assert [prompt.provenance for prompt in prompts] == places(ROWS[:3], "val", share)
    compared = parity.held_out(as_mixture(ROWS[:3]), side=side_of("val", share))
    assert {given.messages[0]["content"] for given in compared} == held_out


def test_each_small_part_has_a_row_on_each_side_of_those_that_are_used() -> None:
    mixture = Mixture({"a": Part(ROWS[:100], first=2), "b": Part(ROWS[100:])})
    recipe = EncodingConfig(TOKENIZER, side=Side(0.05, True))
    assert load_split("val", mixture, recipe).part_sizes[0] == 1
    assert load_split("train", mixture, replace(recipe, side=Side(0.05, False))).part_sizes[0] == 1


def test_of_large_data_only_the_first_rows_are_read_for_it() -> None:
    class Rows(list[dict[str, str]]):
        def __iter__(self) -> Iterator[dict[str, str]]:
            for number, row in enumerate(super().__iter__()):
                assert number < 100
                yield row

    assert Side(0.1, True).within(Part(Rows(ROWS)), Reading()) == Side(0.1, True)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_share_of_one_row_or_of_an_iterator_is_refused(split: str) -> None:
    with pytest.raises(InputError, match=r"data\.val=5% of the training data cannot be held out: they are one row"):
        places([ROWS[0], ROWS[0]], split, share=0.05)
    with pytest.raises(InputError, match=r"data\.val=12\.5% needs rows that can be read twice, got an iterator"):
        places(iter(ROWS), split, share=0.125)


@pytest.mark.parametrize("val", ["0%", "100%", "250 %"])
def test_what_is_no_share_is_refused(val: str) -> None:
    with pytest.raises(InputError, match="is no share of the training data"):
        share_of(val, ROWS)


def test_a_share_of_nothing_or_of_a_stream_is_refused() -> None:
    with pytest.raises(InputError, match=r"a share of data.train, which is missing"):
        SFTDataModule(val="5%")
    with pytest.raises(InputError, match=r"data\.val=5% of a stream would be known only after all of it has been read"):
        check_stream(as_mixture(ROWS), "token", 0.05)


def test_fit_validates_on_rows_that_it_does_not_train_on(
    pretrained: str, quiet_trainer: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    data = SFTDataModule(train=ROWS[:60], val="20%")
    trainer = quiet_trainer()
    trainer.fit(SFTModule(pretrained), data)
    assert "val/loss" in trainer.callback_metrics
    train, val = ({example.provenance for example in data.splits[name].examples} for name in ("train", "val"))
    assert val
    assert not train & val
    assert len(train | val) == 60
    assert {prompt.provenance for prompt in data.prompts_of("val")} == val
    assert "val: held out of data.train" in capsys.readouterr().out


@pytest.mark.parametrize("first", [1, 3, 8])
def test_the_first_rows_of_a_part_are_used(first: int, tmp_path: Path) -> None:
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, rows in zip(files, (ROWS[:5], ROWS[5:10]), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixture = Mixture({"one": Part(files, first=first), "all": ROWS[10:12]})
    split = load_split("train", mixture, EncodingConfig(TOKENIZER))
    assert split.part_sizes == [first, 2]
    expected = [f"{tmp_path}/{name}.jsonl:{line}" for name in "ab" for line in range(1, 6)][:first]
    assert [example.provenance for example in split.examples][:first] == expected
    assert [prompt.provenance for prompt in load_prompts(mixture, TOKENIZER)][:first] == expected
    assert load_split("train", mixture, EncodingConfig(TOKENIZER), first=2).part_sizes == [min(first, 2), 2]


@pytest.mark.parametrize(
    ("val", "example"),
    [(0.1, "10%"), (5, "5%"), ("0.1", "10%"), ("5", "5%"), (0.005, "0.5%"), (500, "10%"), (-1, "10%")],
)
def test_a_share_that_is_no_percentage_is_refused_with_one(val: Any, example: str) -> None:
    with pytest.raises(InputError, match=rf"^data.val is {val!r}; expected a percentage, as '{example}', for a share"):
        SFTDataModule("train.jsonl", val=val)


def test_a_file_may_be_called_as_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2024").mkdir()
    assert SFTDataModule("train.jsonl", val="2024").held_out is None
