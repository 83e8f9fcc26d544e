from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from lightning_sft.demos import tiny_model, tiny_pretrained, tiny_tokenizer
from lightning_sft.pretrained import (
    backbone_and_head,
    config_dict,
    context_length,
    load_model,
    load_tokenizer,
    model_from_config,
)
from lightning_sft.types import InputError


def test_it_is_ready_to_be_trained(pretrained: str) -> None:
    model = load_model(pretrained)
    assert model.training
    assert model.config.use_cache is False
    assert model.dtype == torch.float32


def test_weights_stored_in_bfloat16_are_trained_in_float32(tmp_path: Path) -> None:
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).dtype == torch.float32


def test_the_architecture_survives_as_plain_values(pretrained: str) -> None:
    model = load_model(pretrained)
    again = model_from_config(config_dict(model))
    again.load_state_dict(model.state_dict())
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert again.training
    assert again.config.use_cache is False


def test_the_context_length_is_the_models(pretrained: str) -> None:
    assert context_length(pretrained) == 256


@pytest.mark.parametrize("load", [load_model, load_tokenizer, context_length])
def test_a_path_that_is_no_model_is_one_error(load: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"can be loaded from .* The folder is there; expected a hub name"):
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
    with pytest.raises(InputError, match=r"\(hf_config\) describes no causal language model of transformers"):
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
