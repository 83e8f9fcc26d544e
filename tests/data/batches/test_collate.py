from __future__ import annotations

import torch

from lightning_sft.data.batches.collate import collate
from lightning_sft.data.inspect.documents import documents
from lightning_sft.demos import tiny_model
from lightning_sft.model.backbone import backbone_and_head
from lightning_sft.model.likelihood import LikelihoodModel
from lightning_sft.model.probes import probe
from lightning_sft.types import IGNORE, Example

EXAMPLES = [Example([5, 6, 7], [0, 1.0, 0.5], "f:1"), Example([8, 9], [0, 2.0], "f:2"), Example([3], [0], "f:3")]


def test_packed_and_padded_hold_the_same_targets_with_the_same_weights() -> None:
    pairs = []
    for packed in (True, False):
        batch = collate(EXAMPLES, packed=packed, pad_id=9)
        chosen = batch.labels != IGNORE
        pairs.append((batch.labels[chosen].tolist(), batch.target_weights[chosen].tolist()))
        assert not batch.target_weights[~chosen].any()
    assert pairs[0] == pairs[1] == ([6, 7, 9], [1.0, 0.5, 2.0])


def test_no_label_crosses_from_one_document_into_the_next() -> None:
    batch = collate([Example([5, 6], [1, 1]), Example([7, 8], [1, 1])])
    assert batch.labels.tolist() == [[6, IGNORE, 8, IGNORE]]


def test_positions_restart_with_each_document_and_count_on_through_padding() -> None:
    assert collate(EXAMPLES).position_ids.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert collate(EXAMPLES, packed=False).position_ids.tolist() == [[0, 1, 2]] * 3


def test_padding_is_never_a_target_even_where_it_is_a_trained_token() -> None:
    batch = collate(EXAMPLES, packed=False, pad_id=7)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 7], [3, 7, 7]]
    assert batch.labels.tolist() == [[6, 7, IGNORE], [9, IGNORE, IGNORE], [IGNORE] * 3]


def test_an_empty_batch_is_one_token_without_a_target() -> None:
    for packed in (True, False):
        batch = collate([], 3.0, packed=packed, pad_id=4)
        assert batch.input_ids.tolist() == [[4]]
        assert batch.labels.tolist() == [[IGNORE]]
        assert batch.normalizer == 3.0


def test_documents_and_provenance_tell_where_a_token_comes_from() -> None:
    batch = collate(EXAMPLES)
    assert batch.documents().tolist() == [[0, 0, 0, 1, 1, 2]]
    assert batch.provenance == ("f:1", "f:2", "f:3")
    assert torch.equal(collate(EXAMPLES, packed=False).documents()[:, 0], torch.arange(3))


def test_targets_and_spans_are_known_on_the_host() -> None:
    for packed in (True, False):
        batch = collate(EXAMPLES, packed=packed, fill=8 if packed else 0)
        assert sum(batch.spans) == batch.input_ids.numel()
        assert len(batch.spans) == len(batch.provenance) == batch.documents().max() + 1
        assert torch.equal(batch.targets, (batch.labels != IGNORE).flatten().nonzero()[:, 0])


def test_a_row_is_filled_up_with_documents_no_longer_than_the_longest() -> None:
    batch = collate(EXAMPLES, fill=14, pad_id=4, parts=[0, 1, 1], part_names=["a", "b"])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 3] + [4] * 8]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 0, 1, 2, 0, 1, 2, 0, 1]]
    assert batch.spans == (3, 2, 1, 3, 3, 2)
    assert batch.lengths == (3, 2, 1, 0, 0, 0)
    assert batch.provenance[3:] == ("padding",) * 3
    assert batch.target_parts().tolist() == [0, 0, 1]
    assert [len(document) for document in documents(batch, pad_id=4)] == [3, 2, 1]
    assert collate([], fill=70).spans == (64, 6)
    assert collate(EXAMPLES, fill=5).input_ids.shape == (1, 6)  # it is full already


def test_a_row_that_is_filled_up_has_the_same_likelihood() -> None:
    model = tiny_model()
    scorer = LikelihoodModel(model, probe(model, *backbone_and_head(model)))
    for batch in (plain := collate(EXAMPLES)), (filled := collate(EXAMPLES, fill=20)):
        model.zero_grad()
        total, *_ = scorer(batch)
        total.backward()
        batch.total, batch.gradients = total.detach(), [p.grad.clone() for p in model.parameters()]
    torch.testing.assert_close(filled.total, plain.total)
    torch.testing.assert_close(filled.gradients, plain.gradients)
