"""Adapters on pre-quantized checkpoints: the values that are stored, exact gradients, and exports that load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lightning_sft import SFTModule
from lightning_sft.data.batches.collate import collate
from lightning_sft.demos import tiny_pretrained, tiny_tokenizer
from lightning_sft.export.adapter_folder import save_adapter
from lightning_sft.main import main
from lightning_sft.model.pretrained import load_model
from lightning_sft.model.tuning import prequantized as stored
from lightning_sft.model.tuning.adapters import Lora
from lightning_sft.types import InputError
from tests.helpers.gradients import ROWS, encoded
from tests.helpers.prequantizing import KINDS, SIZE, prequantized
from tests.helpers.slow import slow_but
from tests.model.tuning.test_adapter_checkpoints import fit

pytestmark = [  # of peft
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]


def int8(folder: Path) -> tuple[str, str]:
    """A checkpoint of LLM.int8, and a plain one of the same values."""
    base = tiny_pretrained(folder / "base", "qwen3", **SIZE)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    model.save_pretrained(folder / "int8")
    plain = AutoModelForCausalLM.from_pretrained(base)
    for name, module in model.named_modules():
        if hasattr(module, "state"):
            weight = module.weight
            plain.get_submodule(name).weight.data = weight.data.float() * (weight.SCB[:, None] / 127)
    plain.save_pretrained(folder / "plain")
    for name in ("int8", "plain"):
        tiny_tokenizer().save_pretrained(folder / name)
    return str(folder / "int8"), str(folder / "plain")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, str]]:
    """The paths of a pre-quantized checkpoint, and of a plain one of the same values."""
    found: dict[str, tuple[str, str]] = {}

    def make(kind: str) -> tuple[str, str]:
        for start, package in {"bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed_tensors"}.items():
            if kind.startswith(start):
                pytest.importorskip(package)
        if kind not in found:
            folder = tmp_path_factory.mktemp(kind)
            found[kind] = int8(folder) if kind == "bitsandbytes_8bit" else prequantized(folder, kind)
        return found[kind]

    return make


ALL = [*KINDS, "bitsandbytes_8bit"]


def module_of(pretrained: str, **settings: Any) -> SFTModule:
    """A module whose adapters have values that are not zero."""
    module = SFTModule(pretrained, lora=Lora(r=4), **settings)
    module.configure_model()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(module.named_parameters()):
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return module


def gradients(module: SFTModule) -> dict[str, Tensor]:
    likelihood = module(collate(encoded(module.pretrained)[:4]))
    likelihood.total.backward()
    return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ALL)
def test_adapters_have_the_gradients_that_they_have_on_plain_weights_of_the_same_values(made: Any, kind: str) -> None:
    quantized, plain = map(module_of, made(kind))
    given, wanted = gradients(quantized), gradients(plain)
    assert given.keys() == wanted.keys()
    assert all(gradient.any() for gradient in given.values())
    assert all(torch.equal(given[name], wanted[name]) for name in wanted)
    assert all(torch.equal(quantized.state_dict()[name], value) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("kind", slow_but(["mxfp4", "gptq"], ALL))
def test_a_run_resumes_bit_for_bit_and_exports_what_was_trained(
    tmp_path: Path, made: Any, kind: str, quiet_trainer: Callable[..., Trainer], jsonl: Any
) -> None:
    folder, plain = made(kind)
    run = partial(fit, quiet_trainer, folder, lora=Lora(r=4))
    whole, ckpt = run(tmp_path / "one"), tmp_path / "one" / "step=3.ckpt"
    resumed = run(tmp_path / "two", ckpt_path=ckpt)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole if ".lora_" in name)
    module = SFTModule.load_from_checkpoint(ckpt, weights_only=True).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        trained = module.model(ids).logits
        out = main(["export", "--ckpt", str(ckpt), "--out", str(tmp_path / "out"), "--rows", jsonl(ROWS)])
        merged = AutoModelForCausalLM.from_pretrained(out)
        assert torch.allclose(merged(ids).logits, trained, atol=1e-5)
        assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
        save_adapter(module.model, tmp_path / "adapter", folder)
        peft = pytest.importorskip("peft")
        loads_alone = kind.startswith(("mxfp4", "fp8", "compressed-tensors"))  # by transformers, without a GPU
        base = AutoModelForCausalLM.from_pretrained(folder if loads_alone else plain, dtype=torch.float32)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert torch.allclose(loaded(ids).logits, trained, atol=1e-5)


def test_a_base_in_mxfp4_is_held_in_bfloat16_without_rounding_and_fp8_in_float32(
    tmp_path: Path, made: Any, quiet_trainer: Callable[..., Trainer]
) -> None:
    trainer = quiet_trainer(precision="bf16-mixed", max_epochs=1)
    for kind, dtype in (("mxfp4", torch.bfloat16), ("fp8", torch.float32)):
        folder, plain = made(kind)
        path = Path(shutil.copytree(folder, tmp_path / kind), "model.safetensors")
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if tensor.dtype == torch.float32 and "scale" not in name:
                tensors[name] = tensor.bfloat16()
        save_file(tensors, path, {"format": "pt"})
        model = SFTModule(path.parent, lora=Lora(r=4)).tuning.load(str(path.parent), None, None, trainer)
        values = dict(load_model(plain).named_parameters())
        packed = [name for name in values if "down_proj" in name and not name.endswith("bias")]
        held = {name.replace("base_layer.", ""): p for name, p in model.named_parameters()}
        for name in packed:
            assert held[name].dtype == dtype
            assert torch.equal(held[name].float(), values[name])


@pytest.mark.parametrize("kind", KINDS)
def test_without_adapters_each_kind_is_refused_before_it_is_loaded(made: Any, kind: str) -> None:
    method = KINDS[kind][1]["quant_method"]
    with pytest.raises(InputError, match=rf"are quantized \({method}\).*Train adapters on them \(model.lora"):
        SFTModule(made(kind)[0]).configure_model()


def test_kinds_that_cannot_be_read_are_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(settings: dict[str, Any], match: str) -> None:
        folder = tiny_pretrained(tmp_path / "model")
        path = Path(folder, "config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
        with pytest.raises(InputError, match=match):
            SFTModule(folder, lora=Lora()).configure_model()

    refused({"quant_method": "gptq", "bits": 3}, r"quantized with gptq \(3 bits, gptq\).*Use the model before quantiz")
    refused({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, r"gptq \(4 bits, marlin\)")
    refused({"quant_method": "gptq", "bits": 4, "dynamic": {"-:lm": {}}}, r"gptq \(4 bits, gptq, dynamic\)")
    refused({"quant_method": "awq", "bits": 4, "version": "gemv"}, r"awq \(4 bits, gemv\)")
    refused({"quant_method": "quark"}, "quantized with quark; adapters can be trained on weights of bitsandbytes")
    refused(
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8DynamicActivationInt8WeightConfig"}}},
        "quantized with torchao; adapters",
    )
    refused({"quant_method": "fp8", "activation_scheme": "none"}, "Error of the loader: .*Activation scheme none")
    monkeypatch.setattr(stored, "find_spec", lambda name: None)
    refused({"quant_method": "compressed-tensors"}, "not installed: pip install compressed-tensors. Or use the model")


def test_biases_of_zero_that_quantizers_add_are_passed_over_and_others_refused(made: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(made("gptq")[0], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    added = {name.replace(".qweight", ".bias"): torch.zeros(64) for name in tensors if name.endswith("k_proj.qweight")}
    save_file(tensors | added, folder / "model.safetensors", {"format": "pt"})
    given, wanted = (load_model(path).state_dict() for path in (folder, made("gptq")[1]))
    assert given.keys() == wanted.keys()
    assert all(torch.equal(given[name], value) for name, value in wanted.items())
    save_file(
        tensors | {name: bias + 1 for name, bias in added.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(InputError, match=r"has parts that Qwen3ForCausalLM does not load"):
        load_model(folder)


def test_a_matrix_without_its_scales_is_refused(made: Any, tmp_path: Path) -> None:
    own = stored.Prequantized("gptq", {"bits": 4})
    tensors = load_file(Path(made("gptq")[0], "model.safetensors"))
    del tensors["model.layers.0.mlp.up_proj.scales"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"layers.0.mlp.up_proj, quantized with gptq .* has no scales"):
        own.unpacked([str(tmp_path / "model.safetensors")])
