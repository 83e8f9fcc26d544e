"""Quantized layers whose packed weights are plain parameters, so that FSDP2 shards and gathers them like any other.

A weight of 4 or 8 bits is a matrix of integers, and some numbers for each block or row. The integers become a parameter
of their bytes in the dtype that FSDP2 gathers in: gathering copies bits, and casts nothing that has this dtype already.
The numbers, 3 % of 4-bit weights, stay on every rank. Neither is in checkpoints: a base is quantized on loading.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_sft.model.tuning.quantization import is_packed
from lightning_sft.types import InputError


def unpack(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Turn the packed weights of a model's layers into parameters of their bytes, in place.

    Args:
        model: Model, quantized or not.
        dtype: Dtype that parameters are gathered in.
        device: Device of the forward pass.

    Raises:
        InputError: When weights are packed in a way that is not known here.
    """
    for name, layer in model.named_modules():
        weight = layer._parameters.get("weight")
        if weight is not None and is_packed(weight):
            if not isinstance(layer, nn.Linear) or not _is_known(weight):
                raise InputError(
                    f"The weights of {name} ({type(weight.data).__name__}) are quantized in a way that cannot be "
                    "sharded. Use trainer.strategy=ddp, or a model before quantization with model.quantize."
                )
            unpacked_layer, forward = cast(Any, layer), _Unpacked(layer, dtype, device)
            unpacked_layer.forward = forward
            # DoRA of peft reads the weight by itself: by this function, if a layer has this name (as those of HQQ have)
            unpacked_layer.dequantize, unpacked_layer.W_q = forward.dequantize, True
            layer.register_state_dict_post_hook(_leave_out)


def unpacked(model: nn.Module) -> dict[str, _Unpacked]:
    """How the layers of a model with such parameters compute, by name."""
    found = {name: module.forward for name, module in model.named_modules()}
    return {name: forward for name, forward in found.items() if isinstance(forward, _Unpacked)}


def _is_known(weight: nn.Parameter) -> bool:
    if hasattr(weight, "quant_state"):
        return True
    data: Any = weight.data
    names = data.__tensor_flatten__()[0] if is_traceable_wrapper_subclass(data) else []
    return bool(names) and all(type(getattr(data, name)) is Tensor for name in names)


def _leave_out(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    state.pop(f"{prefix}weight", None)


class _Unpacked:
    """Forward pass of a quantized linear layer, ``[..., in]`` to ``[..., out]``, by a parameter of its weight's bytes.

    Args:
        layer: The layer; its weight is replaced.
        dtype: Dtype of the new parameter, ``[bytes / size]``.
        device: Device of the forward pass.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype, device: torch.device) -> None:
        weight: Any = layer.weight
        self.layer, self.kind = layer, type(weight.data)
        self.state: Any = getattr(weight, "quant_state", None)  # of bitsandbytes
        self.others: dict[str, Tensor] = {}  # of torchao
        if self.state is not None:
            integers = weight.data
            self.state.to(device)
        else:
            names, self.settings = weight.data.__tensor_flatten__()
            parts = {name: getattr(weight.data, name) for name in names}
            self.name = max(parts, key=lambda name: parts[name].nbytes)
            integers = parts.pop(self.name)
            self.others = {name: part.to(device) for name, part in parts.items()}
            self.shape, self.stride = weight.data.shape, weight.data.stride()
        self.packed_shape, self.packed_dtype, self.num_bytes = integers.shape, integers.dtype, integers.nbytes
        held = integers.contiguous().view(-1).view(torch.uint8)
        padded = torch.nn.functional.pad(held, (0, -len(held) % dtype.itemsize))
        layer.weight = nn.Parameter(padded.view(dtype), requires_grad=False)

    def __call__(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        weight = self._packed(layer.weight)
        if self.state is None:
            return torch.nn.functional.linear(x, weight, layer.bias)
        import bitsandbytes

        multiply: Any = cast(Any, bitsandbytes).matmul_4bit
        dtype = layer.compute_dtype or x.dtype
        bias = None if layer.bias is None else layer.bias.to(dtype)
        product: Tensor = multiply(x.to(dtype), weight, quant_state=self.state, bias=bias)
        return product.to(x.dtype)

    def values(self, weight: Tensor) -> Tensor:
        """The dequantized matrix ``[out, in]`` on the CPU, from the whole parameter."""
        values = self._dequantized(weight).cpu()
        return values if self.state is None else values.to(torch.get_default_dtype())

    def dequantize(self) -> Tensor:
        """The dequantized matrix ``[out, in]``, while the layer's parameter is gathered."""
        return self._dequantized(self.layer.weight.detach())

    def _dequantized(self, weight: Tensor) -> Tensor:
        packed: Any = self._packed(weight)
        if self.state is None:
            whole: Tensor = packed.dequantize()
            return whole
        from bitsandbytes.functional import dequantize_4bit

        values: Tensor = dequantize_4bit(packed, self.state)
        return values

    def _packed(self, weight: Tensor) -> Tensor:
        """The weight as the package that has quantized it holds it."""
        integers = weight.view(torch.uint8)[: self.num_bytes].view(self.packed_dtype).view(self.packed_shape)
        if self.state is not None:
            return integers
        kind: Any = self.kind
        packed: Tensor = kind.__tensor_unflatten__(
            self.others | {self.name: integers}, self.settings, self.shape, self.stride
        )
        return packed
