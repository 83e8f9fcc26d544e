"""Gradient checkpointing of every layer, of some, or with inputs in host memory: the same gradients bit for bit."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from lightning_sft import SFTModule
from lightning_sft.data.batches.collate import collate
from lightning_sft.demos import tiny_model, tiny_pretrained
from lightning_sft.main import main
from lightning_sft.model.attention.operator import packed_attention, packed_attention_backward
from lightning_sft.model.recompute import checkpoint_layers
from lightning_sft.model.tuning.adapters import Lora
from lightning_sft.types import InputError
from tests.helpers.gradients import encoded
from tests.helpers.slow import slow_but

LAYERS = 5


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_pretrained(tmp_path_factory.mktemp("deep"), num_hidden_layers=LAYERS)


def gradients(pretrained: str, setting: Any, compiled: bool = False, **settings: Any) -> tuple[list[Tensor], list[int]]:
    """Of what is trained, and how often each layer was computed."""
    module = SFTModule(pretrained, gradient_checkpointing=setting, **settings)
    module.configure_model()
    if settings:  # B of an adapter begins with zeros, which let no gradient through to A
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.01)
    times = Counter[int]()
    if compiled:  # and not counted, which would be a side effect in what is computed again
        for layer in module.model.model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
    for number, layer in enumerate(module.model.model.layers):
        if not compiled:
            layer.mlp.register_forward_pre_hook(lambda *_, number=number: times.update([number]))
    module(collate(encoded(pretrained))).total.neg().backward()
    return [p.grad for p in module.parameters() if p.requires_grad], [times[n] for n in range(LAYERS)]


@pytest.fixture
def as_if_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Offloading is not skipped, and copies to memory that is not pinned. The shapes of what is kept there."""
    kept: list[torch.Size] = []
    pack = torch.autograd.graph.save_on_cpu.__init__

    def init(self: Any, *args: Any, **settings: Any) -> None:
        pack(self, *args, **settings)
        inner = self.pack_hook
        self.pack_hook = lambda tensor: kept.append(tensor.shape) or inner(tensor)

    monkeypatch.setattr(torch.cpu, "is_available", lambda: False)
    monkeypatch.setattr(torch.autograd.graph.save_on_cpu, "__init__", init)
    monkeypatch.setattr(
        "lightning_sft.module.checkpoint_layers",
        lambda model, setting, _, tile_size: checkpoint_layers(model, setting, "cuda", tile_size),
    )
    return kept


@pytest.mark.parametrize("settings", [{}, {"lora": Lora(r=4)}], ids=["whole", "lora"])
@pytest.mark.parametrize(
    ("setting", "times"), [(True, [2] * 5), (1, [2] * 5), (2, [2, 1, 2, 1, 2]), (4, [2, 1, 1, 1, 2]), (False, [1] * 5)]
)
def test_so_many_layers_are_computed_again_and_no_gradient_changes(
    deep: str, setting: Any, times: list[int], settings: dict[str, Any]
) -> None:
    found, counted = gradients(deep, setting, **settings)
    usual, _ = gradients(deep, False, **settings)
    assert counted == times
    assert all(map(torch.equal, found, usual))
    assert all(gradient.any() for gradient in found)


@pytest.mark.parametrize("settings", [{}, {"lora": Lora(r=4)}], ids=["whole", "lora"])
def test_inputs_of_layers_that_are_offloaded_come_back_bit_for_bit(
    deep: str, settings: dict[str, Any], as_if_on_a_gpu: list[torch.Size]
) -> None:
    usual, _ = gradients(deep, False, **settings)
    assert not as_if_on_a_gpu
    found, counted = gradients(deep, "offload", **settings)
    assert counted == [2] * LAYERS
    assert all(map(torch.equal, found, usual))
    tokens = sum(len(example.input_ids) for example in encoded(deep))
    assert as_if_on_a_gpu.count(torch.Size([1, tokens, 16])) == LAYERS  # one input a layer, and no activation


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize("settings", [{}, {"lora": Lora(r=4)}], ids=["whole", "lora"])
@pytest.mark.parametrize("setting", slow_but([2], [True, 2]))
def test_layers_that_are_compiled_and_computed_again_are_one_graph_with_the_same_gradients(
    deep: str, setting: Any, settings: dict[str, Any]
) -> None:
    torch._dynamo.reset()
    found, _ = gradients(deep, setting, compiled=True, **settings)
    usual, _ = gradients(deep, False, **settings)
    assert counters["aot_autograd"]["ok"] > 0
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found, usual, strict=True))


@pytest.fixture
def dropping(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator for packed attention is dropout of queries while it lasts: its kernels for CPUs have none."""

    def forward(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, *settings: Any) -> tuple[Tensor, ...]:
        kept = (torch.rand(query.shape[:2]) >= settings[-1]).T.float().contiguous()
        return query * kept.T[..., None], kept, torch.zeros(2, dtype=torch.uint64)

    def backward(grad_out: Tensor, *saved: Any) -> tuple[Tensor, ...]:
        _, key, value, _, kept, *_ = saved
        return grad_out * kept.T[..., None], torch.zeros_like(key), torch.zeros_like(value)

    for operator, kernel in ((packed_attention, forward), (packed_attention_backward, backward)):
        monkeypatch.setitem(operator._backend_fns, "cpu", kernel)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_attention_that_is_computed_again_drops_the_same_weights(dropping: None, compiled: bool) -> None:
    bounds, longest = torch.tensor([0, 40], dtype=torch.int32), torch.tensor(40)

    def layer(x: Tensor) -> Tensor:
        return packed_attention(x.sin(), x, x, bounds, longest, 0, 1.0, 0.5)[0].exp()

    def computed_again(x: Tensor) -> Any:
        return checkpoint(layer, x, use_reentrant=False)

    torch._dynamo.reset()
    states = torch.linspace(0.1, 1, 640).view(40, 2, 8).requires_grad_()
    run = torch.compile(computed_again, backend="aot_eager", fullgraph=True) if compiled else computed_again
    out = run(states)
    out.sum().backward()
    was_dropped = (out == 1).all(-1, keepdim=True)
    assert 0 < was_dropped.sum() < was_dropped.numel()
    assert torch.allclose(states.grad, torch.where(was_dropped, 0, out * states.cos()))


def test_offloading_on_a_cpu_is_said_to_have_no_effect(deep: str) -> None:
    with pytest.warns(UserWarning, match="offload has no effect on a CPU"):
        _, counted = gradients(deep, "offload")
    assert counted == [2] * LAYERS


@pytest.mark.parametrize("setting", ["of", -1, 1.5, None, "true"])
def test_other_settings_are_refused_with_the_choices(deep: str, setting: Any) -> None:
    with pytest.raises(InputError, match="expected true or false, offload or an integer >= 0"):
        SFTModule(deep, gradient_checkpointing=setting)


@pytest.mark.parametrize(("given", "wanted"), [("true", True), ("false", False), ("offload", "offload"), ("2", 2)])
def test_the_command_line_takes_each(deep: str, jsonl: Any, given: str, wanted: Any, monkeypatch: Any) -> None:
    from lightning_sft.main import SFTCLI

    monkeypatch.setattr(SFTCLI, "_run_subcommand", lambda self, name: None)
    flags = ["--model.pretrained", deep, "--data.train", jsonl([{"prompt": "a", "completion": "b"}])]
    cli = main(["fit", *flags, "--trainer.accelerator", "cpu", "--model.gradient_checkpointing", given])
    assert cli.model.gradient_checkpointing == wanted
    assert type(cli.model.gradient_checkpointing) is type(wanted)


def test_an_architecture_whose_layers_cannot_be_recomputed_is_refused() -> None:
    with pytest.raises(InputError, match=r"gradient_checkpointing=True is not available for OpenAIGPTLMHeadModel"):
        checkpoint_layers(tiny_model("openai-gpt", n_embd=16, n_layer=1, n_head=2), True, "cpu")
