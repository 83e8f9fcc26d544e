"""What a command leaves on disk when it is refused: nothing, and files of an earlier run stay as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Callback

from lightning_sft import SFTModule
from lightning_sft.main import main
from lightning_sft.types import InputError


class Refuses(Callback):
    """Refuses a command in a hook, as callbacks of ours and of users do."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self._refuse)

    def _refuse(self, *_: Any, **__: Any) -> None:
        raise InputError("refused")


class RefusingModule(SFTModule):
    """Refuses a fit in the last hook that comes before the first batch."""

    def on_train_start(self) -> None:
        super().on_train_start()
        raise InputError("refused")


def snapshot(folder: Path) -> dict[str, tuple[int, bytes] | None]:
    """Every path below a folder; of files, the time of the last change and the bytes."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def arguments(pretrained: str, jsonl: Any, rows: list[dict[str, str]], tmp_path: Path) -> list[str]:
    path = jsonl(rows)
    flags = {
        "model.pretrained": pretrained,
        **{f"data.{split}": path for split in ("train", "val", "test", "predict")},
        "model.max_new_tokens": 2,
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": tmp_path / "runs" / "one",
        "trainer.num_sanity_val_steps": 1,
        "trainer.max_steps": 2,
        "trainer.max_epochs": 9,
    }
    return [text for key, value in flags.items() for text in (f"--{key}", str(value))]


NO_FILE = ["--data.train", "nowhere.jsonl", "--data.test", "nowhere.jsonl", "--data.predict", "nowhere.jsonl"]
REFUSALS = {
    "a value": ["--model.warmup", "7"],
    "no data": NO_FILE,
    "no room for a row": ["--data.max_length", "1"],
    "no such rank": ["--model.lora", '{"targets": ["nowhere"]}'],
    "setup": [f"--trainer.callbacks+={__name__}.Refuses", "--trainer.callbacks.hook=setup"],
    "start": [f"--trainer.callbacks+={__name__}.Refuses", "--trainer.callbacks.hook=on_train_start"],
}
LOGGERS = {
    "the default logger": [],
    "CSV": ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "{root}"],
    "no logger": ["--trainer.logger", "false"],
}


def refused(command: list[str]) -> None:
    with pytest.raises((InputError, SystemExit)):
        main(command)


CASES = [(why, "the default logger") for why in REFUSALS] + [("start", "CSV"), ("start", "no logger")]


@pytest.mark.parametrize(("why", "logger"), CASES)
def test_a_refused_fit_makes_nothing(arguments: list[str], tmp_path: Path, why: str, logger: str) -> None:
    options = [text.format(root=tmp_path / "runs" / "one") for text in LOGGERS[logger]]
    last = ["--ckpt_path", "last"] if logger == "no logger" else []
    before = snapshot(tmp_path)
    refused(["fit", *arguments, *options, *last, *REFUSALS[why]])
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(("verb", "hook"), [("validate", "setup"), ("test", None), ("predict", "on_predict_start")])
def test_another_refused_verb_makes_nothing(arguments: list[str], tmp_path: Path, verb: str, hook: str | None) -> None:
    before = snapshot(tmp_path)
    more = [f"--trainer.callbacks+={__name__}.Refuses", f"--trainer.callbacks.hook={hook}"] if hook else NO_FILE
    refused([verb, *arguments, *more, "--data.val", "nowhere.jsonl"])
    assert snapshot(tmp_path) == before


def test_a_refused_fit_leaves_a_run_as_it_was(arguments: list[str], tmp_path: Path) -> None:
    root, other = tmp_path / "runs" / "one", tmp_path / "runs" / "other"
    every = ["--trainer.logger", "false", "--trainer.callbacks", "lightning_sft.callbacks.SafeCheckpoint"]
    every += ["--trainer.callbacks.every_n_train_steps", "1", "--trainer.callbacks.keep_last", "9"]
    samples = ["--trainer.callbacks+=lightning_sft.callbacks.SampleGenerations"]
    last = ["--ckpt_path", "last"]
    main(["fit", *arguments, *every, *samples, *last])
    main(["fit", *arguments, *every, *last, "--trainer.default_root_dir", str(other)])
    [first] = (other / "checkpoints").glob("resume-*-step=1.ckpt")
    for path in (root / "checkpoints").glob("*-step=2.ckpt"):
        path.unlink()  # so that what `last` resumes from is behind the ledger
    before = snapshot(root)
    assert {"config.yaml", "run.json", "samples.jsonl", "metrics.jsonl", "samples/step=00000000.jsonl"} <= set(before)
    for more in (
        NO_FILE,
        REFUSALS["start"],
        [*last, *NO_FILE],
        [*last, *REFUSALS["start"]],
        [*last, "--model", f"{__name__}.RefusingModule"],
        ["--ckpt_path", str(first)],  # of another run
        samples,  # begins anew
    ):
        refused(["fit", *arguments, "--trainer.logger", "false", *more])
        assert snapshot(root) == before, more


def test_the_config_of_a_fit_is_saved_and_recorded_and_no_other_verb_replaces_it(
    arguments: list[str], tmp_path: Path
) -> None:
    root = tmp_path / "runs" / "one"
    own = [*arguments, "--trainer.logger", "false", "--ckpt_path", "last"]
    main(["fit", *own])
    saved = (root / "config.yaml").read_text()
    assert yaml.safe_load(saved)["trainer"]["max_steps"] == 2
    assert json.loads((root / "run.json").read_text())["config"] == saved
    for verb in ("validate", "test", "predict"):
        main([verb, *own])
        assert (root / "config.yaml").read_text() == saved
    main(["fit", "--config", str(root / "config.yaml"), "--trainer.max_steps", "3"])
    assert yaml.safe_load((root / "config.yaml").read_text())["trainer"]["max_steps"] == 3


def test_other_verbs_save_their_config_in_the_folder_of_their_logger(arguments: list[str]) -> None:
    cli = main(["test", *arguments])
    assert yaml.safe_load(Path(cli.trainer.log_dir, "config.yaml").read_text())["trainer"]["max_epochs"] == 9


def test_what_others_have_put_beside_a_loggers_files_is_kept(arguments: list[str], tmp_path: Path) -> None:
    root = tmp_path / "runs" / "one"
    made = f"{__name__}.Notes"
    refused(["fit", *arguments, f"--trainer.callbacks+={made}", *REFUSALS["start"]])
    assert [path.name for path in root.rglob("*") if path.is_file()] == ["notes.txt"]


class Notes(Callback):
    """Writes into the folder of the run before a fit is refused."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        Path(trainer.log_dir, "notes.txt").touch()
