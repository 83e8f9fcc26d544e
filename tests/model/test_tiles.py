"""MLPs in tiles of tokens: the same values and gradients, with the activations of one tile at a time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_sft import SFTModule
from lightning_sft.data.batches.collate import collate
from lightning_sft.demos import tiny_model, tiny_pretrained
from lightning_sft.machine.contexts import default_dtype
from lightning_sft.model.backbone import backbone_and_head
from lightning_sft.model.tiles import TiledMLP, compiled_parts, tile_mlps
from lightning_sft.model.tuning.adapters import Lora
from lightning_sft.types import InputError
from tests.helpers.gradients import encoded

LAYERS = 3
TILE = 32  # of 300 tokens or so, so that the last tile is shorter


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_pretrained(tmp_path_factory.mktemp("tiles"), num_hidden_layers=LAYERS)


def step(pretrained: str, tile_size: int | None, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """Module with the gradients of one pack, its likelihood, and how often the MLP of each layer was computed."""
    with default_dtype(dtype):
        module = SFTModule(pretrained, mlp_tile_size=tile_size, **settings)
        module.configure_model()
        for name, parameter in module.named_parameters():
            if "lora_B" in name:  # it begins with zeros, which let no gradient through to A
                nn.init.constant_(parameter, 0.01)
        times = Counter[int]()
        for number, layer in enumerate(module.model.model.layers):
            layer.mlp.register_forward_pre_hook(lambda *_, number=number: times.update([number]))
        torch.manual_seed(0)
        likelihood = module(collate(encoded(pretrained)))
        likelihood.total.neg().backward()
    return module, likelihood.total.detach(), [times[n] for n in range(LAYERS)]


def gradients(module: SFTModule) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.requires_grad]


def are_close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> bool:
    assert len(found) == len(wanted)
    return all(
        g is not None and float((g - w).abs().max()) <= tolerance * float(w.abs().max())
        for g, w in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("checkpointing", [False, True, 2])
@pytest.mark.parametrize(
    "settings",
    [{}, {"lora": Lora(r=4)}, {"lora": Lora(r=4, targets=["gate_proj", "down_proj"])}, {"frozen": ["*.mlp.*"]}],
    ids=["whole", "lora", "lora of the MLP", "frozen"],
)
def test_values_and_gradients_are_those_of_all_tokens_at_once(
    pretrained: str, settings: dict[str, Any], checkpointing: Any
) -> None:
    tiled, value, counted = step(pretrained, TILE, gradient_checkpointing=checkpointing, **settings)
    whole, wanted, _ = step(pretrained, None, **settings)
    tiles = -(-sum(len(example.input_ids) for example in encoded(pretrained)) // TILE)
    assert torch.allclose(value, wanted, rtol=1e-12)
    assert are_close(gradients(tiled), gradients(whole), 1e-10)
    assert counted == [2 * tiles] * LAYERS  # with checkpointing too: its recomputation ends at the MLP's input


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made with so many features."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features, self.tokens = features, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.ndim > 1 and x.shape[-1] == self.features]
        self.tokens = max(self.tokens, *(x.numel() // self.features for x in made), 0)
        return result


@pytest.mark.parametrize("tile_size", [None, TILE])
def test_no_activation_of_the_mlp_is_larger_than_a_tile(pretrained: str, tile_size: int | None) -> None:
    module = SFTModule(pretrained, mlp_tile_size=tile_size)
    module.configure_model()
    width = module.model.config.intermediate_size
    batch = collate(encoded(pretrained))
    with Largest(width) as largest:
        module(batch).total.neg().backward()
    weights = module.model.config.hidden_size  # rows of a matrix of as many columns
    assert largest.tokens == (max(TILE, weights) if tile_size else batch.input_ids.numel())


def test_tokens_may_lie_in_any_order_in_memory() -> None:
    model = tiny_model()
    layer = model.model.layers[0]
    states = torch.randn(5, 3, model.config.hidden_size).transpose(0, 1).requires_grad_()  # tokens first, then rows
    weights = torch.randn(3, 5, model.config.hidden_size)
    wanted, *_ = torch.autograd.grad((layer.mlp(states) * weights).sum(), states)
    tile_mlps(model, 4)
    found, *_ = torch.autograd.grad((layer.mlp(states) * weights).sum(), states)
    torch.testing.assert_close(found, wanted)


def test_dropout_of_a_tile_is_the_same_when_it_is_computed_again() -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    mlp.__class__ = type("Tiled", (TiledMLP, nn.Sequential), {"tile_size": 3})
    states = torch.randn(2, 5, 4, requires_grad=True)
    out = mlp(states)
    state = torch.get_rng_state()
    out.square().sum().backward()
    assert torch.equal(torch.get_rng_state(), state)  # the draws of others are not moved
    with torch.no_grad():  # the output is affine for given draws, so it has no other gradient
        shift = torch.randn(2, 5, 4)
        torch.manual_seed(0)
        nn.Linear(4, 8), nn.Linear(8, 4), torch.randn(2, 5, 4)  # the same draws as above
        moved = mlp(states + 1e-3 * shift)
    predicted = (2 * out * (moved - out)).sum()
    assert torch.allclose(predicted, (states.grad * 1e-3 * shift).sum(), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_of_parameters_are_summed_over_tiles_in_float32(pretrained: str, dtype: torch.dtype) -> None:
    tiled, _, _ = step(pretrained, 2, dtype)
    whole, _, _ = step(pretrained, None, dtype)
    exact, _, _ = step(pretrained, None, torch.float64)

    def error(module: SFTModule) -> float:
        found, wanted = (m.model.model.layers[-1].mlp.down_proj.weight.grad.double() for m in (module, exact))
        return float((found - wanted).norm() / wanted.norm())

    assert error(tiled) < 1.5 * error(whole) + 1e-6


def test_tiles_are_computed_under_the_autocast_of_the_forward_pass(pretrained: str) -> None:
    module, dtypes = SFTModule(pretrained, mlp_tile_size=TILE), set()
    module.configure_model()
    module.model.model.layers[0].mlp.register_forward_hook(lambda _, __, out: dtypes.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        total = module(collate(encoded(pretrained))).total
    total.neg().backward()
    assert dtypes == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_mlps_that_are_compiled_give_the_same_gradients(pretrained: str, checkpointing: bool) -> None:
    torch._dynamo.reset()
    module = SFTModule(pretrained, mlp_tile_size=TILE, gradient_checkpointing=checkpointing)
    module.configure_model()
    graphs: list[Any] = []
    for part in (part for layer in module.model.model.layers for part in compiled_parts(layer)):
        part.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    module(collate(encoded(pretrained))).total.neg().backward()
    whole, _, _ = step(pretrained, None, torch.float32)
    assert are_close(gradients(module), gradients(whole), 1e-4)
    assert any("down_proj" in str(graph.code) for graph in graphs)


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.mark.parametrize(
    "kind", ["llama", "qwen3", "gemma2", "gpt_neox", "phi", "olmo2", "cohere", "starcoder2", "glm4"]
)
def test_families_have_mlps_that_map_each_token_by_itself(kind: str) -> None:
    with default_dtype(torch.float64):
        model = tiny_model(kind, **SIZES)
        ids = torch.randint(20, (2, 9), generator=torch.Generator().manual_seed(0))
        backbone, _ = backbone_and_head(model)
        model.eval()
        wanted = backbone(input_ids=ids).last_hidden_state
        tile_mlps(model, 4)
        found = backbone(input_ids=ids).last_hidden_state
    assert sum(isinstance(module, TiledMLP) for module in model.modules()) == 2
    assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-12)


def test_experts_are_not_split_which_is_said() -> None:
    sizes = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    with pytest.warns(UserWarning, match=r"mlp_tile_size has no effect: 0 of the 2 layers .* experts are not split"):
        tile_mlps(tiny_model("qwen3_moe", **sizes), 4)


def test_layers_with_experts_among_others_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    sizes = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "mlp_only_layers": [0]}
    tile_mlps(tiny_model("qwen3_moe", **sizes), 4)
    assert "1 of the 2 layers of Qwen3MoeForCausalLM have an MLP to compute in tiles" in caplog.text


def test_zero_3_is_refused() -> None:
    model = tiny_model("llama", **SIZES)
    next(model.parameters()).ds_id = 0
    with pytest.raises(InputError, match="mlp_tile_size is not available under ZeRO-3"):
        tile_mlps(model, 4)


def test_a_second_derivative_is_refused(pretrained: str) -> None:
    module = SFTModule(pretrained, mlp_tile_size=TILE)
    module.configure_model()
    hidden = backbone_and_head(module.model)[0](input_ids=torch.arange(60)[None] % 20).last_hidden_state
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(hidden.sum(), list(module.model.model.layers[0].parameters()), create_graph=True)
