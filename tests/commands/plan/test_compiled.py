"""Compiled layers on paper keep what those of torch.compile keep, and compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_sft.commands.plan.compiled import compile_on_paper
from lightning_sft.commands.plan.layout import Layout
from lightning_sft.commands.plan.rehearsal import Rehearsal, rehearse
from lightning_sft.data.batches.collate import collate
from lightning_sft.demos import tiny_model, tiny_pretrained
from lightning_sft.machine.compiler import KEEP_LESS
from lightning_sft.model.parallel.sharding import layers
from lightning_sft.module import SFTModule
from lightning_sft.types import Batch, Example
from tests.helpers.slow import slow_but

SIZE = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "head_dim": 16, "vocab_size": 1000}


def kept(model: PreTrainedModel) -> tuple[int, list[Tensor]]:
    """Bytes that a forward pass keeps beside the parameters, and the gradients that come of them."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = 0 if storage.data_ptr() in own else storage.nbytes()
        return tensor

    def run() -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            hidden: Tensor = model.base_model(input_ids=torch.arange(48)[None], use_cache=False).last_hidden_state
        return hidden.square().sum()

    run()  # compiles
    found.clear()
    loss = run()
    loss.backward()
    return sum(found.values()), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.filterwarnings("ignore")  # of dynamo, about what it traces
@pytest.mark.parametrize("name", slow_but(["gemma2"], ["llama", "qwen3", "gemma2"]))
def test_a_layer_keeps_what_torch_compile_keeps(name: str) -> None:
    def model() -> PreTrainedModel:
        return tiny_model(name, **SIZE, num_hidden_layers=2, attn_implementation="eager").train()

    eager, by_torch, on_paper = model(), model(), model()
    for layer in layers(by_torch):
        layer.compile(backend="aot_eager_decomp_partition", fullgraph=True)
    compile_on_paper(on_paper)
    with torch._functorch.config.patch(KEEP_LESS):
        (all_of_it, right), (expected, _), (found, gradients) = map(kept, (eager, by_torch, on_paper))
    assert found == pytest.approx(expected, rel=0.02)
    by_default = model()
    for layer in layers(by_default):
        layer.compile(backend="aot_eager_decomp_partition", fullgraph=True)
    torch._dynamo.reset()
    assert found < 0.95 * kept(by_default)[0] < 0.95 * all_of_it
    for one, other in zip(gradients, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)  # norms are in another order


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_pretrained(tmp_path_factory.mktemp("model"), **SIZE, num_hidden_layers=4, num_key_value_heads=2)


def batch(*lengths: int) -> Batch:
    return collate([Example([5] * n, [0.0] * (n // 2) + [1.0] * (n - n // 2)) for n in lengths], 1.0)


def peak(pretrained: str, of: Batch, compiles: bool = False, **settings: Any) -> int:
    layout = Layout("one device", autocast=torch.bfloat16)
    done: Rehearsal = rehearse(SFTModule(pretrained, **settings), of, layout, memory=2.0**30, compiles=compiles)
    return max(live["activations"] for live in done.meter.peaks.values())


def test_on_a_gpu_attention_is_linear_in_tokens_whatever_the_documents(pretrained: str) -> None:
    assert peak(pretrained, batch(400, 400, 400)) == pytest.approx(peak(pretrained, batch(1200)), rel=0.01)
    assert peak(pretrained, batch(1200)) < 2.2 * peak(pretrained, batch(600))


def test_compiled_layers_take_less_and_recomputed_ones_least(pretrained: str) -> None:
    of = batch(1200)
    eager, compiled = peak(pretrained, of), peak(pretrained, of, compiles=True)
    recomputed = peak(pretrained, of, compiles=True, gradient_checkpointing=True)
    assert recomputed < 0.8 * compiled < 0.72 * eager


def test_the_likelihood_of_the_process_is_as_before(pretrained: str) -> None:
    module = SFTModule(pretrained)
    module.configure_model()
    of = batch(30)
    before = module(of).total.item()
    peak(pretrained, of)
    assert module(of).total.item() == before


def test_layers_that_choose_experts_are_planned_all_the_same(tmp_path: Any) -> None:
    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    folder = tiny_pretrained(tmp_path, "qwen3_moe", **SIZE | more)
    assert peak(folder, batch(64), compiles=True) > 0
