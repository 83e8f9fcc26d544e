"""FlexAttention beside the eager attention of the architecture, document by document. Uncompiled, since it runs on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention

from lightning_sft.attention import flex, implementation
from lightning_sft.attention.documents import Documents
from lightning_sft.data.collate import collate
from lightning_sft.demos import tiny_model
from lightning_sft.pretrained import backbone_and_head
from lightning_sft.probes import states
from lightning_sft.types import Example
from tests.attention.reference import dense

LENGTHS = [130, 1, 200, 57]  # documents that share blocks of 128 tokens, and that span several
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gemma2": {"attn_logit_softcapping": 0.5, "head_dim": 16, "sliding_window": 70, "initializer_range": 0.3},
    "gpt_oss": {"sliding_window": 70, "head_dim": 16, "initializer_range": 0.3},
}


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """FlexAttention is chosen on the CPU too, as torch's reference computes it; how often it was called."""
    calls: list[int] = []

    def function(*given: Any, **settings: Any) -> Any:
        calls.append(1)
        return flex_attention(*given, **settings)

    monkeypatch.setattr(flex, "usable", lambda device: True)
    monkeypatch.setattr(flex, "_function", lambda: function)
    return calls


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
    with FakeTensorMode():
        blocks = flex.block_mask(Documents(LENGTHS, 100, torch.device("cuda", 0)))
    assert blocks.kv_indices.device == torch.device("cuda", 0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore:return_lse is deprecated")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_soft_caps_sinks_and_windows_are_those_of_the_architecture(name: str, uncompiled: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    examples = [Example(torch.randint(256, (n,), generator=generator).tolist(), [1.0] * n) for n in LENGTHS]
    model = tiny_model(name, **ARCHITECTURES[name], max_position_embeddings=512).double().train()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter, generator=generator)
    backbone, _ = backbone_and_head(model)

    def computed(batches: list[Any]) -> tuple[Tensor, list[Tensor]]:
        hidden = torch.cat([states(backbone, batch.input_ids, batch.position_ids) for batch in batches], 1)
        weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
        parameters = [p for p in backbone.parameters() if p.requires_grad]
        grads = torch.autograd.grad((hidden * weights).sum(), parameters, allow_unused=True)
        return hidden.detach(), [grad for grad in grads if grad is not None]

    model.set_attn_implementation("eager")
    alone = computed([collate([example]) for example in examples])
    assert not uncompiled
    model.set_attn_implementation(implementation.NAMES["eager"])
    packed = computed([collate(examples)])
    assert len(uncompiled) == 2  # two layers
    assert (packed[0] - alone[0]).abs().max() <= 1e-5 * alone[0].abs().max()
    largest = max(float(grad.abs().max()) for grad in alone[1])
    for mine, right in zip(packed[1], alone[1], strict=True):
        assert (mine - right).abs().max() <= 1e-5 * largest


def test_what_is_not_known_goes_document_by_document() -> None:
    query = torch.zeros(1, 2, 8, 16)
    known = {"scaling": 0.3, "dropout": 0.0, "softcap": 3.0, "s_aux": query[0, :, 0, 0], "sliding_window": 4}
    assert flex.takes(query, query, query, known)
    for other in ({"dropout": 0.1}, {"position_bias": query}, {"a_new_setting": 1}):
        assert not flex.takes(query, query, query, known | other)
    assert not flex.takes(query[..., :8], query[..., :8], query[..., :8], known)


def test_on_a_cpu_it_is_not_chosen() -> None:
    assert not flex.usable(torch.device("cpu"))
