"""Of each file of configs/, ``plan`` says what a rank takes; the models are tiny ones of the same architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_sft.demos import tiny_pretrained
from lightning_sft.main import main
from tests.architectures.configs import save
from tests.helpers.processes import ROOT
from tests.helpers.slow import slow_but
from tests.test_configs import ALL, write_data
from tests.test_families import FAMILIES

DEVICES = 8
QUICK_CONFIGS = ["context_parallel", "fsdp2", "streaming", "tensor_parallel"]
QUICK_FAMILIES = ["deepseek_r1_distill", "gemma4", "gpt_oss"]  # dense, sliding windows, experts
COPIES = {"context_parallel": 4, "tensor_parallel": 2}  # devices that get the same batches


def planned(config: Path, pretrained: str, capsys: pytest.CaptureFixture[str], **flags: str) -> dict[str, Any]:
    flags = {"model.pretrained": pretrained, "trainer.accelerator": "gpu", "memory": "80"} | flags
    main(["plan", "--config", str(config), "--json", *(x for key, own in flags.items() for x in (f"--{key}", own))])
    printed = capsys.readouterr().out
    found: dict[str, Any] = json.loads(printed[printed.index("{\n") :])
    return found


@pytest.mark.parametrize("name", slow_but(QUICK_CONFIGS, ALL))
def test_a_rank_takes_its_share(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(ALL[name], tmp_path)
    model = tiny_pretrained(tmp_path / "model", num_attention_heads=4, num_key_value_heads=2)
    trainer = yaml.safe_load(ALL[name].read_text())["trainer"]
    nodes = trainer.get("num_nodes", 1)
    found = planned(ALL[name], model, capsys, **{"trainer.devices": str(DEVICES)})
    assert found["fits"]
    assert found["bytes"]["peak"] < 2**30
    if name != "streaming":
        accumulate = trainer.get("accumulate_grad_batches", 1)
        assert found["steps"]["micro-batches a step"] == nodes * DEVICES * accumulate // COPIES.get(name, 1)
    in_step = found["bytes"]["moments"]["optimizer step"]
    if "FSDP2" in found["strategy"]:
        matrices = 2 if name == "tensor_parallel" else 1  # are cut beside
        assert in_step["optimizer"] <= 1.1 * 2 * 4 * found["parameters"] * matrices / (nodes * DEVICES)


@pytest.mark.filterwarnings("ignore:In this model, documents packed into one row see each other")
@pytest.mark.parametrize("name", slow_but(QUICK_FAMILIES, FAMILIES))
def test_a_config_of_a_family_is_planned_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    family = FAMILIES[name]
    monkeypatch.chdir(tmp_path)
    write_data(family.config, tmp_path)
    pretrained = save(family.model_type, tmp_path / "model", torch.bfloat16, family.tokenizer)
    found = planned(family.config, pretrained, capsys, **{"trainer.devices": "1"})
    assert found["fits"]
    assert found["trained_parameters"] > 0
    assert ROOT / "configs" / "models" / f"{name}.yaml" == family.config
