from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    sliding_window_causal_mask_function,
)

import lightning_sft.model.attention.documents as source
from lightning_sft.demos import tiny_model
from lightning_sft.model.attention.choice import probed
from lightning_sft.model.attention.documents import Documents
from lightning_sft.model.backbone import backbone_and_head
from tests.model.attention.reference import dense

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=6)
WINDOW = st.none() | st.integers(1, 40)


def positions_of(lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


@settings(max_examples=60)
@given(LENGTHS, WINDOW, st.integers(1, 8))
def test_pieces_and_their_masks_are_the_whole_mask(lengths: list[int], window: int | None, least: int) -> None:
    before, source._LEAST_QUERIES = source._LEAST_QUERIES, least
    try:
        documents = Documents(lengths, window)
        seen = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool)
        offset = 0
        for length in lengths:
            for begin, end, first in documents.pieces(length):
                mask = documents.mask(begin, end, first)
                if mask is None:
                    assert begin == first  # else being causal would mean something else
                    mask = torch.ones(end - begin, end - first, dtype=torch.bool).tril()
                seen[offset + begin : offset + end, offset + first : offset + end] = mask
            offset += length
    finally:
        source._LEAST_QUERIES = before
    assert torch.equal(seen, dense(lengths, window))


@settings(max_examples=60)
@given(LENGTHS, st.none() | st.integers(2, 40), st.booleans())  # under a window of 1 each token is its own document
def test_documents_are_found_whether_the_mask_knows_them_or_not(
    lengths: list[int], window: int | None, knows: bool
) -> None:
    sees = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    if knows:
        numbers = torch.repeat_interleave(torch.tensor(lengths))[None]
        sees = and_masks(sees, packed_sequence_mask_function(numbers))
    found = Documents.found(sees, positions_of(lengths), window, None)
    assert found is not None
    assert found.lengths == lengths
    assert found.widest == (window if window and window < max(lengths) else None)


def test_each_row_begins_a_document() -> None:
    found = Documents.found(causal_mask_function, torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1]]), None, None)
    assert found is not None
    assert found.lengths == [4, 2, 2]
    assert found.bounds.tolist() == [0, 4, 6, 8]


def test_chunks_are_documents() -> None:
    sees = chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.int))
    found = Documents.found(sees, torch.arange(8)[None], 3, None)
    assert found is not None
    assert (found.lengths, found.widest) == ([3, 3, 2], None)


@pytest.mark.parametrize("window", [None, 3])
def test_what_is_no_causal_attention_within_documents_is_not_taken_for_it(window: int | None) -> None:
    positions = torch.arange(8)[None]
    blocks = blockwise_overlay(torch.tensor([[-1, -1, 0, 0, 0, -1, -1, -1]]))
    causal = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    assert Documents.found(causal, positions, window, None) is not None
    for sees in (bidirectional_mask_function, or_masks(causal, blocks)):
        assert Documents.found(sees, positions, window, None) is None


def test_a_window_without_tokens_makes_no_documents() -> None:
    """Qwen2-MoE asks for such a mask where none of its layers has a window."""
    sees = sliding_window_causal_mask_function(0)
    assert Documents.found(sees, positions_of([5, 9]), 0, None) is None
    model = tiny_model("qwen2_moe", num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16)
    assert model.config.sliding_window == 0
    assert probed(model, *backbone_and_head(model))[1].isolates_documents


def test_a_window_other_than_the_masks_is_not_taken_for_it() -> None:
    for wrong in (2, 4, None):
        assert Documents.found(sliding_window_causal_mask_function(3), torch.arange(8)[None], wrong, None) is None
