from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from lightning_sft import SFTModule
from lightning_sft.data.batches.collate import collate
from lightning_sft.demos import tiny_model, tiny_pretrained, tiny_tokenizer
from lightning_sft.model.backbone import backbone_and_head
from lightning_sft.model.pretrained import (
    config_dict,
    context_length,
    load_model,
    load_tokenizer,
    model_from_config,
    passed_over,
)
from lightning_sft.model.tuning import tuning
from lightning_sft.types import Example, InputError
from tests.helpers.composites import composite


def test_it_is_ready_to_be_trained(pretrained: str) -> None:
    model = load_model(pretrained)
    assert model.training
    assert model.config.use_cache is False
    assert model.dtype == torch.float32


def test_weights_stored_in_bfloat16_are_trained_in_float32(tmp_path: Path) -> None:
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).dtype == torch.float32


def test_experts_compute_in_float64_where_torch_has_no_grouped_matmul_for_it(tmp_path: Path) -> None:
    model = load_model(tiny_pretrained(tmp_path, "mixtral", num_local_experts=2), dtype=torch.float64)
    assert model(torch.tensor([[1, 2, 3]])).logits.dtype == torch.float64


def test_the_architecture_survives_as_plain_values(pretrained: str) -> None:
    model = load_model(pretrained)
    again = model_from_config(config_dict(model))
    again.load_state_dict(model.state_dict())
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert again.training
    assert again.config.use_cache is False


def test_an_infinite_limit_of_an_architecture_survives_as_plain_values() -> None:
    model = tiny_model("mamba2", num_heads=4, head_dim=8, state_size=8, n_groups=1)
    assert model.config.time_step_limit == (0.0, math.inf)
    assert list(model_from_config(config_dict(model)).config.time_step_limit) == [0.0, math.inf]


def test_the_context_length_is_the_models(pretrained: str) -> None:
    assert context_length(pretrained) == 256


@pytest.mark.parametrize("load", [load_model, load_tokenizer, context_length])
def test_a_path_that_is_no_model_is_one_error(load: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"can be loaded from .* The path exists; expected a hub name"):
        load(str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "nowhere/at-all"])
def test_a_name_that_is_nowhere_is_one_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=rf"No causal language model can be loaded from '{name}'. There is no such"):
        load_model(name)


def test_code_beside_a_model_is_not_run_and_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (load_model, context_length):
        with pytest.raises(InputError, match=r"contains custom code"):
            load(str(tmp_path))
    assert not asked
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["of its own", "known but no language model", "a part of a known one"])
def test_code_that_a_checkpoint_names_is_not_run_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    own = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), f"{tmp_path}--own.Model")
    foreign: dict[str, Any] = {"auto_map": own, "_name_or_path": str(tmp_path)}
    config = {
        "of its own": foreign | {"model_type": "own"},
        "known but no language model": foreign | {"model_type": "t5"},
        "a part of a known one": {"model_type": "gemma3", "vision_config": foreign | {"model_type": "shieldgemma2"}},
    }[kind]
    with pytest.raises(InputError, match=r"\(hf_config\) does not describe a causal language model of transformers"):
        model_from_config(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError):
        load_model(str(tmp_path))
    assert not asked
    assert not (tmp_path / "run").exists()


def test_a_missing_gguf_file_is_one_error() -> None:
    with pytest.raises(InputError, match=r"There is no GGUF file"):
        load_model("nowhere.gguf")


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"No causal language model can be loaded .* Unrecognized configuration class"):
        load_model(str(tmp_path))


def test_an_encoder_decoder_that_sees_images_is_refused(tmp_path: Path) -> None:
    size = {"num_layers": 1, "num_heads": 2, "d_ff": 16, "d_kv": 8, "hidden_size": 16, "vocab_size": 264}
    config = AutoConfig.for_model("pix2struct", text_config=size, vision_config=size | {"num_hidden_layers": 1})
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"is an encoder-decoder \(Pix2Struct"):
        load_model(str(tmp_path))


def test_a_tokenizer_without_a_chat_template_is_one_error_with_the_remedy(tmp_path: Path) -> None:
    tiny_tokenizer(None).save_pretrained(tmp_path)
    tiny_model().config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has no chat template.*data.chat_template=FILE.jinja"):
        load_tokenizer(str(tmp_path))
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages }}")
    assert load_tokenizer(str(tmp_path), str(template)).chat_template == "{{ messages }}"
    with pytest.raises(InputError, match=r"no chat template file"):
        load_tokenizer(str(tmp_path), "nowhere.jinja")


def test_a_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_pretrained(tmp_path / "model")
    assert context_length("~/model") == 256


def test_backbone_and_head_are_told_apart() -> None:
    model = tiny_model()
    backbone, head = backbone_and_head(model)
    assert backbone is model.model
    assert head is model.lm_head


def with_tensors(folder: str, change: Any) -> str:
    """Change the tensors of a file of weights."""
    path = Path(folder) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_of_a_checkpoint_that_names_a_class_of_text_the_rest_is_passed_over_and_known_by_name(tmp_path: Path) -> None:
    folder = composite(tmp_path, "qwen3_5")
    with_tensors(folder, lambda tensors: tensors.update({"mtp.fc.weight": torch.ones(2)}))
    whole = load_model(folder)
    assert type(whole) is type(AutoModelForImageTextToText.from_pretrained(folder))
    assert passed_over(whole, folder).keys() == {"mtp.fc.weight"}
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3_5ForCausalLM"]}))
    text = load_model(folder)
    assert type(text) is type(AutoModelForCausalLM.from_pretrained(folder))
    outside = {name for name in load_file(tmp_path / "model.safetensors") if "visual" in name}
    assert passed_over(text, folder).keys() == {"mtp.fc.weight"} | outside


def test_a_checkpoint_with_tensors_that_no_part_of_the_model_has_is_refused(tmp_path: Path) -> None:
    folder = tiny_pretrained(tmp_path)
    with_tensors(folder, lambda tensors: tensors.update({"v_head.summary.weight": torch.ones(2)}))
    with pytest.raises(InputError, match=r"v_head \(1 tensors\)"):
        load_model(folder)


def test_a_checkpoint_without_some_of_the_weights_is_refused(tmp_path: Path) -> None:
    folder = with_tensors(tiny_pretrained(tmp_path), lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(InputError, match=r"has no weights for lm_head.weight; they would be initialized at random"):
        load_model(folder)


@pytest.mark.parametrize("without_prefix", [False, True])
def test_what_old_files_hold_that_is_computed_today_is_no_part(tmp_path: Path, without_prefix: bool) -> None:
    """GPT-2's file has causal masks, and names without the prefix of the backbone."""

    def age(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop("lm_head.weight", None)
        tensors |= {"transformer.h.0.attn.bias": torch.ones(4, 4), "transformer.h.1.attn.masked_bias": torch.ones(1)}
        for name in list(tensors) if without_prefix else ():
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    folder = with_tensors(tiny_pretrained(tmp_path, "gpt2", tie_word_embeddings=True), age)
    wanted = tiny_model("gpt2", tie_word_embeddings=True).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in load_model(folder).state_dict().items())


def test_of_a_composite_model_the_text_is_trained_and_all_of_it_has_a_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DDP would wait for the gradient of a vision tower."""
    said: list[str] = []
    monkeypatch.setattr(tuning, "rank_zero_info", said.append)
    module = SFTModule(composite(tmp_path, "gemma3"))
    module.configure_model()
    assert "parameters are not trained, such as model.vision_tower" in "".join(said)
    module(collate([Example(range(5, 20), [0.0] + [1.0] * 14)])).total.backward()
    of_text = {name for name, parameter in module.model.named_parameters() if parameter.grad is not None}
    assert of_text == {name for name, parameter in module.model.named_parameters() if parameter.requires_grad}
    assert not any("vision_tower" in name or "projector" in name for name in of_text)
    assert len(of_text) == len(list(module.model.model.language_model.parameters()))
    module = SFTModule(module.pretrained, trained=["*projector*"])
    module.configure_model()
    assert any("projector" in name for name, parameter in module.model.named_parameters() if parameter.requires_grad)
