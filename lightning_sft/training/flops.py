"""Floating-point operations of a training step, counted from a model's parameters and its configuration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Reach = tuple[Literal["full", "sliding", "chunked"], int]
"""Which keys a query sees: all before it, those of a window of so many tokens, or those of its chunk of so many."""

_REACHES: dict[str, str | None] = {  # of transformers' layer types; None for layers that compare no pairs of tokens
    "full_attention": "full",
    "hybrid": "full",
    "global": "full",
    "sliding_attention": "sliding",
    "hybrid_sliding": "sliding",
    "local": "sliding",
    "chunked_attention": "chunked",
    "linear_attention": None,
    "conv": None,
    "moe": None,
    "mlp": None,
}
_LIKE_NO_OTHER = ("cpmant", "diffllama", "dory", "hrm_text")  # layers that run several times, or attend in another way
_SIZES = {"sliding": ("sliding_window", "window_size"), "chunked": ("attention_chunk_size",)}
_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_NUM_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")


@dataclass(frozen=True)
class Flops:
    """Operations of a training step, per token, per target, and per pair of attending tokens.

    Args:
        per_token: Operations per token in all matrices of the layers.
        per_target: Operations per target in the head, which is applied only to positions with a target.
        per_pair: Operations per pair of tokens in attention, summed over the layers of each reach.

    >>> Flops(6.0, 2.0, {("full", 0): 12.0, ("sliding", 2): 1.0}).of_pairs([3])  # 6 pairs, of which 5 are in the window
    77.0
    """

    per_token: float
    per_target: float
    per_pair: Mapping[Reach, float]

    def of_pairs(self, lengths: Iterable[int]) -> float:
        """Operations of attention in documents of these lengths."""
        lengths = list(lengths)
        return sum(cost * sum(_pairs(n, reach) for n in lengths) for reach, cost in self.per_pair.items())


def flops(model: PreTrainedModel) -> Flops | None:
    """Model FLOPs of a training step, as in appendix B of PaLM (https://arxiv.org/abs/2204.02311), by document.

    A matrix of n parameters takes 2n operations a token in the forward pass, 2n for the gradient of its input, and,
    where it is trained, 2n for its own. A pair of tokens takes 6 · (width of all queries + width of all values) in each
    layer with attention: scores and weighted sums, forward and twice backward. Only the experts that a
    token is routed to count. Norms, activation functions, and the recurrences of state-space and linear-attention
    layers are not counted, nor is recomputation by gradient checkpointing: this is for MFU, not HFU.

    Args:
        model: Transformers model; parameters may be sharded or quantized.

    Returns:
        The operations, or ``None`` if the configuration does not define the attention pattern or the active experts.
    """
    config = model.config.get_text_config()
    per_pair = None if config.model_type in _LIKE_NO_OTHER else _attention(model, config)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if per_pair is None or embeddings is None or head is None:
        return None
    ends = {id(parameter) for end in (embeddings, head) for parameter in end.parameters()}
    decoder = model.get_decoder()  # of models that also see or hear, the part that reads texts
    if embeddings not in decoder.modules():
        decoder = model.base_model
    active = _share_of_experts(config)
    per_token = 0.0
    for name, parameter in _matrices(decoder):
        if id(parameter) not in ends:
            shape = _shape(parameter)
            if "experts" in name.split(".") or (len(shape) == 3 and shape[0] == _first(config, _NUM_EXPERTS)):
                if active is None:
                    return None
                per_token += active * _cost(parameter)
            else:
                per_token += _cost(parameter)
    return Flops(per_token, float(sum(_cost(p) for _, p in _matrices(head))), per_pair)


def _pairs(length: int, reach: Reach) -> int:
    """Pairs of tokens of a document that attend."""
    kind, size = reach
    if kind == "chunked":
        return length // size * _triangle(size) + _triangle(length % size)
    inside = length if kind == "full" else min(length, size)
    return _triangle(inside) + (length - inside) * inside


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


def _attention(model: PreTrainedModel, config: Any) -> dict[Reach, float] | None:
    types = _value(config, "layer_types") or _value(config, "attention_layers")
    if types is None and getattr(model, "_is_stateful", False):  # recurrent, as RWKV
        return {}
    if types is None:
        has_window = _value(config, "sliding_window") is not None
        types = ["sliding_attention" if has_window else "full_attention"] * config.num_hidden_layers
    found: dict[Reach, float] = {}
    for layer, of_layer in enumerate(types):
        kind: Any = _REACHES.get(of_layer, "")
        if kind is None:
            continue
        own = config.per_layer_config[layer] if getattr(config, "is_heterogeneous", False) else config
        size, width = _first(own, _SIZES.get(kind, ())), _width(own)
        if kind == "" or width is None or (kind != "full" and size is None):
            return None
        reach: Reach = (kind, size if kind != "full" and size is not None else 0)
        found[reach] = found.get(reach, 0.0) + 6.0 * width
    return found


def _width(config: Any) -> int | None:
    """Numbers of all queries and of all values of a token in a layer, added up."""
    heads = _value(config, "num_attention_heads")
    if not isinstance(heads, int) or any(_value(config, name) for name in _OF_SOME_LAYERS):
        return None
    if _value(config, "kv_lora_rank"):  # latent attention, as DeepSeek's: queries are wider than values
        return int(heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim))
    size = _value(config, "head_dim") or config.hidden_size // heads
    return int(heads * (size + (_value(config, "v_head_dim") or size)))


_OF_SOME_LAYERS = ("swa_head_dim", "swa_num_attention_heads", "num_attention_heads_per_layer")


def _share_of_experts(config: Any) -> float | None:
    total, active = _first(config, _NUM_EXPERTS), _first(config, _NUM_ACTIVE)
    return active / total if total and active else None


def _first(config: Any, names: Iterable[str]) -> int | None:
    found = (_value(config, name) for name in names)
    return next((value for value in found if isinstance(value, int)), None)


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except RuntimeError:  # raised by transformers for values that differ between layers
        return None


def _matrices(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that tokens are multiplied by, as often as they are used: some architectures share layers."""
    for name, part in module.named_modules(remove_duplicate=False):
        if not isinstance(part, nn.Embedding):
            for own, parameter in part.named_parameters(recurse=False):
                is_added = own.endswith(("bias", "A_log"))  # or scales
                if sum(n > 1 for n in _shape(parameter)) > 1 and not is_added:
                    yield name, parameter


def num_weights(parameter: nn.Parameter) -> int:
    """Number of weights of a parameter: of the whole matrix, where it is sharded or packed."""
    return math.prod(_shape(parameter))


def _cost(parameter: nn.Parameter) -> int:
    return num_weights(parameter) * (6 if parameter.requires_grad else 4)


def _shape(parameter: Any) -> tuple[int, ...]:
    """Shape of the whole matrix, also if ZeRO-3 has sharded it or bitsandbytes has packed it."""
    packed = getattr(parameter, "quant_state", None)
    return tuple(getattr(parameter if packed is None else packed, "ds_shape", (packed or parameter).shape))
