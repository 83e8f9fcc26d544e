"""Mixed precision: half precision also for what autocast does not cover.

Autocast casts the inputs of matmuls. Everything between them follows the parameters, which are float32: embeddings,
hence the residual stream; outputs of norms, which each matmul then casts for itself; and experts, whose ``grouped_mm``
autocast does not know. Here all of these have the dtypes of a model that transformers loads in bfloat16, while
parameters, gradients and optimizer state stay float32. Without autocast nothing changes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lightning_sft.machine.contexts import autocast_dtype
from lightning_sft.model.parallel.sharding import layers
from lightning_sft.model.pretrained import names_kept_in_float32
from lightning_sft.types import InputError

EXPERTS = {stock: f"autocast_{stock}" for stock in ("grouped_mm", "batched_mm")}
"""Names under which the autocast-aware experts are registered in transformers, by the stock implementation."""


def follow_autocast(model: PreTrainedModel) -> str | None:
    """Make a model compute in the autocast dtype whenever autocast is on, now or later.

    The residual stream and the outputs of norms follow bfloat16 only: in float16, sums over layers overflow in some
    models. Experts follow both dtypes.

    Args:
        model: Model to change in place, by hooks; its parameters are not touched.

    Returns:
        The reason why the residual stream stays in float32, or ``None``.
    """
    _experts_follow(model)
    _keep_routers_in_float32(model)
    if getattr(model.config.get_text_config(), "residual_in_fp32", False):
        return "its config sets residual_in_fp32"
    try:
        decoder_layers = layers(model)
    except InputError as error:
        return str(error).rstrip(".")
    model.get_input_embeddings().register_forward_hook(_rounded_output)
    for layer in decoder_layers:
        layer.register_forward_pre_hook(_with_rounded_states, with_kwargs=True)
    for module in model.modules():
        if "Norm" in type(module).__name__:
            module.register_forward_hook(_in_dtype_of_input)
    return None


def _rounded(value: Any) -> Any:
    """A float32 tensor cast to bfloat16 if that is the autocast dtype; anything else unchanged."""
    if isinstance(value, Tensor) and value.dtype == torch.float32 and autocast_dtype(value.device) == torch.bfloat16:
        return value.to(torch.bfloat16)
    return value


def _rounded_output(module: nn.Module, args: Any, output: Any) -> Any:
    return _rounded(output)


def _with_rounded_states(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args:
        return (_rounded(args[0]), *args[1:]), kwargs
    return args, kwargs | {name: _rounded(kwargs[name]) for name in kwargs.keys() & {"hidden_states"}}


def _in_dtype_of_input(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Round a norm's output, computed in float32 or multiplied by float32 weights, once and here."""
    is_in_16_bits = len(args) > 0 and isinstance(args[0], Tensor) and args[0].dtype == torch.bfloat16
    return _rounded(output) if is_in_16_bits else output


def _experts_follow(model: PreTrainedModel) -> None:
    if model._can_set_experts_implementation():
        chosen = model.get_experts_implementation()
        model.set_experts_implementation({part: EXPERTS.get(name or "", name) for part, name in chosen.items()})


def _experts(stock: str, module: nn.Module, hidden_states: Tensor, *routing: Tensor) -> Tensor:
    """Stock experts with parameters in the autocast dtype; ``[T, H]`` to ``[T, H]``."""
    dtype = autocast_dtype(hidden_states.device)
    parameters = module if dtype is None else _Cast(module, dtype)
    output: Tensor = ALL_EXPERTS_FUNCTIONS[stock](parameters, hidden_states, *routing)
    return output


class _Cast:
    """View of a module with its parameters cast to another dtype; gradients flow to the originals."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._module, self._dtype = module, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return value.to(self._dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _keep_routers_in_float32(model: PreTrainedModel) -> None:
    """Exempt modules that transformers keeps in float32 in half precision, such as routers of DeepSeek-V3."""
    pattern = names_kept_in_float32(model)
    if pattern is None:
        return
    for prefix, module in model.named_modules():
        names = [name for name, _ in module.named_parameters(prefix)]
        if module._parameters and names and all(map(pattern.search, names)):
            module.forward = partial(_without_autocast, type(module).forward, module)


def _without_autocast(forward: Any, module: nn.Module, states: Tensor, *args: Any, **kwargs: Any) -> Any:
    weight = next(module.parameters())
    with torch.autocast(states.device.type, enabled=False):
        return forward(module, states.to(weight.dtype), *args, **kwargs)


for _stock, _name in EXPERTS.items():
    ALL_EXPERTS_FUNCTIONS.register(_name, partial(_experts, _stock))
