"""Adapters on experts are written as vLLM's loader reads them, with the change of weights that was trained."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_sft import SFTModule
from lightning_sft.demos import tiny_pretrained
from lightning_sft.export.adapter_folder import save_adapter
from lightning_sft.model.tuning.adapters import Lora, merge
from lightning_sft.types import InputError
from tests.model.test_router_loss import DEEPSEEK
from tests.model.tuning.test_adapters import lora_module

pytestmark = [  # of peft
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]

EXPERTS = 4
LOCAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
OF_QWEN = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": OF_QWEN,
    "mixtral": LOCAL,
    "olmoe": {"num_experts": EXPERTS, "num_experts_per_tok": 2},
    "deepseek_v3": {**DEEPSEEK, "n_routed_experts": EXPERTS, "n_group": 1},
}
PROJECTIONS = {"mixtral": ("w1", "w2", "w3")}  # of vLLM's mapping of experts; else these:
GATED = ("gate_proj", "down_proj", "up_proj")


def change(model: Any, pretrained: str, folder: Path) -> dict[str, Tensor]:
    """What adapters change in the tensors of the published checkpoint."""
    merge(model).save_pretrained(folder)
    before, after = load_file(Path(pretrained, "model.safetensors")), load_file(folder / "model.safetensors")
    return {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}


def as_vllm(folder: Path, projections: tuple[str, ...]) -> tuple[dict[str, dict[str, Tensor]], float]:
    """Pairs of matrices by module, and their scale, as vLLM parses a folder (vllm/lora: lora_model, peft_helper)."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config["use_dora"]
    assert not config["modules_to_save"]
    rank = math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
    expected = {f"experts.{e}.{projection}" for e in range(EXPERTS) for projection in projections}
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        parts = name.split(".")
        assert parts[:2] == ["base_model", "model"]
        assert parts[-1] == "weight"
        assert parts[-2] in ("lora_A", "lora_B")
        module = ".".join(parts[2:-2])
        if ".experts" in module and "base_layer" not in module:
            assert module[module.index("experts") :] in (expected or {"experts"})
        modules.setdefault(module, {})[parts[-2]] = tensor
    return modules, config["lora_alpha"] / rank


def close(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    assert given.keys() == wanted.keys()
    return all(torch.allclose(given[name], wanted[name], atol=1e-5) for name in wanted)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_vllm_reads_for_each_expert_the_change_that_was_trained(
    tmp_path: Path, architecture: str, rslora: bool
) -> None:
    pretrained = tiny_pretrained(tmp_path / "base", architecture, **ARCHITECTURES[architecture])
    model = lora_module(pretrained, Lora(r=4, rslora=rslora)).model
    save_adapter(model, tmp_path / "adapter", pretrained, "per_expert")
    modules, scale = as_vllm(tmp_path / "adapter", PROJECTIONS.get(architecture, GATED))
    assert len({pair["lora_A"].shape[0] for pair in modules.values()}) == 1  # vLLM checks r of the config alone
    given = {f"{name}.weight": scale * pair["lora_B"] @ pair["lora_A"] for name, pair in modules.items()}
    assert sum(".experts." in name for name in given) == 3 * EXPERTS * (1 if architecture == "deepseek_v3" else 2)
    assert close(given, change(model, pretrained, tmp_path / "merged"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_peft_reads_the_same_folder_with_equal_logits(tmp_path: Path, architecture: str) -> None:
    pretrained = tiny_pretrained(tmp_path / "base", architecture, **ARCHITECTURES[architecture])
    model = lora_module(pretrained, Lora(r=4)).model.eval()
    save_adapter(model, tmp_path / "adapter", pretrained, "per_expert")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pretrained), tmp_path / "adapter").eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-6)


def test_vllm_reads_fused_experts_of_gpt_oss_as_they_were_trained(tmp_path: Path) -> None:
    """``experts.base_layer`` is gate_up_proj, ``experts`` down_proj (vllm/lora/model_manager, is_3d_moe_weight)."""
    pretrained = tiny_pretrained(tmp_path / "base", "gpt_oss", **LOCAL)
    targets = ["q_proj", "v_proj", "experts.gate_up_proj", "experts.down_proj"]
    model = lora_module(pretrained, Lora(r=4, targets=targets)).model
    save_adapter(model, tmp_path / "adapter", pretrained)
    modules, scale = as_vllm(tmp_path / "adapter", ())
    given = {}
    for name, pair in modules.items():
        if ".experts" not in name:
            given[f"{name}.weight"] = scale * pair["lora_B"] @ pair["lora_A"]
            continue
        a = pair["lora_A"].reshape(EXPERTS, -1, pair["lora_A"].shape[-1])
        b = pair["lora_B"].reshape(len(pair["lora_B"]), -1, EXPERTS).permute(2, 0, 1)
        end = "gate_up_proj" if name.endswith(".base_layer") else "down_proj"
        given[f"{name.removesuffix('.base_layer')}.{end}"] = scale * (b @ a).mT  # stored as [E, in, out]
    assert sum("experts" in name for name in given) == 2 * 2
    assert close(given, change(model, pretrained, tmp_path / "merged"))


def test_experts_that_are_fused_in_published_checkpoints_are_not_written_one_by_one(tmp_path: Path) -> None:
    pretrained = tiny_pretrained(tmp_path / "base", "gpt_oss", **LOCAL)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    model = lora_module(pretrained, Lora(r=4, targets=targets)).model
    with pytest.raises(InputError, match=r"GptOssForCausalLM do not have .*_proj expert by expert. Use layout='fused'"):
        save_adapter(model, tmp_path / "adapter", pretrained, "per_expert")
    dense = tiny_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match="Adapters of DoRA cannot be written expert by expert"):
        save_adapter(lora_module(dense, Lora(r=4, dora=True)).model, tmp_path / "adapter", dense, "per_expert")
    with pytest.raises(InputError, match=r"save_adapter.layout is 'vllm'; expected fused or per_expert"):
        save_adapter(model, tmp_path / "adapter", pretrained, "vllm")  # type: ignore[arg-type]  # as from YAML


def test_experts_that_all_linear_leaves_out_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    SFTModule(tiny_pretrained(tmp_path / "moe", "qwen3_moe", **OF_QWEN), lora=Lora(r=4)).configure_model()
    assert "get no adapters" not in caplog.text
    SFTModule(tiny_pretrained(tmp_path / "oss", "gpt_oss", **LOCAL), lora=Lora(r=4)).configure_model()
    assert (
        "experts of GptOssForCausalLM get no adapters, such as model.layers.0.mlp.experts.gate_up_proj" in caplog.text
    )
