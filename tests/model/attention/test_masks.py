"""What kind a mask is, is learnt once, and a batch whose documents the host knows never waits for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from transformers.masking_utils import (
    and_masks,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    find_packed_sequence_indices,
    or_masks,
    sliding_window_causal_mask_function,
)

from lightning_sft.demos import tiny_model
from lightning_sft.model.attention import gpu, masks
from lightning_sft.model.attention import per_document as implementation
from lightning_sft.model.attention.documents import Documents, OneCall
from lightning_sft.model.attention.masks import Rows, is_plain, rows_of_documents
from lightning_sft.model.backbone import backbone_and_head, hidden_states
from lightning_sft.types import InputError
from tests.helpers.fake_cuda import fake_cuda, to_cuda

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "gpt_oss": {"sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma3_text"])  # stock attention asks for a real GPU
@pytest.mark.parametrize("spans", [(7, 3, 6), (4, 4, 8)])
def test_a_backbone_on_a_gpu_needs_no_value_of_it(
    name: str, spans: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FakeTensorMode refuses whatever the host would wait for, and mixed devices."""
    model = tiny_model(name, **ARCHITECTURES[name]).bfloat16()
    model.set_attn_implementation(implementation.NAMES[model.config._attn_implementation])
    backbone, _ = backbone_and_head(model)
    monkeypatch.setattr(gpu, "one_call", lambda device: OneCall((torch.bfloat16,), 256))
    masks._is_plain.clear()
    with fake_cuda() as mode:
        to_cuda(backbone, mode)
        ids = torch.zeros(1, 16, dtype=torch.long, device="cuda:0")
        positions = torch.zeros(1, 16, dtype=torch.long, device="cuda:0")
        hidden = hidden_states(backbone, ids, positions, spans)
    assert hidden.device == torch.device("cuda", 0)
    assert hidden.shape == (1, 16, 16)


def test_without_their_lengths_the_same_batch_would_wait() -> None:
    model = tiny_model()
    model.set_attn_implementation("per_document")
    backbone, _ = backbone_and_head(model.bfloat16())
    with fake_cuda() as mode:
        to_cuda(backbone, mode)
        ids = torch.zeros(1, 16, dtype=torch.long, device="cuda:0")
        with pytest.raises(DynamicOutputShapeException):
            hidden_states(backbone, ids, torch.zeros_like(ids))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_lengths_from_the_host_and_from_the_positions_give_the_same(name: str) -> None:
    model = tiny_model(name, **ARCHITECTURES[name]).eval()
    model.set_attn_implementation(implementation.NAMES[model.get_correct_attn_implementation(None)])
    backbone, _ = backbone_and_head(model)
    ids = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
    rows = [[7, 3, 6], [16]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    with torch.no_grad():
        known, found = (hidden_states(backbone, ids, positions, spans) for spans in ((7, 3, 6, 16), ()))
        alone = [hidden_states(backbone, part) for part in ids.flatten()[None].split([7, 3, 6, 16], 1)]
    assert torch.equal(known, found)
    assert (known.flatten(0, 1) - torch.cat(alone, 1)[0]).abs().max() <= 1e-5 * known.abs().max()


def test_a_kind_of_mask_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    masks._is_plain.clear()
    asked, found = [], Documents.found.__func__
    monkeypatch.setattr(Documents, "found", lambda *given: asked.append(1) or found(Documents, *given))
    for length in (30, 17, 32, 20):
        assert is_plain(sliding_window_causal_mask_function(5), 5, length)  # a new function for each batch
    assert asked == [1]
    assert is_plain(sliding_window_causal_mask_function(6), 6, 32)
    assert is_plain(causal_mask_function, None, 32)
    assert asked == [1] * 3


def test_what_depends_on_more_than_indices_is_not_taken_for_known() -> None:
    blocks = blockwise_overlay(torch.tensor([[-1, -1, 0, 0, 0, -1, -1, -1]]))
    for sees in (
        or_masks(causal_mask_function, blocks),
        chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.int)),
        and_masks(causal_mask_function, lambda b, h, q, k: k != 1),
    ):
        assert not is_plain(sees, None, 8)
    assert not is_plain(sliding_window_causal_mask_function(3), None, 8)
    assert not is_plain(sliding_window_causal_mask_function(3), 4, 8)


def test_outside_of_it_transformers_is_as_it_was() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    from transformers import masking_utils

    with rows_of_documents(positions, (3, 2)):
        inside = masking_utils.find_packed_sequence_indices(positions)
        other = masking_utils.find_packed_sequence_indices(positions.clone())
    assert masking_utils.find_packed_sequence_indices is find_packed_sequence_indices
    assert torch.equal(inside, find_packed_sequence_indices(positions))
    assert torch.equal(other, inside)
    assert masks.current() is None


@pytest.mark.parametrize("spans", [(5, 4), (3, 5), (8,)])
def test_lengths_that_are_not_those_of_whole_rows_are_refused(spans: tuple[int, ...]) -> None:
    positions = torch.arange(4).expand(2, 4)
    assert Rows(positions, (4, 3, 1)).spans == [4, 3, 1]
    with pytest.raises(InputError, match=r"do not fill 2 rows of 4\. Set Batch\.spans"):
        Rows(positions, spans)
