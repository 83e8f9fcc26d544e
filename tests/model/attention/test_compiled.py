"""Layers under torch.compile: one graph each, for all batches, with the numbers of eager execution."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_sft.demos import tiny_model
from lightning_sft.model.backbone import backbone_and_head, hidden_states
from tests.helpers.slow import slow_but

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "phi3": {},
    "mistral": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere2": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
}
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it on whatever it traces
BATCHES = [[5, 9, 2], [8, 8], [1, 1, 1, 13], [4, 4, 4, 2, 2]]
OTHERS = [[5, 9, 20], [8, 8], [1, 1, 1, 13, 30], [30, 10]]  # with other numbers of tokens


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def computed(backbone: nn.Module, lengths: list[int]) -> tuple[Tensor, list[Tensor]]:
    ids = torch.randint(256, (1, sum(lengths)), generator=torch.Generator().manual_seed(len(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    hidden = hidden_states(backbone, ids, positions, tuple(lengths))
    return hidden.detach(), list(torch.autograd.grad(hidden.square().sum(), list(backbone.parameters())))


def compiled(name: str, backend: Any, **how: Any) -> tuple[nn.Module, nn.Module]:
    """A backbone whose layers are compiled, and the same with none compiled."""
    both = []
    for _ in range(2):
        model = tiny_model(name, **ARCHITECTURES[name])
        model.set_attn_implementation("per_document")
        both.append(backbone_and_head(model)[0])
    for layer in both[0].layers:
        layer.compile(backend=backend, fullgraph=True, **how)
    return both[0], both[1]


def furthest(a: tuple[Tensor, list[Tensor]], b: tuple[Tensor, list[Tensor]]) -> float:
    pairs = [(a[0], b[0]), *zip(a[1], b[1], strict=True)]
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)


@pytest.mark.parametrize(("batches", "dynamic"), [(BATCHES, None), (OTHERS, True)], ids=["one size", "any size"])
@pytest.mark.parametrize(
    ("name", "autocast"),
    slow_but(
        [("llama", True), ("gemma3_text", False)], [(name, cast) for name in ARCHITECTURES for cast in (False, True)]
    ),
)
def test_a_layer_is_one_graph_for_all_batches_and_equals_eager(
    name: str, autocast: bool, batches: list[list[int]], dynamic: bool | None
) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    own, eager = compiled(name, counter, dynamic=dynamic)
    for lengths in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            mine, wanted = computed(own, lengths), computed(eager, lengths)
        assert furthest(mine, wanted) <= (1e-2 if autocast else 1e-5)
    assert counter.frame_count <= 2 * len(set(ARCHITECTURES[name].get("layer_types", [1])))
