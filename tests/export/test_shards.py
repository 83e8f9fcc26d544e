"""What ranks export from their shards is what one process exports from their checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sft.checkpoints.reading import Checkpoint
from lightning_sft.export.convert import Settings, convert, export_checkpoint, rows_to_compare
from lightning_sft.export.restore import tokenizer_of
from lightning_sft.export.weights import StoredWeights
from tests.helpers import sharded_export
from tests.helpers.loading import launched
from tests.helpers.processes import torchrun
from tests.helpers.sharded_export import CASES, SMALL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each case what ranks have exported at the end of a fit, and its checkpoint."""
    return launched(sharded_export, tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("name", CASES)
def test_what_ranks_export_from_shards_is_what_one_process_exports(name: str, folder: Path) -> None:
    out = folder / name / "exports" / "final"
    checkpoint = Checkpoint(folder / name / "end.ckpt")
    rows, settings = rows_to_compare({}), Settings(**CASES[name].export)
    whole, tokenizer = checkpoint.whole(), tokenizer_of(checkpoint.metadata)
    wanted = convert(whole, tokenizer, folder / name / "by one process", rows, settings)
    of_run = {"README.md", "parity.json"}
    assert {path.name for path in out.iterdir()} == {path.name for path in wanted.iterdir()}
    for path in wanted.iterdir():
        if path.name not in of_run:
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    if CASES[name].export.get("max_shard_size") == SMALL:
        assert len(list(out.glob("*.safetensors"))) > 1


@pytest.mark.parametrize("name", CASES)
def test_the_command_writes_the_same_from_a_distributed_checkpoint_a_part_at_a_time(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, most = Checkpoint.weights, [0]

    def weights(self: Checkpoint, names: Any = None) -> dict[str, torch.Tensor]:
        most[0] = max(most[0], len(self.stored_dtypes() if names is None else names))
        return read(self, names)

    monkeypatch.setattr(Checkpoint, "weights", weights)
    ours = export_checkpoint(folder / name / "end.ckpt", folder / name / "by the command", **CASES[name].export)
    theirs = folder / name / "exports" / "final"
    for path in (path for path in theirs.iterdir() if path.name not in ("README.md", "parity.json")):
        assert (ours / path.name).read_bytes() == path.read_bytes(), path.name
    if "lora" not in CASES[name].model:  # else their base is merged with them as a whole
        found = json.loads((ours / "parity.json").read_text(encoding="utf-8"))
        assert most[0] <= max(
            len(names) for names in StoredWeights(Checkpoint(folder / name / "end.ckpt"), None).parts.values()
        )
        assert [model["name"] for model in found["models"]] == ["reloaded"]
        assert found["models"][0]["mean_kl"] <= (1e-6 if found["rounded_from"] is None else 1e-2)


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


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_alone_ends_with_its_error_though_others_wait_for_it(
    rank: int, pretrained_for_two: str, tmp_path: Path
) -> None:
    arguments = [pretrained_for_two, str(rank), str(tmp_path / "exports")]
    ended = torchrun("tests.helpers.sharded_export", *arguments, timeout=120, fails=True)
    assert ended[rank].code == 1
    assert "MemoryError: no memory left" in ended[rank].errors


def test_a_folder_that_cannot_be_written_is_a_warning_on_the_way_and_an_error_at_the_end_on_all_ranks(
    pretrained_for_two: str, tmp_path: Path
) -> None:
    torchrun("tests.helpers.sharded_export", pretrained_for_two, "disk", str(tmp_path), timeout=120)
    for name in ("whole_folder", "sync"):
        first, second = ((tmp_path / f"{name} {rank}").read_text(encoding="utf-8") for rank in (0, 1))
        assert first == "3 [Errno 28] No space left on device"  # the export after step 2 let training continue
        assert second == f"3 Rank 0 failed while this rank waited for it. OSError: {first[2:]}"
