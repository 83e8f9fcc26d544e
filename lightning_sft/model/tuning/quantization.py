"""Quantization of the base under adapters to 4 or 8 bits: less memory, but a rounded base."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.quantizers.auto import AutoHfQuantizer

from lightning_sft.types import InputError

Bits = Literal["4bit", "8bit"]

_NEEDS = {"4bit": "bitsandbytes", "8bit": "torchao"}


def check_package(bits: Bits) -> None:
    """Refuse a quantization whose package is missing.

    Args:
        bits: Number of bits, ``4bit`` or ``8bit``.

    Raises:
        InputError: When it is not installed.
    """
    if find_spec(_NEEDS[bits]) is None:
        raise InputError(
            f"model.quantize={bits} needs {_NEEDS[bits]}, which is not installed: "
            "pip install 'lightning-sft[quant]', or leave model.quantize out."
        )


def quantization(bits: Bits, compute_dtype: torch.dtype) -> Any:
    """Config with which transformers quantizes linear layers on loading; embeddings, head and norms are not quantized.

    4 bits are bitsandbytes' NF4 with double quantization (Dettmers et al. 2023, QLoRA). 8 bits are torchao's
    weight-only
    int8: LLM.int8 of bitsandbytes also quantizes activations, depending on the rest of the micro-batch, so the
    likelihood of a document would depend on its neighbors.

    Args:
        bits: Number of bits, ``4bit`` or ``8bit``.
        compute_dtype: Dtype of the matmuls with 4-bit weights.

    Raises:
        InputError: When the required package is not installed.
    """
    check_package(bits)
    if bits == "8bit":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def quantize_empty(model: PreTrainedModel, config: Any) -> None:
    """Put the layers of a quantization into an empty model, in place; their weights are quantized when they are read.

    Args:
        model: Model on the meta device.
        config: Result of :func:`quantization`.
    """
    quantizer: Any = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.validate_environment(device_map=None)
    quantizer.preprocess_model(model, device_map=None)
    cast(Any, model).hf_quantizer = quantizer
    quantizer.postprocess_model(model)


def plain_layers(model: nn.Module) -> dict[int, nn.Module]:
    """For each layer of :func:`quantize_empty`, by its id, a plain one to stand for it in a copy: for ``deepcopy``."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and is_packed(module.weight):
            shape, dtype = (module.in_features, module.out_features), module.weight.dtype
            found[id(module)] = nn.Linear(*shape, module.bias is not None, dtype=dtype, device="meta")
    return found


def prepare(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Make 4-bit layers compute in a dtype, whatever they were saved with, and keep them differentiable; in place.

    On CPUs with bfloat16 instructions, bitsandbytes permanently repacks 4-bit weights for inference at the first
    forward pass in evaluation mode: training would then continue with bfloat16 matmuls whose inputs get no gradient
    (seen with 0.50).

    Args:
        model: Model, quantized or not.
        compute_dtype: Dtype of the matmuls with 4-bit weights.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            layer = cast(Any, module)
            layer.support_avx512bf16_for_cpu = False
            layer.compute_dtype, layer.compute_type_is_set = compute_dtype, True


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether transformers has quantized the model."""
    return getattr(model, "hf_quantizer", None) is not None


def keep_out_of_broadcasts(module: nn.Module) -> None:
    """Exclude quantized matrices, equal on all ranks, from DDP's initial broadcast, which does not support them.

    Args:
        module: Module that DDP is going to wrap.
    """
    packed = [name for name, parameter in module.named_parameters() if is_packed(parameter)]
    if packed:
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, packed)


def dequantize(model: PreTrainedModel) -> None:
    """Replace quantized linear layers by plain ones of the same values, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and is_packed(module.weight):
            weight = _values(module)
            plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, device=weight.device)
            plain.weight.data, plain.bias = weight, module.bias
            model.set_submodule(name, plain)
    remove_marks(model)


def remove_marks(model: PreTrainedModel) -> None:
    """Remove what would prevent transformers from saving a model whose weights are plain, in place."""
    quantizer: Any = model.hf_quantizer
    quantizer.remove_quantization_config(model)
    for mark in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(model).pop(mark, None)


def is_packed(weight: Tensor) -> bool:
    """Whether a weight is a quantized matrix; the shards of FSDP2 are tensors of a class of their own too."""
    is_wrapper = is_traceable_wrapper_subclass(weight.data) and not hasattr(weight, "full_tensor")
    return is_wrapper or any(hasattr(weight, mark) for mark in ("quant_state", "SCB"))


def _values(module: Any) -> Tensor:
    weight = module.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        values: Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return values.to(torch.get_default_dtype())
    if hasattr(weight, "SCB"):  # LLM.int8: the largest entry of each row, which is 127
        rows: Tensor = weight.data.to(torch.get_default_dtype()) * (weight.SCB[:, None] / 127)
        return rows
    whole: Tensor = weight.dequantize()
    return whole
