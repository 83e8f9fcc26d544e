"""benchmarks/plans.py and the tables of docs/reference/memory.md: all configs, with the shapes that were published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks import plans
from benchmarks.published import PUBLISHED
from lightning_sft.demos import tiny_pretrained
from lightning_sft.model.pretrained import load_architecture, model_from_config
from tests.helpers.pages import tables
from tests.helpers.processes import ROOT

PAGE = ROOT / "docs" / "reference" / "memory.md"
RESULTS: dict[str, Any] = json.loads(PAGE.with_name("plans.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_has_as_many_parameters_as_the_published_model(name: str, tmp_path: Path) -> None:
    shape = PUBLISHED[name]
    shape.config().save_pretrained(tmp_path)
    with torch.device("meta"):
        model = model_from_config(load_architecture(str(tmp_path)))
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert count + shape.elsewhere == pytest.approx(shape.billions, rel=0.005)
    if name in {plans.model_of(path) for path in plans.configs().values()}:
        own = (found for key, found in RESULTS.items() if name == model_of(key))
        planned = [found["parameters"] for found in own if "tensor-parallel" not in found["layout"]]
        assert planned == [pytest.approx(count * 1e9)] * len(planned)


def model_of(name: str) -> str:
    """The model of a result; those of long rows are no configs."""
    return plans.model_of(plans.configs()[name]) if name in plans.configs() else plans.LONG_MODEL


def test_each_shipped_config_has_a_figure_there_or_among_the_recipes() -> None:
    paths = (path.relative_to(plans.CONFIGS) for path in plans.CONFIGS.rglob("*.yaml"))
    others = {path.with_suffix("").as_posix() for path in paths} - plans.configs().keys()
    assert {*plans.configs(), *plans.LONG_SETTINGS} <= RESULTS.keys()
    found = json.loads((ROOT / "docs" / "reference" / "recipes.json").read_text(encoding="utf-8"))
    assert others <= {f"recipes/{name}" for name, own in found.items() if own["gib"] > 0}


def test_the_page_is_what_the_command_writes_from_its_results() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert plans.page(text, RESULTS) == text
    written = {row[0]: row for _, *rows in tables(text) for row in rows}
    assert all(f"[{name}](../../configs/{name}.yaml)" in written for name in plans.configs())


@pytest.mark.parametrize("name", ["fsdp2", pytest.param("mixture", marks=pytest.mark.slow)])
def test_a_config_is_planned(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small model; the rows fill the micro-batch."""
    monkeypatch.setattr(plans, "BUILD", tmp_path)
    shape = Path(tiny_pretrained(tmp_path / "model", num_key_value_heads=2, max_position_embeddings=4096))
    found = plans.planned(plans.configs()[name], shape, num_rows=64)
    assert found["fits"]
    assert 0.6 < found["gib"] < 1.5  # CUDA's context, and little else
    assert found["layout"] == ("FSDP2 over 8" if name == "fsdp2" else "one device")
    assert found["tokens"] == 16_384


@pytest.mark.slow
def test_what_does_not_fit_is_planned_for_more_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "BUILD", tmp_path)
    monkeypatch.setattr(plans, "GPU", plans.GPU | {"memory": 0.8})
    monkeypatch.setattr(plans, "WIDER", (2, 8))
    shape = Path(tiny_pretrained(tmp_path / "model", hidden_size=512, vocab_size=100_000, max_position_embeddings=4096))
    found = plans.planned(plans.configs()["models/llama3"], shape, num_rows=64)
    assert not found["fits"]
    assert found["instead"]["layout"].startswith("FSDP2 over ")
    assert found["instead"]["gib"] < found["gib"]


@pytest.mark.slow
@pytest.mark.parametrize("name", plans.configs())
def test_a_figure_of_the_page_is_what_plan_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "BUILD", tmp_path)
    config = plans.configs()[name]
    tokenizer = tiny_pretrained(tmp_path / "tokenizer")
    found = plans.planned(config, PUBLISHED[plans.model_of(config)].write(tmp_path / "shape", Path(tokenizer)))
    assert found["gib"] == pytest.approx(RESULTS[name]["gib"], rel=0.05)  # the tokenizer is another
    assert found["layout"] == RESULTS[name]["layout"]
    assert yaml.safe_load(config.read_text())["model"]["pretrained"]
