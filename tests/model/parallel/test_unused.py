"""Parameters without a gradient: DDP looks for them, or the step is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_sft.demos import tiny_pretrained
from lightning_sft.model.backbone import backbone_and_head
from lightning_sft.model.parallel.unused import check_all_reduced, expect_unused, unused
from lightning_sft.model.pretrained import load_model
from lightning_sft.types import InputError

ERNIE = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1}


@pytest.mark.parametrize(
    ("model_type", "config", "names"),
    [
        ("llama", {}, []),
        ("gpt2", {}, []),
        ("mixtral", {"num_local_experts": 4}, []),
        ("rwkv", {"attention_hidden_size": 16}, [f"blocks.{i}.attention.time_decay" for i in range(2)]),
        ("ernie4_5_moe", ERNIE, ["layers.1.mlp.gate.moe_statics.e_score_correction_bias"]),
    ],
)
def test_parameters_that_text_gives_no_gradient_are_found(
    model_type: str, config: dict[str, Any], names: list[str], tmp_path: Path
) -> None:
    model = load_model(tiny_pretrained(tmp_path, model_type, **config))
    assert unused(*backbone_and_head(model)) == names
    strategy = DDPStrategy()
    expect_unused(strategy, *backbone_and_head(model))
    assert strategy._ddp_kwargs == ({"find_unused_parameters": True} if names else {})
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_step_in_which_ddp_has_averaged_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DDPStrategy, "world_size", 2)
    model = torch.nn.Linear(2, 2)
    model(torch.ones(2)).sum().backward()
    check_all_reduced(DDPStrategy(), model)
    model.bias.grad = None
    with pytest.raises(InputError, match=r"1 trained parameters have got no gradient, such as bias"):
        check_all_reduced(DDPStrategy(), model)
    check_all_reduced(DDPStrategy(find_unused_parameters=True), model)
