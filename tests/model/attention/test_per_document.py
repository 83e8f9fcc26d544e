from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, DynamicCache, LlamaConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.llama.modeling_llama import LlamaAttention

from lightning_sft.data.batches.collate import collate
from lightning_sft.demos import tiny_model
from lightning_sft.model.attention import per_document as implementation
from lightning_sft.model.attention.documents import Documents
from lightning_sft.model.attention.operator import packed_attention
from lightning_sft.model.attention.per_document import NAMES, rows_of_documents
from lightning_sft.model.backbone import backbone_and_head, hidden_states
from lightning_sft.types import Example
from tests.model.attention.reference import attend_one_by_one

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
OF_EAGER = 1e-5  # its softmax is in float32, whatever the inputs are
SIZE, SCALE = 8, 0.3


def layer(heads: int, groups: int, window: int | None, name: str) -> LlamaAttention:
    config = LlamaConfig(
        hidden_size=heads * SIZE, num_attention_heads=heads, num_key_value_heads=heads // groups, head_dim=SIZE
    )
    config._attn_implementation = name
    config.sliding_window = window
    return LlamaAttention(config, 0)


def mask_of(config: Any, positions: Tensor, dtype: torch.dtype, **other: Any) -> Any:
    """As a model makes it."""
    make = create_causal_mask if config.sliding_window is None else create_sliding_window_causal_mask
    given = {"attention_mask": None, "cache": None, "position_ids": positions, **other}
    with rows_of_documents(positions):
        return make(config, inputs_embeds=torch.zeros(*positions.shape, 4, dtype=dtype), **given)


def through_ours(module: Any, tensors: list[Tensor], mask: Any, **other: Any) -> Tensor:
    """``[B, N, heads, head size]``; heads are laid inside of tokens, as models do it."""
    function: Callable[..., Any] = AttentionInterface()[module.config._attn_implementation]
    query, key, value = (x.transpose(1, 2) for x in tensors)
    output: Tensor = function(module, query, key, value, mask, scaling=SCALE, **{"dropout": 0.0, **other})[0]
    return output


def random_tensors(shape: tuple[int, int], heads: int, groups: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(*shape, count, SIZE, dtype=dtype, generator=generator).requires_grad_()
        for count in (heads, heads // groups, heads // groups)
    ]


def positions_of(lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


@settings(max_examples=50)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.sampled_from([(2, 1), (4, 2), (3, 3)]),
    st.none() | st.integers(1, 9),
    st.sampled_from(list(NAMES.values())),
    st.sampled_from(list(TOLERANCE)),
    st.booleans(),
)
def test_it_is_attention_within_each_document_forward_and_backward(
    lengths: list[int], heads: tuple[int, int], window: int | None, name: str, dtype: torch.dtype, two_rows: bool
) -> None:
    module, positions = layer(*heads, window, name), positions_of(lengths)
    if two_rows:  # of other documents
        positions = torch.cat([positions, positions_of(lengths[::-1])])
    tensors = random_tensors((positions.shape[0], positions.shape[1]), *heads, dtype)
    own = through_ours(module, tensors, mask_of(module.config, positions, dtype))
    rows = [lengths, lengths[::-1]][: positions.shape[0]]
    wanted = torch.stack(
        [attend_one_by_one(*(x[i] for x in tensors), row, window, SCALE) for i, row in enumerate(rows)]
    )
    tolerance = OF_EAGER if name == NAMES["eager"] else TOLERANCE[dtype]
    assert own.shape == wanted.shape
    assert (own - wanted).abs().max() <= tolerance
    upstream = torch.randn_like(wanted)
    gradients = [torch.autograd.grad(output, tensors, upstream) for output in (own, wanted)]
    for mine, right in zip(*gradients, strict=True):
        assert (mine - right).abs().max() <= tolerance * max(1, right.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_right_up_to_its_rounding(dtype: torch.dtype) -> None:
    module, lengths = layer(4, 2, 5, "per_document"), [7, 1, 9]
    tensors = random_tensors((1, 17), 4, 2, dtype)
    own = through_ours(module, tensors, mask_of(module.config, positions_of(lengths), dtype))
    wanted = attend_one_by_one(*(x[0].double() for x in tensors), lengths, 5, SCALE)
    assert own.dtype == dtype
    assert (own[0].double() - wanted).abs().max() <= 0.02


class Largest(TorchDispatchMode):
    """The most elements that a tensor has that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            self.numel = max(self.numel, x.numel() if isinstance(x, Tensor) else 0)
        return result


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("name", "is_ours"), [("per_document", True), ("sdpa", False)])
def test_nothing_has_the_size_of_the_row_squared(name: str, is_ours: bool, window: int | None) -> None:
    module, positions = layer(2, 1, window, name), positions_of([64] * 32)
    tensors = random_tensors((1, 2048), 2, 1, torch.float32)
    with Largest() as largest:
        through_ours(module, tensors, mask_of(module.config, positions, torch.float32)).sum().backward()
    assert (largest.numel < 2048 * 64) == is_ours


@pytest.mark.parametrize("name", NAMES.values())
def test_dropout_keeps_the_expectation_and_documents_apart(name: str) -> None:
    module = layer(2, 1, None, name).train()
    lengths = [3, 5]
    mask = mask_of(module.config, positions_of(lengths), torch.float64)
    tensors = [x.detach() for x in random_tensors((1, 8), 2, 1, torch.float64)]
    torch.manual_seed(0)
    dropped = torch.stack([through_ours(module, tensors, mask, dropout=0.2) for _ in range(2000)])
    assert dropped.std(0).max() > 0.1
    without = through_ours(module, tensors, mask)
    assert (dropped.mean(0) - without).abs().max() < 5 * dropped.std(0).max() / 2000**0.5
    changed = [torch.cat([x[:, :3], x[:, 3:].flip(1)], 1) for x in tensors]
    same_draws = []
    for ones in (tensors, changed):
        torch.manual_seed(1)
        same_draws.append(through_ours(module, ones, mask, dropout=0.2))
    assert torch.equal(same_draws[0][:, :3], same_draws[1][:, :3])
    assert not torch.equal(same_draws[0][:, 3:], same_draws[1][:, 3:])


@pytest.mark.parametrize("name", NAMES.values())
def test_padding_masks_caches_and_masks_of_ones_own_go_to_stock_attention(name: str) -> None:
    config, positions = layer(2, 1, None, name).config, positions_of([3, 3])
    padding = torch.tensor([[1, 1, 1, 1, 0, 0]])
    filled = DynamicCache(config=config)
    filled.update(torch.zeros(1, 2, 4, SIZE), torch.zeros(1, 2, 4, SIZE), 0)
    cases: list[dict[str, Any]] = [
        {"attention_mask": padding},
        {"cache": filled},
        {"and_mask_function": lambda b, h, q, k: k != 1},
    ]
    stock = layer(2, 1, None, next(s for s, ours in NAMES.items() if ours == name)).config
    for case in cases:
        found, wanted = (mask_of(c, positions, torch.float32, **case) for c in (config, stock))
        assert not isinstance(found, Documents), case
        assert (found is None and wanted is None) or torch.equal(found, wanted)
    outside = create_causal_mask(config, torch.zeros(1, 6, 4), None, None, position_ids=positions)
    assert isinstance(outside, Tensor)  # a call of the model that is not the scorer's


def test_where_something_else_than_the_past_is_seen_documents_are_kept_apart_all_the_same() -> None:
    config, positions = layer(2, 1, None, "per_document").config, positions_of([3, 5])
    blocks = torch.tensor([[-1, 0, 0, 0, 0, -1, -1, -1]])  # seen in both directions, across the boundary
    mask = mask_of(config, positions, torch.float32, block_sequence_ids=blocks)[0, 0]
    assert mask[1, 2], "nothing looks ahead, so nothing is proven"
    assert not mask[:3, 3:].any()
    assert not mask[3:, :3].any()


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    "qwen3": {},
    "phi3": {"pad_token_id": 0},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 8},  # soft-caps, windows
    "gemma3_text": {"sliding_window": 4},
    "gpt_oss": {"sliding_window": 4},  # sinks; transformers alone lets packed documents see each other, as the next
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.0},
}
EXAMPLES = [
    Example([9, 8, 7, 6, 5, 4, 3], [0, *[1.0] * 6]),
    Example([5], [0]),
    Example([9, 8, 1, 2, 2], [0, *[1.0] * 4]),
]


def gradients_of(model: Any, hidden: Tensor) -> Tensor:
    model.zero_grad()
    weights = torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)
    (hidden * weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_pack_has_the_states_and_gradients_that_stock_attention_gives_each_document(
    model_type: str, checkpointing: bool
) -> None:
    model = tiny_model(model_type, initializer_range=0.3, **ARCHITECTURES[model_type]).eval()
    stock = model.config._attn_implementation
    backbone, _ = backbone_and_head(model)
    model.set_attn_implementation("eager")
    alone = torch.cat([hidden_states(backbone, torch.tensor([e.input_ids])) for e in EXAMPLES], 1)
    wanted = gradients_of(model, alone)
    model.set_attn_implementation(NAMES[stock])
    if checkpointing:
        model.activation_checkpointing_enable()
        model.train()
    batch = collate(EXAMPLES)
    packed = hidden_states(backbone, batch.input_ids, batch.position_ids)
    assert (packed - alone).abs().max() <= 1e-5 * alone.abs().max()
    assert (gradients_of(model, packed) - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def test_the_operator_is_given_tensors_whose_strides_a_fake_has_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phi-3 cuts queries, keys and values out of one tensor; compiled layers stop at strides other than the fake's."""
    seen: list[Tensor] = []

    def record(*args: Any) -> Any:
        seen.extend(args[:3])
        return packed_attention(*args)

    monkeypatch.setattr(implementation, "packed_attention", record)
    model = tiny_model("phi3")
    model.set_attn_implementation("per_document")
    positions = torch.cat([torch.arange(5), torch.arange(3)])[None]
    hidden_states(model.base_model, torch.arange(8)[None], positions, (5, 3))
    assert seen
    assert all(x.is_contiguous() for x in seen)
