"""Injecting peft adapters into a transformers model, and merging them.

Adapters are injected in place, so the model stays the PreTrainedModel that the rest of the package expects.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_sft.io.arguments import BelowOne, Count, check_arguments, made
from lightning_sft.io.named import our_names
from lightning_sft.machine.contexts import narrow
from lightning_sft.model.pretrained import outside_language_model
from lightning_sft.model.tuning import new_tokens
from lightning_sft.model.tuning import quantization as quantized
from lightning_sft.model.tuning.base_dtype import BaseDtype
from lightning_sft.types import InputError

ADAPTER_NAME = "default"


@our_names
@dataclass(frozen=True)
class Lora:
    """Low-rank adapters: ``W x + (alpha / r) · B A x``, where only A and B are trained (Hu et al. 2021, LoRA).

    Args:
        r: Rank of the adapters.
        alpha: Numerator of the scale ``alpha / r``.
        dropout: Dropout probability on the input of each adapter.
        targets: Names of the modules to adapt, such as ``[q_proj, v_proj]``, or of parameters of fused experts, such as
            ``experts.down_proj``; by default all linear layers but the head.
        exclude: Names of modules to leave without adapters.
        dora: Whether to train magnitude and direction of the weights separately (Liu et al. 2024, DoRA).
        rslora: Whether to scale by ``alpha / √r`` instead (Kalajdzievski 2023, rsLoRA).
        init: Initialization of A; B starts at zero, so that training starts at the pretrained model.
        base_dtype: Dtype that the frozen base is rounded to, and stored in under ``bf16-mixed``; by default bfloat16
            there if the checkpoint is stored in bfloat16, else float32. Trained parameters are always float32.
    """

    r: Count = 16
    alpha: Count = 32
    dropout: BelowOne = 0.0
    targets: Literal["all-linear"] | list[str] = "all-linear"
    exclude: list[str] = field(default_factory=list)
    dora: bool = False
    rslora: bool = False
    init: Literal["kaiming", "gaussian"] = "kaiming"
    base_dtype: BaseDtype | None = None

    def __post_init__(self) -> None:
        check_arguments(Lora, vars(self), "model.lora")

    @classmethod
    def of(cls, given: Lora | Mapping[str, Any] | None) -> Lora | None:
        """Convert the plain dictionary of a config or checkpoint; other values are returned unchanged."""
        found: Lora | None = made(cls, given)
        return found


def check_peft() -> None:
    """Refuse to train adapters without peft.

    Raises:
        InputError: When it is not installed.
    """
    if find_spec("peft") is None:
        raise InputError("model.lora needs peft: pip install 'lightning-sft[peft]'.")


def inject(model: PreTrainedModel, lora: Lora) -> None:
    """Inject adapters into a model, in place, and freeze all other parameters.

    Raises:
        InputError: When peft is missing, or a name matches no module or tied embeddings.
    """
    check_peft()
    from peft import LoraConfig, inject_adapter_in_model

    _check_names(model, lora)
    experts = [t for t in lora.targets if _ending(t, _fused(model))] if lora.targets != "all-linear" else []
    try:
        config: Any = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.targets if not experts else [t for t in lora.targets if t not in experts],
            target_parameters=experts or None,
            exclude_modules=[*lora.exclude, *_without_adapters(model)] or None,
            use_dora=lora.dora,
            use_rslora=lora.rslora,
            init_lora_weights=True if lora.init == "kaiming" else lora.init,
            task_type="CAUSAL_LM",
        )
        with _as_if_wide(model), warnings.catch_warnings():  # fused experts of two matrices share one rank
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
            inject_adapter_in_model(config, model, ADAPTER_NAME)
    except ValueError as error:
        raise InputError(f"model.lora cannot be put into {type(model).__name__}: {error}") from error
    adapted = {name.replace(".base_layer", "") for name in _layers(model)}
    without = [name for name in _fused(model) if name.rpartition(".")[0].replace(".base_layer", "") not in adapted]
    if without and lora.targets == "all-linear":
        rank_zero_info(
            f"The fused experts of {type(model).__name__} get no adapters, such as {without[0]}: all-linear of peft "
            "does not know them. To adapt them, list them with the other modules in model.lora.targets."
        )
    for layer in _layers(model).values():
        if lora.dora:  # magnitudes are computed from the matrices; DoRA keeps casting to the dtype of its input
            layer.lora_variant[ADAPTER_NAME].init(layer, ADAPTER_NAME)
        else:
            layer._cast_input_dtype = _unless_autocast


def widen(parameters: Iterable[nn.Parameter]) -> None:
    """Cast parameters to torch's default dtype, in place."""
    for parameter in parameters:
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.get_default_dtype())


def has_adapters(model: nn.Module) -> bool:
    """Whether the model has adapters, or rows of new tokens that are trained separately from their matrix."""
    return hasattr(model, "peft_config") or bool(new_tokens.modules(model))


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return ".lora_" in name


@contextmanager
def without_adapters(model: PreTrainedModel) -> Iterator[None]:
    """The model has the modules and names of the pretrained one; its adapters are put back afterwards."""
    outer = outer_adapters(model)
    for name, layer in outer.items():
        model.set_submodule(name, layer.get_base_layer())
    try:
        yield
    finally:
        for name, layer in outer.items():
            model.set_submodule(name, layer)


def outer_adapters(model: PreTrainedModel) -> dict[str, Any]:
    """The layers that peft has wrapped around modules, by the names of these; of nested ones the outermost."""
    layers = _layers(model) if hasattr(model, "peft_config") else {}
    inner = {name for name in layers if name.removesuffix(".base_layer") in layers.keys() - {name}}
    return {name: layer for name, layer in layers.items() if name not in inner}


def merged(layer: Any) -> nn.Module:
    """The module in an adapter layer, with its adapters, also those nested in it, merged into its weights in place."""
    if hasattr(layer, "unload_and_optionally_merge_module"):
        whole: nn.Module = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        return whole
    layer.merge()
    base: nn.Module = layer.get_base_layer()
    return base


def merged_into(values: Tensor, bias: Tensor | None, adapter: Mapping[str, Tensor], config: Any) -> nn.Module:
    """A linear layer with an adapter merged into its weights.

    Args:
        values: Weights of the layer, ``[out, in]``.
        bias: Bias of the layer, ``[out]``, or ``None``.
        adapter: Tensors of the adapter, by their names in peft's layer.
        config: Config of the adapters, of peft.
    """
    from peft import inject_adapter_in_model

    plain: Any = nn.Linear(values.shape[1], values.shape[0], bias=bias is not None, dtype=values.dtype, device="meta")
    plain.weight = nn.Parameter(values, requires_grad=False)
    plain.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    own = deepcopy(config)
    own.target_modules, own.exclude_modules, own.target_parameters = {"layer"}, None, None
    with torch.random.fork_rng(devices=[]):
        holder: Any = inject_adapter_in_model(own, nn.ModuleDict({"layer": plain}), ADAPTER_NAME)
    holder["layer"].load_state_dict(adapter, strict=False)
    return merged(holder["layer"])


def merge(model: PreTrainedModel) -> PreTrainedModel:
    """Merge adapters and rows of new tokens into the weights, in place, which leaves a plain model.

    A quantized base is dequantized first, to exactly the values that the adapters were trained on.

    Args:
        model: Model with or without adapters, unsharded.

    Returns:
        The same model, merged in place.
    """
    new_tokens.merge(model)
    if not hasattr(model, "peft_config"):
        return model
    if quantized.is_quantized(model):
        config: Any = model.peft_config[ADAPTER_NAME]
        adapters = {key: value for key, value in model.state_dict().items() if is_adapter(key)}
        _unload(model, merges=False)
        quantized.dequantize(model)
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, model, ADAPTER_NAME)
        model.load_state_dict(adapters, strict=False)
    _unload(model, merges=True)
    return model


def _without_adapters(model: PreTrainedModel) -> list[str]:
    """Names of the modules that get no adapters: those that text does not use, Llama 4's routers, Mamba's projections.

    Such a router is a linear layer by its class, but its forward pass returns scores of experts as well. Fused kernels
    read the weight of a projection out of a Mamba layer past its adapter; peft refuses some of them, too.
    """
    names = {name.rpartition(".")[0] for name in outside_language_model(model)}
    linear = ((name, type(module)) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    names |= {name for name, kind in linear if kind is not nn.Linear and name.endswith(".router")}
    names |= {f"{name}.out_proj" for name, module in model.named_modules() if _is_mamba(module)}
    return sorted(names - {""})


def _is_mamba(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("conv1d", "A_log", "D", "out_proj"))


def _check_names(model: PreTrainedModel, lora: Lora) -> None:
    names = [name for name, _ in model.named_modules()]
    targets = [] if lora.targets == "all-linear" else lora.targets
    unknown = [target for target in targets if not _ending(target, [*names, *_fused(model)])]
    unknown += [target for target in lora.exclude if not _ending(target, names)]
    if unknown:
        leaves = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise InputError(f"model.lora names {unknown}, which match no module. The linear layers are {leaves}.")
    if model.config.get_text_config().tie_word_embeddings and lora.targets != "all-linear":
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        tied = [name for name, module in model.named_modules() if module in ends]
        if wrong := [t for t in lora.targets if _ending(t, tied)]:
            raise InputError(
                f"model.lora.targets includes {wrong}, but embeddings and head are tied in this model, so merging an "
                "adapter into one would change the other. Remove it, or train the matrix: model.trained=['*embed*']."
            )


def _ending(target: str, names: Iterable[str]) -> bool:
    """Whether a target, which may be the end of a name, is one of the names."""
    return any(name == target or name.endswith(f".{target}") for name in names)


def _fused(model: PreTrainedModel) -> list[str]:
    """Names of the parameters that hold a matrix for each expert, ``[E, out, in]`` or ``[E, in, out]``."""
    experts = {name: part for name, part in model.named_modules() if "Experts" in type(part).__name__}
    own = ((f"{name}.{end}", p) for name, part in experts.items() for end, p in part.named_parameters(recurse=False))
    return [name for name, parameter in own if parameter.ndim == 3]


@contextmanager
def _as_if_wide(model: nn.Module) -> Iterator[None]:
    """Replace low-precision parameters by zeros in torch's default dtype, which take no memory.

    peft creates adapters in the dtype of their matrix. Their initial values thus do not depend on the base dtype.
    """
    held = {parameter: parameter.data for parameter in narrow(model)}
    for parameter in held:
        parameter.data = torch.zeros((), device=parameter.device).expand(parameter.shape)
    try:
        yield
    finally:
        for parameter, values in held.items():
            parameter.data = values


def _unless_autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast the input of an adapter to the dtype of its weights, except under autocast, which would cast it back.

    The adapters of query, key and value thus save one tensor for the backward pass instead of three copies.
    """
    return x if torch.is_autocast_enabled(x.device.type) else x.to(dtype)


def _layers(model: nn.Module) -> dict[str, Any]:
    """The layers that peft has wrapped around modules, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _unload(model: PreTrainedModel, merges: bool) -> None:
    for name, layer in outer_adapters(model).items():
        model.set_submodule(name, merged(layer) if merges else layer.get_base_layer())
    del model.peft_config
