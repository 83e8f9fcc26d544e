"""Packed weights as parameters of their bytes: the same values, in one process; test_strategies shards them."""

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

CPU = torch.device("cpu")
IDS = torch.arange(40).view(2, 20)


def quantized(folder: Path, bits: Any) -> Any:
    pytest.importorskip({"4bit": "bitsandbytes", "8bit": "torchao"}[bits])
    module = SFTModule(tiny_pretrained(folder, attention_bias=True), lora=Lora(r=4), quantize=bits)
    module.configure_model()
    return module.model


def passed(model: Any) -> list[torch.Tensor]:
    """Logits, and the gradients of the adapters."""
    logits = model(IDS).logits
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [logits, *torch.autograd.grad(logits.square().mean(), trained)]


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_the_same_from_the_bytes_of_its_weight(tmp_path: Path, bits: str, dtype: torch.dtype) -> None:
    model = quantized(tmp_path, bits)
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
