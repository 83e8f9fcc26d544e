from __future__ import annotations

import json
import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lightning_sft import SFTModule
from lightning_sft.demos import tiny_model, tiny_pretrained
from lightning_sft.model.attention import gpu
from lightning_sft.model.attention import per_document as implementation
from lightning_sft.model.attention.choice import Attention, check_asked, probed
from lightning_sft.model.attention.documents import Documents
from lightning_sft.model.attention.per_document import NAMES
from lightning_sft.model.backbone import backbone_and_head
from lightning_sft.model.pretrained import config_dict
from lightning_sft.model.probes import ProbeResult
from lightning_sft.types import InputError
from tests.helpers.gradients import QUIET


def choose(model: PreTrainedModel, asked: str | None = None) -> tuple[Attention, ProbeResult]:
    return probed(model, *backbone_and_head(model), asked)


@pytest.mark.parametrize(
    ("model_type", "settings", "stock"),
    [("llama", {}, "sdpa"), ("gemma2", {}, "eager"), ("gpt_oss", {}, "eager"), ("opt", {"ffn_dim": 32}, "sdpa")],
)
def test_ours_is_chosen_where_it_keeps_documents_apart(model_type: str, settings: dict[str, Any], stock: str) -> None:
    model = tiny_model(model_type, **settings | {"word_embed_proj_dim": 16})
    chosen, findings = choose(model)
    assert chosen.name == model.config._attn_implementation == NAMES[stock]
    assert findings.isolates_documents


@pytest.mark.parametrize(
    ("model_type", "why"), [("bloom", "its own attention"), ("biogpt", "would attend to each other")]
)
def test_stock_attention_stays_where_ours_is_not_exact_and_the_reason_is_told(model_type: str, why: str) -> None:
    model = tiny_model(model_type)
    before = model.config._attn_implementation
    chosen, findings = choose(model)
    assert chosen.name == model.config._attn_implementation == before
    assert why in str(chosen)
    assert not findings.isolates_documents


def test_an_architecture_that_looks_into_its_mask_keeps_stock_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    forward = type(model.model.layers[0]).forward

    def looks(self: Any, hidden: Any, attention_mask: Any = None, **rest: Any) -> Any:
        return forward(self, hidden, None if attention_mask is None else attention_mask[:, :, :, :], **rest)

    monkeypatch.setattr(type(model.model.layers[0]), "forward", looks)
    chosen, findings = choose(model)
    assert chosen.name == model.config._attn_implementation == "sdpa"
    assert "does not support it (TypeError" in chosen.why
    assert findings.isolates_documents


def test_an_error_of_ours_is_raised_and_not_answered_by_stock_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "packed_attention", operator.neg)  # which takes one argument
    with pytest.raises(TypeError, match="takes exactly one argument"):
        choose(tiny_model())


def test_a_kernel_of_ours_that_gives_torch_the_wrong_tensors_is_an_error_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Documents, "bounds", torch.tensor([0, 24, 30], dtype=torch.int32))  # beyond the last token
    with pytest.raises(RuntimeError, match="exceeds dimension size"):
        choose(tiny_model())


@pytest.mark.parametrize("asked", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_on_a_cpu_is_one_message_before_anything_is_loaded(asked: str) -> None:
    module = SFTModule("no/such-model", attn_implementation=asked)
    Trainer(**QUIET | {"accelerator": "cpu", "precision": "bf16-mixed"}).strategy.connect(module)
    with pytest.raises(InputError, match=rf"{asked} runs on NVIDIA GPUs only, and this run is on cpu\. Leave it out"):
        module.configure_model()


def test_flash_attention_in_32_bits_is_refused_and_in_16_bits_is_not() -> None:
    gpu = torch.device("cuda", 0)
    with pytest.raises(InputError, match=r"needs half precision, got float32\. Set trainer.precision=bf16-mixed"):
        check_asked("flash_attention_2", gpu, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        check_asked("flash_attention_2", gpu, dtype)
    check_asked("sdpa", torch.device("cpu"), torch.float32)


def test_what_computes_in_16_bits_is_probed_under_the_autocast_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock attention that refuses 32 bits, as FlashAttention does, in its place: there is no GPU here."""
    seen: list[torch.dtype] = []

    def in_halves(module: Any, query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> Any:
        seen.append(value.dtype)  # queries and keys are in float32 under autocast on a CPU, where positions are
        assert value.dtype == torch.bfloat16, "FlashAttention only supports fp16 and bf16"
        return sdpa_attention_forward(module, query, key, value, mask, **settings)

    AttentionInterface.register("flash_for_tests", in_halves)
    AttentionMaskInterface.register("flash_for_tests", sdpa_mask)
    model = tiny_model()
    model.config._attn_implementation = "flash_for_tests"
    backbone, head = backbone_and_head(model)
    attention, findings = probed(model, backbone, head, "flash_for_tests", torch.device("cpu"), torch.bfloat16)
    assert attention.name == "flash_for_tests"
    assert findings.isolates_documents
    assert seen


def test_the_reason_names_the_kernel_and_why_no_better_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = gpu.Kernel("torch's flash attention", *[lambda *_: None] * 2)
    found = {"flash_attn 3": ("it needs compute capability 9.0", None), kernel.name: (None, kernel)}
    monkeypatch.setattr(gpu, "kernels", lambda device: found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    model = tiny_model()
    chosen, _ = probed(model, *backbone_and_head(model), device=torch.device("cuda", 0))
    assert "one call of torch's flash attention in half precision" in chosen.why
    assert "flash_attn 3: it needs compute capability 9.0" in chosen.why


@pytest.mark.parametrize("asked", ["sdpa", "eager"])
def test_what_is_asked_for_is_used(pretrained: str, asked: str) -> None:
    module = SFTModule(pretrained, attn_implementation=asked)
    module.configure_model()
    assert module.model is not None
    assert module.attention is not None
    assert module.model.config._attn_implementation == asked == module.attention.name


def test_ours_can_be_asked_for_and_is_refused_where_it_cannot_be_had(pretrained: str, tmp_path: Path) -> None:
    module = SFTModule(pretrained, attn_implementation="per_document")
    module.configure_model()
    assert module.attention is not None
    assert module.attention.name == "per_document"
    biogpt = tiny_pretrained(tmp_path / "biogpt", "biogpt")
    with pytest.raises(InputError, match=r"=per_document is not available for BioGpt.* Leave it out"):
        SFTModule(biogpt, attn_implementation="per_document").configure_model()


def test_no_name_of_ours_is_written_anywhere(pretrained: str, tmp_path: Path) -> None:
    module = SFTModule(pretrained)
    module.configure_model()
    model = module.model
    assert model is not None
    assert model.config._attn_implementation == "per_document"
    assert "per_document" not in json.dumps([config_dict(model), module.hparams["hf_config"]])
    model.save_pretrained(tmp_path)
    assert not [path for path in tmp_path.glob("*.json") if "per_document" in path.read_text()]
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_generation_is_that_of_stock_attention(pretrained: str) -> None:
    module = SFTModule(pretrained)
    module.configure_model()
    assert module.model is not None
    prompts = torch.tensor([[258, 258, 5, 6, 7], [9, 8, 7, 6, 5]])
    given = {"attention_mask": (prompts != 258).long(), "max_new_tokens": 6, "do_sample": False}
    ours = module.model.eval().generate(prompts, **given)
    assert torch.equal(ours, AutoModelForCausalLM.from_pretrained(pretrained).eval().generate(prompts, **given))
