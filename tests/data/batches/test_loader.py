from __future__ import annotations

from functools import partial

import pytest
import torch

from lightning_sft.data.batches.loader import EpochLoader, PromptBatch, PromptLoader
from lightning_sft.data.batches.packing import pack
from lightning_sft.data.batches.plan import EpochPlan
from lightning_sft.demos import tiny_tokenizer
from lightning_sft.types import Example, Prompt

EXAMPLES = [Example([i, i + 1, i + 2], [0.0, 1.0, 1.0], f"f:{i}") for i in range(20)]


def plan(**settings: int) -> EpochPlan:
    return EpochPlan([3] * 20, [2.0] * 20, partial(pack, capacity=9), **settings)


def provenance(loader: EpochLoader) -> list[tuple[str, ...]]:
    return [batch.provenance for batch in loader]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_change_nothing(num_workers: int) -> None:
    alone = provenance(EpochLoader(EXAMPLES, plan()))
    assert provenance(EpochLoader(EXAMPLES, plan(), num_workers=num_workers)) == alone
    assert sorted(name for names in alone for name in names) == sorted(example.provenance for example in EXAMPLES)


def test_an_iteration_begins_at_its_place_and_asks_for_it_only_when_a_batch_is_wanted() -> None:
    place = [0, 0]
    loader = EpochLoader(EXAMPLES, plan(), place=lambda: (place[0], place[1]))
    first = provenance(loader)
    iterator = iter(loader)
    place[:] = [0, 3]
    assert [batch.provenance for batch in iterator] == first[3:]
    place[:] = [1, 0]
    assert provenance(loader) != first


def test_ranks_share_the_examples_out() -> None:
    both = [provenance(EpochLoader(EXAMPLES, plan(num_ranks=2, accumulate=3), rank)) for rank in (0, 1)]
    assert len(both[0]) == len(both[1])
    names = [name for rank in both for names in rank for name in names if name != "padding"]
    assert sorted(names) == sorted(example.provenance for example in EXAMPLES)


def test_prompts_are_padded_on_the_left_and_masked_there() -> None:
    batch = PromptBatch([Prompt([5, 6, 7]), Prompt([8])], tiny_tokenizer())
    assert batch.input_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.to("cpu").input_ids.device == torch.device("cpu")


def test_prompts_come_in_order_and_all_of_them() -> None:
    loader = PromptLoader([Prompt([i]) for i in range(5)], tiny_tokenizer(), batch_size=2)
    assert len(loader) == 3
    assert [p.input_ids[0] for batch in loader for p in batch.prompts] == list(range(5))
