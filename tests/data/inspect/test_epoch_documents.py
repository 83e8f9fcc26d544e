"""The walk has every document of every rank, where the plan puts it."""

from __future__ import annotations

from functools import partial

import pytest

from lightning_sft.data.batches.loader import EpochLoader
from lightning_sft.data.batches.packing import pack
from lightning_sft.data.batches.plan import EpochPlan
from lightning_sft.data.inspect.documents import EpochDocuments, is_place
from lightning_sft.types import Example

EXAMPLES = [Example([i] * (2 + i % 3), [0] + [1.0] * (1 + i % 3), f"data/a.jsonl:{i}") for i in range(1, 18)]


def walk(num_ranks: int = 1, accumulate: int = 1, packed: bool = True) -> EpochDocuments:
    lengths, weights = [len(e) for e in EXAMPLES], [float(sum(e.target_weights)) for e in EXAMPLES]
    plan = EpochPlan(lengths, weights, partial(pack, capacity=8), num_ranks=num_ranks, accumulate=accumulate)
    return EpochDocuments(EpochLoader(EXAMPLES, plan, packed=packed), pad_id=0)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_document_of_every_rank_is_there_once(num_ranks: int, packed: bool) -> None:
    found = {placed.document.provenance: placed.document for placed in walk(num_ranks, 2, packed)}
    assert len(list(walk(num_ranks, 2, packed))) == len(found) == len(EXAMPLES)
    assert all(found[e.provenance].input_ids.tolist() == list(e.input_ids) for e in EXAMPLES)


def test_the_first_are_of_different_micro_batches() -> None:
    assert [placed.micro_batch for placed in walk().first(3)] == [1, 2, 3]
    few = walk()
    few.loader.plan = EpochPlan([4, 4], [3.0, 3.0], partial(pack, capacity=8))
    assert len(few.first(5)) == 2  # of the same micro-batch: there is one


def test_a_document_knows_its_place() -> None:
    [*_, last] = walk(num_ranks=2, accumulate=2)
    assert last.rank == 1
    assert last.step == -(-last.micro_batch // 2)
    assert f"micro-batch {last.micro_batch} of rank 1" in last.remark
    assert is_place(last.document.provenance, last.document.provenance)
    number = last.document.provenance.rpartition(":")[2]
    assert is_place(f"a.jsonl:{number}", last.document.provenance)
    assert not is_place(f"onl:{number}", last.document.provenance)
    assert "rank" not in walk().first(1)[0].remark
