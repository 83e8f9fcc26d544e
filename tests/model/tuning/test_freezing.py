"""Patterns of parameters that are trained or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from lightning.pytorch import Trainer

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.demos import tiny_pretrained
from lightning_sft.model.tuning.adapters import Lora
from lightning_sft.types import InputError
from tests.helpers.gradients import ROWS


def trained(pretrained: str, **settings: Any) -> set[str]:
    module = SFTModule(pretrained, **settings)
    module.configure_model()
    return {n.removeprefix("scorer.model.") for n, p in module.named_parameters() if p.requires_grad}


def test_freezing_comes_first_then_what_is_trained_all_the_same(pretrained: str) -> None:
    everything = trained(pretrained)
    first = {name for name in everything if ".layers.0." in name}
    assert len(everything) == 21
    assert trained(pretrained, frozen=["*.layers.0.*"]) == everything - first
    assert trained(pretrained, frozen=["*"], trained=["*norm*"]) == {n for n in everything if "norm" in n}
    assert trained(pretrained, frozen=["*.layers.0.*", "*norm*"], trained=["*.0.input_layernorm*"]) == {
        n for n in everything if n == "model.layers.0.input_layernorm.weight" or (n not in first and "norm" not in n)
    }


def test_names_are_those_of_the_pretrained_model_beside_adapters_too(pretrained: str) -> None:
    adapters = trained(pretrained, lora=Lora())
    assert trained(pretrained, lora=Lora(), trained=["*.0.self_attn.q_proj.weight"]) - adapters == {
        "model.layers.0.self_attn.q_proj.base_layer.weight"
    }
    assert trained(pretrained, lora=Lora(), frozen=["*.layers.0.*"]) == {
        n for n in adapters if ".0.mlp" not in n and ".0.self" not in n
    }


def test_a_tied_head_is_known_by_both_names(tmp_path: Any) -> None:
    pretrained = tiny_pretrained(tmp_path, tie_word_embeddings=True)
    assert "model.embed_tokens.weight" not in trained(pretrained, frozen=["lm_head*"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frozen": ["layers.0"]}, "model.frozen has 'layers.0', which matches no parameter"),
        ({"frozen": ["*"], "trained": ["nrom"]}, "model.trained has 'nrom', which matches no parameter"),
        ({"frozen": ["*"]}, r"model.frozen=\['\*'\] leaves nothing to train"),
        ({"trained": ["*norm*"]}, r"are trained already.*set model.frozen=\['\*'\] and model.trained"),
        ({"lora": Lora(), "frozen": ["*embed*"]}, "are frozen already"),
    ],
)
def test_a_pattern_without_effect_is_refused(pretrained: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trained(pretrained, **settings)


def test_what_is_frozen_does_not_change(pretrained: str, quiet_trainer: Callable[..., Trainer]) -> None:
    module = SFTModule(pretrained, frozen=["*.layers.0.*", "*embed*"], warmup=0.0)
    module.configure_model()
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    quiet_trainer(max_steps=2).fit(module, SFTDataModule(train=ROWS, tokens_per_batch=100))
    changed = {name for name, p in module.named_parameters() if not p.equal(before[name])}
    assert changed == {name for name in before if ".layers.0." not in name and "embed" not in name}
