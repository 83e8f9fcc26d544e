"""What ranks export from their shards is what one process exports from their checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_sft.export.convert import export_checkpoint
from tests.helpers import sharded_export
from tests.helpers.loading import launched
from tests.helpers.sharded_export import CASES, SMALL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each case what ranks have exported at the end of a fit, and its checkpoint."""
    return launched(sharded_export, tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("name", CASES)
def test_what_ranks_export_from_shards_is_what_one_process_exports(name: str, folder: Path) -> None:
    out = folder / name / "exports" / "final"
    wanted = export_checkpoint(folder / name / "end.ckpt", folder / name / "by one process", **CASES[name].export)
    of_run = {"README.md", "parity.json"}
    assert {path.name for path in out.iterdir()} == {path.name for path in wanted.iterdir()}
    for path in wanted.iterdir():
        if path.name not in of_run:
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    if CASES[name].export.get("max_shard_size") == SMALL:
        assert len(list(out.glob("*.safetensors"))) > 1


@pytest.mark.parametrize("name", CASES)
def test_the_folder_is_compared_with_the_sharded_model(name: str, folder: Path) -> None:
    found = json.loads((folder / name / "exports" / "final" / "parity.json").read_text(encoding="utf-8"))
    assert found["passed"]
    assert found["targets"] > 20
    [model] = found["models"]
    assert model["name"] == "reloaded"
    assert 0 <= model["mean_kl"] <= (1e-2 if "bfloat16" in str(CASES[name]) or "bf16" in str(CASES[name]) else 1e-6)


def test_an_export_that_fails_is_set_aside_and_its_error_reaches_all_ranks(folder: Path) -> None:
    first, second = ((folder / "failing" / f"rank{rank}").read_text(encoding="utf-8") for rank in (0, 1))
    assert first.startswith("The exported model is not the one that was trained: KL(trained ‖ reloaded) is ")
    assert second.startswith("Rank 0 failed while this rank waited for it. InputError: The exported model is not the")
    assert [path.name for path in (folder / "failing" / "exports").iterdir()] == ["final.failed"]
