"""What is in which dtype under each precision, and that float32 is not touched."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.demos import tiny_model
from lightning_sft.export.convert import export_checkpoint
from lightning_sft.model.attention import cpu
from lightning_sft.model.precision import follow_autocast
from lightning_sft.model.pretrained import load_exported
from tests.helpers.processes import torchrun

Make = Callable[..., Trainer]
IDS = torch.randint(250, (1, 24), generator=torch.Generator().manual_seed(0))
BF16 = torch.bfloat16
# all experts have all tokens, since rounding could send a token elsewhere, whose gradients would be others
MOE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 4},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 4},
}
EXPERTS_COMPILE = pytest.mark.skipif(
    torch.__version__ < "2.11", reason="on CPUs with torch 2.10, transformers' experts ask for addresses, untraceably"
)


class Matmuls(TorchDispatchMode):
    """Dtypes of matmuls, as they reach the device."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.rpartition("::")[2] in ("mm", "addmm", "bmm", "_grouped_mm", "grouped_mm"):
            self.dtypes.extend(x.dtype for x in args if isinstance(x, Tensor) and x.is_floating_point())
        return func(*args, **(kwargs or {}))


def mixed(dtype: torch.dtype = BF16) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype, cache_enabled=False)  # as Lightning's plugin


def step(model: PreTrainedModel, context: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one batch."""
    model.zero_grad()
    with context or torch.autocast("cpu", enabled=False):
        logits = model(input_ids=IDS, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), IDS[0, 1:])
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def outputs(model: PreTrainedModel, context: Any) -> dict[str, torch.dtype]:
    """Of layers, norms and attention's RoPE."""
    seen: dict[str, torch.dtype] = {}

    def note(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            seen[name] = first.dtype

        return hook

    wanted = ("Norm", "Layer", "RotaryEmbedding")
    handles = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if type(module).__name__.endswith(wanted)
    ]
    with context:
        model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def distance(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative error of a gradient."""
    return max(float((given[name] - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-6)) for name in wanted)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "phi", "gpt_neox"])
def test_between_matmuls_everything_is_bfloat16_and_gradients_are_float32(architecture: str) -> None:
    heads = {"num_key_value_heads": 2} if architecture == "phi" else {}
    model = tiny_model(architecture, **heads).train()
    _, exact = step(model)
    assert torch.float32 in outputs(model, mixed()).values()
    assert follow_autocast(model) is None
    assert set(outputs(model, mixed()).values()) == {BF16}
    _, gradients = step(model, mixed())
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert distance(gradients, exact) < 0.1


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_without_autocast_nothing_changes(architecture: str) -> None:
    model = tiny_model(architecture, **MOE.get(architecture, {})).train()
    followed = copy.deepcopy(model)
    follow_autocast(followed)
    for dtype in (torch.float32, torch.float64)[: 1 + (architecture == "llama")]:  # grouped_mm has no float64
        (loss, gradients), (loss_followed, gradients_followed) = step(model.to(dtype)), step(followed.to(dtype))
        assert torch.equal(loss, loss_followed)
        assert all(torch.equal(gradients[name], gradients_followed[name]) for name in gradients)


def test_in_float16_the_residual_stream_stays_float32() -> None:
    model = tiny_model()
    before = outputs(model, mixed(torch.float16))
    follow_autocast(model)
    assert outputs(model, mixed(torch.float16)) == before


def test_a_residual_stream_that_its_config_wants_in_float32_stays_so() -> None:
    model = tiny_model("mamba")
    assert model.config.residual_in_fp32
    assert follow_autocast(model) == "its config sets residual_in_fp32"
    assert not model.get_input_embeddings()._forward_hooks


def test_checkpointed_layers_are_recomputed_in_the_same_dtypes() -> None:
    model = tiny_model().train()
    follow_autocast(model)
    loss, gradients = step(model, mixed())
    model.activation_checkpointing_enable()
    again, recomputed = step(model, mixed())
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[name], recomputed[name]) for name in gradients)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")  # of transformers
@pytest.mark.parametrize("architecture", ["llama", pytest.param("qwen3_moe", marks=EXPERTS_COMPILE)])
def test_hooks_and_experts_are_compiled_without_a_graph_break(architecture: str) -> None:
    model = tiny_model(architecture, **MOE.get(architecture, {})).train()
    follow_autocast(model)
    loss, gradients = step(model, mixed())
    for layer in model.base_model.layers:
        layer._compiled_call_impl = torch.compile(layer._call_impl, backend="aot_eager", fullgraph=True)
    compiled, of_compiled = step(model, mixed())
    assert torch.allclose(loss, compiled, rtol=1e-3)
    assert distance(of_compiled, gradients) < 0.05


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("architecture", MOE)
def test_experts_compute_in_the_dtype_of_autocast(architecture: str, dtype: torch.dtype) -> None:
    model = tiny_model(architecture, **MOE[architecture]).train()
    _, exact = step(model)
    follow_autocast(model)
    with Matmuls() as matmuls:
        _, gradients = step(model, mixed(dtype))
    assert set(matmuls.dtypes) == {dtype}
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    assert gradients.keys() == exact.keys()
    assert distance(gradients, exact) < 0.1


def test_routers_that_transformers_keeps_in_float32_compute_in_it() -> None:
    size = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    others = {"head_dim": 4, "moe_intermediate_size": 16, "first_k_dense_replace": 0}
    model = tiny_model("deepseek_v3", **size, **experts, **others).train()
    seen = set()
    for layer in model.base_model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, output: seen.add(output[0].dtype))
    step(model, mixed())
    assert seen == {BF16}
    seen.clear()
    follow_autocast(model)
    copied = copy.deepcopy(model)
    _, gradients = step(model, mixed())
    assert seen == {torch.float32}
    assert gradients["model.layers.0.mlp.gate.weight"].dtype == torch.float32
    step(copied, mixed())  # of weight averaging: the copy trains its own routers
    assert copied.base_model.layers[0].mlp.gate.weight.grad is not None


def test_adapters_noise_and_checkpointing_train_in_bfloat16_as_in_float32(
    pretrained: str, quiet_trainer: Make, rows: list[dict[str, str]]
) -> None:
    settings: dict[str, Any] = {"lora": {"r": 4}, "neftune_alpha": 5.0, "gradient_checkpointing": True}
    cpu.works.cache_clear()  # what is tried in the first forward pass is not part of a checkpointed layer
    cpu.one_call.cache_clear()
    losses, seen = [], set()
    for precision in ("32-true", "bf16-mixed"):
        module, trainer = SFTModule(pretrained, **settings), quiet_trainer(max_epochs=2, precision=precision)
        module.configure_model()
        assert module.model is not None
        module.model.base_model.norm.register_forward_hook(lambda norm, args, output: seen.add(output.dtype))
        trainer.fit(module, SFTDataModule(train=rows))
        losses.append(trainer.callback_metrics["train/loss"].item())
        assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    assert seen == {torch.float32, BF16}
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def frequencies(module: SFTModule) -> Tensor:
    assert module.model is not None
    found: Tensor = module.model.base_model.rotary_emb.inv_freq
    return found


def test_true_half_precision_does_not_round_the_frequencies_and_the_export_is_what_was_trained(
    pretrained: str, quiet_trainer: Make, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    module = SFTModule(pretrained)
    trainer = quiet_trainer(max_steps=2, precision="bf16-true")
    trainer.fit(module, SFTDataModule(train=rows))
    assert module.model is not None
    assert {p.dtype for p in module.parameters()} == {BF16}
    assert torch.equal(frequencies(module), tiny_model().base_model.rotary_emb.inv_freq)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    export_checkpoint(str(tmp_path / "last.ckpt"), str(tmp_path / "exported"))
    exported = load_exported(tmp_path / "exported").eval()
    far = torch.arange(240)[None]  # rounded frequencies show at late positions
    with torch.no_grad():
        assert torch.equal(exported(far).logits, module.model.eval()(far).logits)


def test_double_precision_widens_the_frequencies(pretrained: str, quiet_trainer: Make, rows: Any) -> None:
    module = SFTModule(pretrained)
    quiet_trainer(max_steps=1, precision="64-true").fit(module, SFTDataModule(train=rows))
    assert frequencies(module).dtype == torch.float64


def test_buffers_of_a_checkpoint_are_cast_and_others_moved(pretrained: str) -> None:
    module = SFTModule(pretrained)
    module.configure_model()
    assert module.model is not None
    module.model.register_buffer("of_checkpoint", torch.ones(3))
    module.to(BF16)
    assert module.model.of_checkpoint.dtype == BF16
    module.to("meta")
    assert (frequencies(module).device.type, frequencies(module).dtype) == ("meta", torch.float32)


SHARDED_KEY = ["ddp,bf16-mixed", "fsdp2,32-true", "fsdp2,bf16-mixed", "fsdp2,bf16-true"]
ZERO = ["deepspeed2,bf16-mixed"] if importlib.util.find_spec("deepspeed") else []


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory, pretrained_for_two: str) -> dict[str, Any]:
    """What each strategy shows of a fit in two processes."""
    out = tmp_path_factory.mktemp("sharded")
    for cases in (SHARDED_KEY, ZERO):
        if cases:
            torchrun("tests.helpers.sharded_precision", pretrained_for_two, str(out), *cases, processes=2)
    return {case: json.loads((out / f"{case}.json").read_text()) for case in SHARDED_KEY + ZERO}


def test_under_fsdp2_autocast_makes_no_copy_of_a_weight(shown: dict[str, Any]) -> None:
    assert shown["ddp,bf16-mixed"]["casts"] > 0
    assert shown["fsdp2,bf16-mixed"]["casts"] == 0
    assert shown["fsdp2,bf16-mixed"]["states"] == ["torch.bfloat16"]
    assert shown["fsdp2,bf16-mixed"]["gradients"] == ["torch.float32"]


@pytest.mark.parametrize("case", ["ddp,bf16-mixed", "fsdp2,bf16-mixed", "fsdp2,bf16-true", *ZERO])
def test_every_strategy_has_the_losses_of_float32_and_its_frequencies(shown: dict[str, Any], case: str) -> None:
    exact = shown["fsdp2,32-true"]
    assert shown[case]["losses"] == pytest.approx(exact["losses"], rel=1e-2)
    assert shown[case]["losses"] != exact["losses"]
    assert shown[case]["rope"] == exact["rope"]
    assert shown[case]["states"] == ["torch.bfloat16"]
