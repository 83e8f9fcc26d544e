from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.loggers import CSVLogger

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import DriftMonitor, RunRecord, SafeCheckpoint, SampleLedger
from lightning_sft.commands.report.run import Run
from lightning_sft.data.rows.mixture import Mixture, Part
from lightning_sft.types import InputError


def fit(quiet_trainer: Any, pretrained: str, folder: Path, ckpt_path: Any = None, **settings: Any) -> list[Any]:
    rows = [{"prompt": f"Say {i}", "completion": f"{i} it is"} for i in range(12)]
    callbacks = [RunRecord(str(folder)), SafeCheckpoint(str(folder / "checkpoints"), every_n_train_steps=2)]
    given = {"val_check_interval": 2, "enable_checkpointing": True, **settings}
    callbacks += given.pop("more", [])
    trainer = quiet_trainer(callbacks=callbacks, **given)
    trainer.fit(
        SFTModule(pretrained), SFTDataModule(train=rows, val=rows[:3], tokens_per_batch=100), ckpt_path=ckpt_path
    )
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    varying = ("seconds", "train/tokens_per_second", "train/targets_per_second", "train/peak_memory_gib")
    return [{name: value for name, value in line.items() if name not in varying} for line in lines]


def test_a_run_that_goes_on_has_the_record_of_one_that_was_not_ended(
    pretrained: str, quiet_trainer: Any, tmp_path: Path
) -> None:
    whole = fit(quiet_trainer, pretrained, tmp_path / "whole")
    assert [line["step"] for line in whole if "train/loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in whole if "val/loss" in line] == [2, 4]
    assert not any("val/loss" in line for line in whole if "train/loss" in line)
    fit(quiet_trainer, pretrained, tmp_path / "killed", max_steps=3)
    [checkpoint] = (tmp_path / "killed" / "checkpoints").glob("*step=2.ckpt")
    resumed = fit(quiet_trainer, pretrained, tmp_path / "killed", checkpoint)
    both = [sorted(timeless(lines), key=lambda line: (line["step"], len(line))) for lines in (resumed, whole)]
    assert both[0] == both[1]
    record = json.loads((tmp_path / "killed" / "run.json").read_text())
    assert [start["step"] for start in record["starts"]] == [0, 2]
    assert record["facts"]["versions"]["lightning"]
    assert record["data"]["splits"]["train"]["rows"] == "12"
    assert sum(count for _, _, count in record["data"]["histogram"]) == 12


def test_a_step_has_the_losses_of_the_parts_that_are_in_it(
    pretrained: str, quiet_trainer: Any, jsonl: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": f"Say {i}", "completion": f"{i} it is"} for i in range(9)]
    parts = {name: Part(jsonl(rows, f"{name}.jsonl")) for name in ("a", "b")}
    callbacks = [RunRecord(str(tmp_path)), SampleLedger(str(tmp_path))]
    logger = CSVLogger(tmp_path / "csv", "", "")
    trainer = quiet_trainer(callbacks=callbacks, logger=logger, log_every_n_steps=1, accumulate_grad_batches=2)
    data = SFTDataModule(train=Mixture(parts), tokens_per_batch=40)
    trainer.fit(SFTModule(pretrained), data)
    lines, ledger = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "samples.jsonl")
    )
    names = [{f"train/loss/{Path(row).stem}" for micro in step["samples"][0] for row in micro} for step in ledger]
    found = [{name for name in line if name.startswith("train/loss/")} for line in lines]
    assert found == names
    assert {len(own) for own in names} == {1, 2}  # else nothing is shown
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        logged = [{k for k, v in row.items() if v and k.startswith("train/loss/")} for row in csv.DictReader(file)]
    assert logged == names


@pytest.mark.parametrize("every", [1, 3])
def test_without_validation_drift_is_measured_after_each_epoch(
    pretrained: str, quiet_trainer: Any, tmp_path: Path, every: int
) -> None:
    lines = fit(quiet_trainer, pretrained, tmp_path, limit_val_batches=0, more=[DriftMonitor()], max_epochs=2)
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 9))
    assert lines[-1]["step"] == 8
    assert lines[-1]["drift/all"] > 0


def test_half_a_record_is_skipped_by_name_and_written_anew(pretrained: str, quiet_trainer: Any, tmp_path: Path) -> None:
    fit(quiet_trainer, pretrained, tmp_path, max_steps=2)
    path = tmp_path / "run.json"
    path.write_text(path.read_text()[:100])
    with (
        pytest.warns(UserWarning, match=r"Skipping .*run.json: it is damaged"),
        pytest.raises(InputError, match=r"run.json is damaged.*resumes"),
    ):
        Run.read(tmp_path)
    with pytest.warns(UserWarning, match=r"Skipping .*run.json: it is damaged"):
        fit(quiet_trainer, pretrained, tmp_path, "last")
    assert [start["step"] for start in Run.read(tmp_path).record["starts"]] == [2]


@pytest.mark.parametrize(
    ("settings", "more", "reason"),
    [
        ({"max_steps": 3}, [], "trainer.max_steps=3 reached"),
        ({}, [], "trainer.max_epochs=1 reached"),
        ({"max_epochs": 9}, [EarlyStopping("val/loss", stopping_threshold=99.0)], "EarlyStopping: Stopping threshold"),
        ({"max_epochs": 9}, [Timer({"milliseconds": 1})], "trainer.max_time reached"),
    ],
)
def test_the_record_says_why_the_run_ended(
    pretrained: str, quiet_trainer: Any, tmp_path: Path, settings: dict[str, Any], more: list[Any], reason: str
) -> None:
    fit(quiet_trainer, pretrained, tmp_path, more=more, **settings)
    [start] = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert start["end"]["reason"].startswith(reason)
