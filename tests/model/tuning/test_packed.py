"""Packed weights as parameters of their bytes: the same values, and sharded the same gradients of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_sft import SFTModule
from lightning_sft.demos import tiny_pretrained
from lightning_sft.model.tuning.adapters import Lora
from lightning_sft.model.tuning.packed import unpack, unpacked
from lightning_sft.model.tuning.quantization import _values, is_packed
from lightning_sft.types import InputError
from tests.helpers.adapter_gradients import MODELS, PACKAGES, furthest, launch, run, save
from tests.helpers.slow import slow_but

CPU = torch.device("cpu")
IDS = torch.arange(40).view(2, 20)


def quantized(folder: Path, bits: Any, dora: bool = False) -> Any:
    pytest.importorskip(PACKAGES[bits])
    module = SFTModule(tiny_pretrained(folder, attention_bias=True), lora=Lora(r=4, dora=dora), quantize=bits)
    module.configure_model()
    return module.model


def passed(model: Any) -> list[torch.Tensor]:
    """Logits, and the gradients of the adapters."""
    logits = model(IDS).logits
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [logits, *torch.autograd.grad(logits.square().mean(), trained)]


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_a_layer_computes_the_same_from_the_bytes_of_its_weight(
    tmp_path: Path, bits: str, dtype: torch.dtype, dora: bool
) -> None:
    model = quantized(tmp_path, bits, dora)
    layers = {name: part for name, part in model.named_modules() if is_packed(part._parameters.get("weight", IDS))}
    wanted, values = passed(model), {name: _values(layer) for name, layer in layers.items()}
    unpack(model, dtype, CPU)
    assert {type(p.data) for p in model.parameters()} == {torch.Tensor}
    assert {p.dtype for name, p in model.named_parameters() if "base_layer.weight" in name} == {dtype}
    assert all(torch.equal(a, b) for a, b in zip(passed(model), wanted, strict=True))
    found = unpacked(model)
    assert found.keys() == layers.keys()
    for name, forward in found.items():
        assert torch.equal(forward.values(layers[name].weight), values[name])


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_checkpoints_have_no_packed_weights(tmp_path: Path, bits: str) -> None:
    model = quantized(tmp_path, bits)
    unpack(model, torch.float32, CPU)
    names = model.state_dict().keys()
    assert not [name for name in names if "base_layer.weight" in name]
    assert "model.layers.0.self_attn.q_proj.base_layer.bias" in names
    assert "model.layers.0.self_attn.q_proj.lora_A.default.weight" in names


def test_a_kind_of_packed_weight_that_is_not_known_is_refused_by_name() -> None:
    layer = nn.Embedding(2, 2)
    layer.weight.quant_state = object()  # type: ignore[attr-defined]  # as bitsandbytes marks its own
    with pytest.raises(InputError, match=r"The weights of 0 \(Tensor\) are quantized in a way that cannot be sharded"):
        unpack(nn.Sequential(layer), torch.float32, CPU)


PAIRS = slow_but([("4 bits", 2), ("magnitudes of 8 bits", 2)], [(name, n) for n in (2, 4) for name in MODELS])


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gradients of a model in one process and in several, which are computed when they are asked for."""
    folder = tmp_path_factory.mktemp("gradients")
    pretrained = save(folder / "model")

    def of(name: str, processes: int) -> Any:
        path = folder / f"{name}, {processes}.pt"
        if not path.exists():
            if processes == 1:
                run(pretrained, name, 1, folder)
            else:
                launch([name], processes, pretrained, folder)
        return torch.load(path)

    return of


@pytest.mark.parametrize(("name", "processes"), PAIRS)
def test_each_tensor_beside_a_sharded_base_has_the_gradient_of_one_process(
    gradients: Any, name: str, processes: int
) -> None:
    """In each step of an epoch, also its short last one; four processes split rows by two and recompute layers."""
    bits = MODELS[name].get("quantize")
    pytest.importorskip(PACKAGES.get(bits, "peft"))
    found, wanted = gradients(name, processes), gradients(name, 1)
    assert len(found) == len(wanted) == 8
    assert len(wanted[0]) >= 28
    assert all(gradient.any() for gradient in wanted[0].values())
    for own, other in zip(found, wanted, strict=True):
        error, tensor = furthest(own, other)
        assert error < 2e-6, tensor
