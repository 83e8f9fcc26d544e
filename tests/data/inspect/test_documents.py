"""What is taken out of a batch is what was put in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft.data.batches.collate import collate
from lightning_sft.data.inspect.documents import documents
from lightning_sft.types import Batch, Example

PAD = 0
tokens = st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0.0, 0.0, 1.0, 0.25])), min_size=1, max_size=6)


def example(pairs: list[tuple[int, float]]) -> Example:
    """Of pairs of id and weight; the first token has no context, and the last is trained, as ``encode`` gives it."""
    ids, weights = [i for i, _ in pairs], [0.0, *(w for _, w in pairs[1:])]
    return Example([*ids, PAD], [*weights, 1.0], "a.jsonl:1")


@pytest.mark.parametrize("packed", [True, False])
@given(st.lists(tokens.map(example), min_size=1, max_size=5))
def test_unpacking_is_the_inverse_of_collating(packed: bool, examples: list[Example]) -> None:
    found = documents(collate(examples, packed=packed, pad_id=PAD), PAD)
    assert [(d.input_ids.tolist(), d.target_weights.tolist()) for d in found] == [
        (list(e.input_ids), list(e.target_weights)) for e in examples
    ]
    assert [d.num_targets for d in found] == [sum(w > 0 for w in e.target_weights) for e in examples]


def test_a_batch_that_only_keeps_others_company_has_no_document() -> None:
    assert documents(collate([], pad_id=PAD), PAD) == []


def test_a_batch_of_a_plain_collator_has_documents_too() -> None:
    labels = torch.tensor([[-100, 6, 7], [-100, 9, -100]])
    batch = Batch.of({"input_ids": torch.tensor([[5, 6, 7], [8, 9, PAD]]), "labels": labels})
    assert [d.input_ids.tolist() for d in documents(batch, PAD)] == [[5, 6, 7], [8, 9]]


def test_a_label_that_is_not_the_token_that_follows_is_noticed() -> None:
    batch = collate([Example([5, 6, 7], [0, 1, 1.0], "a.jsonl:1")])
    batch.labels[0, 0] = 9
    with pytest.raises(AssertionError, match=r"a.jsonl:1: a label is not the token that follows"):
        documents(batch)
    batch = collate([Example([5, 6], [0, 1.0], "a.jsonl:1"), Example([7, 8], [0, 1.0])])
    batch.labels[0, 1] = 7
    with pytest.raises(AssertionError, match=r"the last token predicts the first of the next document"):
        documents(batch)
