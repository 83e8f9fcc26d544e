"""Adapters on fused experts as those of single experts, by the names of the published checkpoint.

peft holds one pair of matrices for all E experts of a fused parameter: A ``[E · r, in]`` and B ``[out, r · E]``. vLLM
loads most architectures expert by expert: ``experts.0.gate_proj.lora_A.weight``, and so on. The rows of B of
``gate_proj`` and ``up_proj`` are separated, and both get the same A.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lightning_sft.model.tuning.adapters import ADAPTER_NAME
from lightning_sft.types import InputError


def per_expert(model: PreTrainedModel, tensors: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The tensors of adapters with one pair of matrices for each expert.

    All get one rank and one scale, since readers expect them: smaller ranks are padded with zeros.

    Args:
        model: Unsharded model with adapters.
        tensors: Tensors of the adapters by name, as peft gives them.
        config: Config of peft for the folder, adapted in place.

    Raises:
        InputError: When the published checkpoint has its experts fused, too, or with DoRA.
    """
    if config.use_dora:
        raise InputError("Adapters of DoRA cannot be written expert by expert. Use layout='fused'.")
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    rank: int = max(layer.r[ADAPTER_NAME] for layer in layers.values())
    scale: float = min(layer.scaling[ADAPTER_NAME] for layer in layers.values())
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        a, b = (tensors[f"{name}.lora_{letter}.weight"].detach() for letter in "AB")
        b = b * (layer.scaling[ADAPTER_NAME] / scale)
        parameter = f"{name}.weight"
        if hasattr(layer, "parameter_name"):  # of adapters on parameters, which peft nests
            parameter = f"{name.removesuffix('.base_layer')}.{layer.parameter_name}"
            if layer.num_experts > 1:
                a = a.view(layer.num_experts, -1, a.shape[1])  # [E, r, in]
                b = b.view(len(b), -1, layer.num_experts).permute(2, 0, 1)  # [E, out, r]
        missing = rank - a.shape[-2]
        found |= _published(model, parameter, pad(a, (0, 0, 0, missing)), pad(b, (0, missing)))
    config.r, config.lora_alpha, config.use_rslora = rank, rank * scale, False
    config.target_modules = {name.split(".lora_")[0].rpartition(".")[2] for name in found}
    config.target_parameters, config.rank_pattern, config.alpha_pattern = None, {}, {}
    return found


def _published(model: PreTrainedModel, parameter: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Pairs of matrices by the names that published checkpoints have for what is in a parameter.

    The conversion of a parameter to a checkpoint's tensors splits B as it splits the parameter.
    """
    of_b = revert_weight_conversion(model, {parameter: b})
    num_parts = len(of_b) // (len(b) if b.ndim == 3 else 1)
    of_a = revert_weight_conversion(model, {parameter: torch.cat([a] * num_parts, dim=-2)}) if num_parts else {}
    if of_a.keys() != of_b.keys() or any(t.ndim != 2 or len(t) != a.shape[-2] for t in of_a.values()):
        raise InputError(
            f"Published checkpoints of {type(model).__name__} do not have {parameter} expert by expert. Use "
            "layout='fused'."
        )
    found: dict[str, Tensor] = {}
    for name in of_b:
        module = name.removesuffix(".weight")
        found |= {f"{module}.lora_A.weight": of_a[name], f"{module}.lora_B.weight": of_b[name]}
    return found
