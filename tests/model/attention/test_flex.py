"""FlexAttention beside eager attention document by document: uncompiled, since there is a CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from lightning_sft.data.batches.collate import collate
from lightning_sft.demos import tiny_model
from lightning_sft.model.attention import flex
from lightning_sft.model.attention import per_document as implementation
from lightning_sft.model.attention.documents import Documents
from lightning_sft.model.backbone import backbone_and_head, hidden_states
from lightning_sft.types import Batch, Example
from tests.model.attention.reference import dense

LENGTHS = [130, 1, 200, 57]  # documents that share blocks of 128 tokens, and that span several
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gemma2": {"attn_logit_softcapping": 0.5, "head_dim": 16, "sliding_window": 70, "initializer_range": 0.3},
    "gpt_oss": {"sliding_window": 70, "head_dim": 16, "initializer_range": 0.3},
}


def by_definition(
    query: Tensor, key: Tensor, value: Tensor, *, score_mod: Any, block_mask: Any, scale: float, enable_gqa: bool,
    return_aux: Any = None,
) -> Any:  # fmt: skip
    """What torch's documentation says of FlexAttention, with a backward pass."""
    assert enable_gqa
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    here, none = torch.arange(query.shape[2]), torch.tensor(0)
    scores = score_mod(query @ key.transpose(2, 3) * scale, none, none, here[:, None], here)
    scores = scores.masked_fill(~block_mask.mask_mod(none, none, here[:, None], here), -torch.inf)
    out = scores.softmax(-1) @ value
    return out if return_aux is None else (out, SimpleNamespace(lse=scores.logsumexp(-1)))


@pytest.mark.parametrize("window", [None, 1, 100, 150])
def test_the_blocks_hold_every_key_that_a_query_sees(window: int | None) -> None:
    documents = Documents(LENGTHS, window)
    blocks = flex.block_mask(documents)
    here = torch.arange(sum(LENGTHS))
    seen = blocks.mask_mod(torch.tensor(0), torch.tensor(0), here[:, None], here)
    assert torch.equal(seen, dense(LENGTHS, window))
    held = blocks.to_dense()[0, 0].bool().repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert not (seen & ~held[: len(here), : len(here)]).any()
    assert not held.all(), "blocks that nothing sees are left out"


def test_making_the_blocks_does_not_wait_for_the_device() -> None:
    blocks = flex.block_mask(Documents(LENGTHS, 100, "meta"))  # where no value can be read
    assert blocks.kv_indices.shape == (1, 1, 4, 4)


def computed(name: str, attention: str, batches: list[Batch], backward: bool) -> list[Tensor]:
    """Hidden states of all documents end to end, and gradients of a sum over them."""
    model = tiny_model(name, **ARCHITECTURES[name], max_position_embeddings=512).train()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation(attention)
    backbone, _ = backbone_and_head(model)
    with torch.set_grad_enabled(backward):
        hidden = torch.cat([hidden_states(backbone, batch.input_ids, batch.position_ids) for batch in batches], 1)
    if not backward:
        return [hidden]
    weights = torch.linspace(-1, 1, hidden.numel()).view_as(hidden)
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    grads = torch.autograd.grad((hidden * weights).sum(), parameters, allow_unused=True)
    return [hidden.detach(), torch.cat([grad.flatten() for grad in grads if grad is not None])]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("by", [flex_attention, by_definition])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_soft_caps_sinks_and_windows_are_those_of_the_architecture(
    name: str, by: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, calls = torch.Generator().manual_seed(0), []
    examples = [Example(torch.randint(256, (n,), generator=generator).tolist(), [1.0] * n) for n in LENGTHS]
    monkeypatch.setattr(flex, "usable", lambda device: True)
    monkeypatch.setattr(flex, "_function", lambda: calls.append(1) or by)
    backward = by is by_definition  # torch's has none on a CPU
    alone = computed(name, "eager", [collate([example]) for example in examples], backward)
    assert not calls
    packed = computed(name, implementation.NAMES["eager"], [collate(examples)], backward)
    assert len(calls) == 2  # two layers
    for mine, right in zip(packed, alone, strict=True):
        assert (mine - right).abs().max() <= 2e-5 * right.abs().max()


def test_what_is_not_known_goes_document_by_document() -> None:
    query = torch.zeros(1, 2, 8, 16)
    known = {"scaling": 0.3, "dropout": 0.0, "softcap": 3.0, "s_aux": query[0, :, 0, 0], "sliding_window": 4}
    assert flex.takes(query, query, query, known)
    for other in ({"dropout": 0.1}, {"position_bias": query}, {"a_new_setting": 1}):
        assert not flex.takes(query, query, query, known | other)
    assert not flex.takes(query[..., :8], query[..., :8], query[..., :8], known)


def test_on_a_cpu_it_is_not_chosen() -> None:
    assert not flex.usable(torch.device("cpu"))
