"""Adapters on a base in 4 or 8 bits: trained, resumed, merged and exported on this machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM

from lightning_sft import SFTModule
from lightning_sft.demos import tiny_pretrained, tiny_tokenizer
from lightning_sft.export.adapter_folder import save_adapter
from lightning_sft.main import main
from lightning_sft.model.tuning import quantization as quantized
from lightning_sft.model.tuning.adapters import Lora, merge
from lightning_sft.types import InputError
from tests.helpers.gradients import ROWS
from tests.model.tuning.test_adapter_checkpoints import fit
from tests.model.tuning.test_adapters import lora_module

NEEDS = {"4bit": "bitsandbytes", "8bit": "torchao"}


@pytest.fixture(params=["4bit", "8bit"])
def bits(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(NEEDS[request.param])
    return str(request.param)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Matrices of 64 columns, the block of NF4."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    return tiny_pretrained(tmp_path_factory.mktemp("quantized") / "base", **shape)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(250, (2, 20), generator=torch.Generator().manual_seed(0))


def test_the_base_is_rounded_and_adapters_are_not(base: str, bits: Any, ids: torch.Tensor) -> None:
    module = SFTModule(base, lora=Lora(r=4), quantize=bits)
    module.configure_model()
    plain = AutoModelForCausalLM.from_pretrained(base)
    layer = module.model.model.layers[0].self_attn.q_proj
    assert quantized.is_packed(layer.base_layer.weight)
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(module.model.lm_head.weight, plain.lm_head.weight)
    error = (module.model(ids).logits - plain(ids).logits).abs().max()
    assert 0 < error < {"4bit": 0.2, "8bit": 0.02}[bits] * plain(ids).logits.abs().max()


@pytest.mark.parametrize("dora", [False, True])
def test_a_merged_model_is_the_one_that_was_trained(base: str, bits: Any, dora: bool, ids: torch.Tensor) -> None:
    module = lora_module(base, Lora(r=4, dora=dora), quantize=bits)
    with torch.no_grad():
        trained = module.model(ids).logits
        merged = merge(module.model)
        assert torch.allclose(merged(ids).logits, trained, atol=1e-5)
    assert {type(p.data) for p in merged.parameters()} == {torch.Tensor}
    assert {p.dtype for p in merged.parameters()} == {torch.float32}


def test_a_run_goes_on_bit_by_bit_and_exports(
    tmp_path: Path, base: str, bits: str, quiet_trainer: Callable[..., Trainer], ids: torch.Tensor, jsonl: Any
) -> None:
    run = partial(fit, quiet_trainer, base, lora=Lora(r=4, dropout=0.2), quantize=bits, new_tokens=["<|a|>"])
    whole = run(tmp_path / "one")
    ckpt = tmp_path / "one" / "step=3.ckpt"
    names = torch.load(ckpt, weights_only=True)["state_dict"].keys()
    assert all(".lora_" in name or name.endswith(".new_rows") for name in names)
    resumed = run(tmp_path / "two", ckpt_path=ckpt)
    trained = [name for name in whole if ".lora_" in name or name.endswith(".new_rows")]
    assert len(trained) == 2 * 14 + 2
    assert all(torch.equal(whole[name], resumed[name]) for name in trained)
    module = SFTModule.load_from_checkpoint(ckpt, weights_only=True).eval()
    out = main(["export", "--ckpt", str(ckpt), "--out", str(tmp_path / "out"), "--rows", jsonl(ROWS)])
    exported = AutoModelForCausalLM.from_pretrained(out)
    assert torch.allclose(exported(ids).logits, module.model(ids).logits, atol=1e-5)
    assert not hasattr(exported.config, "quantization_config")


def test_gradients_pass_through_the_base_after_an_evaluation(base: str, bits: Any, ids: torch.Tensor) -> None:
    """On CPUs with bfloat16 instructions bitsandbytes has products for inference that have no gradient."""
    module = lora_module(base, Lora(r=4), quantize=bits)
    for layer in module.model.modules():
        assert not getattr(layer, "support_avx512bf16_for_cpu", False)  # on whatever machine this is

    def gradients() -> list[torch.Tensor]:
        module.zero_grad()
        module.train().model(ids).logits.square().sum().backward()
        return [p.grad.clone() for p in module.parameters() if p.requires_grad]

    before = gradients()
    with torch.no_grad():
        module.eval().model(ids)
    assert all(map(torch.equal, gradients(), before))
    assert all(gradient.any() for gradient in before[1::2])  # B of each adapter; of A, B = 0 lets nothing through


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, base: str) -> Callable[[str], str]:
    """A folder of weights that are quantized in the file."""

    def write(bits: str, kind: Any = None) -> str:
        folder = tmp_path_factory.mktemp("stored")
        settings = kind or quantized.quantization(bits, torch.bfloat16)  # type: ignore[arg-type]
        AutoModelForCausalLM.from_pretrained(base, quantization_config=settings).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        return str(folder)

    return write


def test_adapters_on_weights_that_are_stored_quantized_are_trained_resumed_and_exported(
    tmp_path: Path, stored: Any, bits: str, quiet_trainer: Callable[..., Trainer], ids: torch.Tensor, jsonl: Any
) -> None:
    folder = stored(bits)
    run = partial(fit, quiet_trainer, folder, lora=Lora(r=4, dropout=0.2))
    whole, ckpt = run(tmp_path / "one"), tmp_path / "one" / "step=3.ckpt"
    resumed = run(tmp_path / "two", ckpt_path=ckpt)
    trained = [name for name in whole if ".lora_" in name]
    assert len(trained) == 2 * 14
    assert all(torch.equal(whole[name], resumed[name]) for name in trained)
    module = SFTModule.load_from_checkpoint(ckpt, weights_only=True).eval()
    assert {getattr(layer, "compute_dtype", torch.float32) for layer in module.modules()} == {torch.float32}
    out = main(["export", "--ckpt", str(ckpt), "--out", str(tmp_path / "out"), "--rows", jsonl(ROWS)])
    exported = AutoModelForCausalLM.from_pretrained(out)
    assert torch.allclose(exported(ids).logits, module.model(ids).logits, atol=1e-5)
    save_adapter(module.model, tmp_path / "adapter", folder)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_weights_that_are_stored_quantized_are_not_trained_themselves(stored: Any, bits: Any) -> None:
    folder = stored(bits)
    with pytest.raises(
        InputError, match=rf"are quantized \({NEEDS[bits]}\).*Train adapters on them \(model.lora.r=16\)"
    ):
        SFTModule(folder).configure_model()
    with pytest.raises(InputError, match=f"so model.quantize={bits} has no effect"):
        SFTModule(folder, lora=Lora(), quantize=bits).configure_model()
    with pytest.raises(InputError, match=r"and model.lora.base_dtype=bfloat16 determine"):
        SFTModule(folder, lora=Lora(base_dtype="bfloat16")).configure_model()


def test_what_cannot_be_is_refused(base: str, bits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="needs adapters"):
        SFTModule(base, quantize=bits).configure_model()
    with pytest.raises(InputError, match="is quantized and cannot be trained"):
        SFTModule(base, lora=Lora(), quantize=bits, trained=["*q_proj.weight"]).configure_model()
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"needs {NEEDS[bits]}, which is not installed"):
        SFTModule(base, lora=Lora(), quantize=bits).configure_model()
