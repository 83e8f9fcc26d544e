"""What the command line does so that the same command begins a run and goes on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_sft.callbacks.checkpoint import SafeCheckpoint
from lightning_sft.callbacks.ledger import SampleLedger
from lightning_sft.callbacks.preempt import Preempt
from lightning_sft.demos import tiny_pretrained
from lightning_sft.main import main
from lightning_sft.types import InputError


@pytest.fixture
def arguments(pretrained: str, jsonl: Any, rows: list[dict[str, str]], tmp_path: Path) -> list[str]:
    flags = {
        "model.pretrained": pretrained,
        "data.train": jsonl(rows),
        "data.val": jsonl(rows),
        "trainer.logger": "false",
    }
    flags |= {"trainer.accelerator": "cpu", "trainer.default_root_dir": str(tmp_path / "run")}
    flags |= {"trainer.enable_progress_bar": "false", "trainer.enable_model_summary": "false"}
    return [text for key, value in flags.items() for text in (f"--{key}", value)]


def of_kind(cli: Any, kind: type) -> list[Any]:
    return [callback for callback in cli.trainer.callbacks if isinstance(callback, kind)]


def test_the_same_command_begins_a_run_and_goes_on_with_it(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = ["--ckpt_path", "last"]
    first = main(["fit", *arguments, *last])
    written = {"checkpoints", "config.yaml", "samples.jsonl", "run.json", "metrics.jsonl"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == written
    monkeypatch.setattr("lightning_sft.pretrained.load_model", None)  # the pretrained weights are not needed
    again = main(["fit", *arguments, *last, "--trainer.max_epochs", "2"])
    assert again.trainer.global_step == 2 * first.trainer.global_step
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == again.trainer.global_step
    assert main(["validate", *arguments, *last]).trainer.ckpt_path == of_kind(again, SafeCheckpoint)[0].best_model_path


def test_last_without_a_checkpoint_is_an_error_where_nothing_can_begin(arguments: list[str]) -> None:
    with pytest.raises(InputError, match=r"ckpt_path=last: there is no checkpoint in .*checkpoints"):
        main(["validate", *arguments, "--ckpt_path", "last"])


def test_last_of_another_model_is_refused(arguments: list[str], tmp_path: Path) -> None:
    main(["fit", *arguments, "--ckpt_path", "last"])
    other = tiny_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"of a run of model.pretrained=.*llama, now .*other. Give this run a folder"):
        main(["fit", *arguments, "--model.pretrained", other, "--ckpt_path", "last"])


def test_callbacks_of_the_user_take_the_place_of_ours(arguments: list[str], tmp_path: Path) -> None:
    own = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(tmp_path / "own"), "save_last": True}}
    told = {"class_path": "lightning_sft.callbacks.Preempt", "init_args": {"signals": ["SIGUSR2"]}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [own, told]}}))
    command = ["fit", "--config", str(tmp_path / "own.yaml"), *arguments, "--ckpt_path", "last"]
    cli = main(command)
    assert [type(saver) for saver in of_kind(cli, ModelCheckpoint)] == [ModelCheckpoint]
    assert [len(callback.signals) for callback in of_kind(cli, Preempt)] == [1]
    assert of_kind(cli, SampleLedger)
    assert Path(main(command).trainer.ckpt_path).parent == tmp_path / "own"  # last looks there too


def test_without_checkpoints_nothing_is_added(arguments: list[str]) -> None:
    cli = main(["fit", *arguments, "--trainer.enable_checkpointing", "false"])
    assert not of_kind(cli, (Preempt, SampleLedger, SafeCheckpoint))


def test_runs_without_last_keep_to_the_folders_of_their_loggers(arguments: list[str], tmp_path: Path) -> None:
    logger = [
        "--trainer.logger",
        "lightning.pytorch.loggers.CSVLogger",
        "--trainer.logger.save_dir",
        str(tmp_path / "run"),
    ]
    for version in (0, 1):
        main(["fit", *arguments, *logger])
        folder = tmp_path / "run" / "lightning_logs" / f"version_{version}"
        assert (folder / "samples.jsonl").is_file()
        assert len(list((folder / "checkpoints").glob("*.ckpt"))) == 1
    trainer = main(["fit", *arguments, *logger, "--ckpt_path", "last"]).trainer
    assert "version_1" in str(trainer.ckpt_path)
