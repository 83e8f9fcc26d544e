from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_sft.export.model_card import model_card

PART = {"name": "", "source": "hf:owner/data:train", "share": None, "weight": 1.0, "rows": 1234, "sequences": 1300}
RUN_INFO_KEY: dict[str, Any] = {
    "step": 7,
    "metrics": {"val/loss": 1.5},
    "optimizer": {"class": "AdamW", "lr": 1e-5},
    "data": {"train": {"parts": [PART], "targets": 99, "refused": 1, "too_long": 2, "cut": 3}},
    "versions": {"torch": "2.13"},
}
PARITY = {
    "models": [{"name": "reloaded", "mean_kl": 0.001, "max_kl": 0.01, "top1": 0.5}],
    **{"targets": 12, "rows": "8 rows", "dtype": "bfloat16", "rounded_from": "float32"},
}


def front_matter(card: str) -> dict[str, Any]:
    _, matter, _ = card.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(matter)
    return found


def test_the_front_matter_is_yaml_with_names_that_the_hub_knows() -> None:
    matter = front_matter(model_card("mine", {"pretrained": "owner/base"}, RUN_INFO_KEY))
    assert matter["base_model"] == "owner/base"
    assert matter["datasets"] == ["owner/data"]
    assert matter["license"] == "unknown"
    assert matter["library_name"] == "transformers"


@pytest.mark.parametrize("base", ["/home/me/base", "./base", "a/b/c", "base.gguf"])
def test_paths_of_this_machine_are_no_names_of_the_hub(base: str) -> None:
    facts = RUN_INFO_KEY | {
        "data": {"train": RUN_INFO_KEY["data"]["train"] | {"parts": [PART | {"source": "/home/me/a.jsonl"}]}}
    }
    matter = front_matter(model_card("mine", {"pretrained": base}, facts))
    assert not {"base_model", "datasets"} & matter.keys()


def test_a_card_has_data_figures_settings_and_the_objective() -> None:
    hyper_parameters = {
        "pretrained": "owner/base",
        "normalize": "sequence",
        "hf_config": {"secret": 1},
        "_class_path": 2,
    }
    card = model_card("mine", hyper_parameters, RUN_INFO_KEY, PARITY)
    for part in (
        "| train | hf:owner/data:train | 1,234 | 1,300 |  | 1.0 |",
        "- train: 99 target tokens; 1 row was refused, 2 sequences left out because of their length, 3 cut.",
        "| val/loss | 1.5 |",
        "w is 1 / targets of its answer",
        "weights in bfloat16, rounded from float32",
        "| reloaded | 1.00e-03 | 1.00e-02 | 50.00% |",
        "| torch | 2.13 |",
    ):
        assert part in card, part
    assert "secret" not in card
    [settings] = [block for block in card.split("```") if block.startswith("yaml\n")]
    assert yaml.safe_load(settings.removeprefix("yaml\n"))["optimizer"]["lr"] == 1e-5


@pytest.mark.parametrize("knows", [True, False])
def test_the_code_of_a_card_runs(
    knows: bool, pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pretrained, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    config = {"hf_config": {"architectures": ["LlamaForCausalLM"]}} if knows else {}
    card = model_card("mine", config, {"template": {"variables": {"enable_thinking": False, "today": "2026-01-31"}}})
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "enable_thinking=False" in code
    assert ("LlamaForCausalLM" in code) is knows
    exec(code.replace("max_new_tokens=256", "max_new_tokens=3"), {})
    assert capsys.readouterr().out.endswith("\n")


def test_of_a_stream_no_counts_are_claimed() -> None:
    part = {name: value for name, value in PART.items() if name not in ("rows", "sequences")}
    card = model_card("mine", {}, {"data": {"train": {"parts": [part]}}})
    assert "| streamed | streamed |" in card
    assert "target tokens;" not in card


def test_a_checkpoint_that_knows_nothing_of_its_run_gives_a_card_all_the_same() -> None:
    assert "## Objective" in model_card("mine", {}, {})
