"""configs/recipes and the page about them: what each says of itself, and what the command writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import recipes
from benchmarks.published import PUBLISHED
from lightning_sft.data.rows.messages import Converter
from lightning_sft.main import main
from tests.helpers.processes import ROOT

ALL = {recipe.name: recipe for recipe in recipes.recipes()}
HERE = [name for name, recipe in ALL.items() if recipe.gpu_memory is None]
ON_GPUS = sorted(ALL.keys() - set(HERE))
PAGE = ROOT / "docs" / "reference" / "recipes.md"


def test_there_are_recipes_to_run_here_and_recipes_for_gpus() -> None:
    assert len(ALL) >= 12
    assert HERE
    assert ON_GPUS
    assert {ALL[name].config["model"]["pretrained"] for name in ON_GPUS} <= PUBLISHED.keys()


def test_the_page_is_what_the_command_writes_from_its_results() -> None:
    results = json.loads(PAGE.with_suffix(".json").read_text(encoding="utf-8"))
    assert results.keys() <= ALL.keys()
    assert recipes.page(results) == PAGE.read_text(encoding="utf-8")


def test_what_was_only_planned_is_not_among_what_was_measured() -> None:
    _, measured, planned = PAGE.read_text(encoding="utf-8").split("\n## ")
    assert all(f"[{name}]" in measured and f"[{name}]" not in planned for name in HERE)
    assert all(f"[{name}]" in planned and f"[{name}]" not in measured for name in ON_GPUS)
    assert "**Not run.**" in planned


@pytest.mark.parametrize("kind", ["home", "reasoning", "tools", "texts"])
def test_example_rows_are_rows_that_are_trained(kind: str) -> None:
    for row in recipes.rows(kind, 3):
        read = Converter().read(json.loads(json.dumps(row)), "f:1")
        weights = getattr(read, "weights", None) or getattr(read, "target_weights", [1])
        assert weights[-1] > 0


def test_a_recipe_whose_head_says_too_little_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# A recipe.\ntrainer: {}\n")
    with pytest.raises(ValueError, match=r"# For: \.\.\."):
        recipes.Recipe.of(tmp_path / "a.yaml")


@pytest.mark.parametrize("name", HERE)
def test_what_a_recipe_takes_here_are_rows_that_the_command_writes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretrained: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipes, "BUILD", tmp_path / "build" / "recipes")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    recipes.write_data(16)
    config = ["--config", str(ALL[name].path), "--model.pretrained", pretrained, "--trainer.accelerator", "cpu"]
    lengths = ["--data.max_length", "512", "--data.overflow", "split" if "texts" in name else "error"]
    shown = main(["show", *config, *lengths, "--rows", "0"])
    assert shown is not None
