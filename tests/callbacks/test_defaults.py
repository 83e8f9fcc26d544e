"""What the command line does so that the same command begins a run and goes on with it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from lightning_sft.callbacks.checkpoint import BestCheckpoint, SafeCheckpoint
from lightning_sft.callbacks.defaults import default_callbacks
from lightning_sft.callbacks.ledger import SampleLedger
from lightning_sft.callbacks.preempt import Preempt
from lightning_sft.callbacks.record import RunRecord
from lightning_sft.commands.chat_model import Speaker
from lightning_sft.demos import tiny_pretrained
from lightning_sft.main import main
from lightning_sft.types import InputError


@pytest.mark.parametrize("kind", [SampleLedger, RunRecord])
def test_a_file_of_the_run_lies_in_its_folder_though_the_user_gives_the_callback(kind: type, tmp_path: Path) -> None:
    given, elsewhere = kind(), kind(str(tmp_path / "elsewhere"))
    for own, wanted in ((given, str(tmp_path)), (elsewhere, str(tmp_path / "elsewhere"))):
        added = default_callbacks({"callbacks": [own], "default_root_dir": str(tmp_path)}, resumes=True)
        assert own.dirpath == wanted
        assert not any(isinstance(callback, kind) for callback in added)


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
    monkeypatch.setattr("lightning_sft.model.pretrained.load_model", None)  # the pretrained weights are not needed
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
    with pytest.raises(
        InputError, match=r"from a run with model.pretrained=.*llama, now .*other. Give this run a separate folder"
    ):
        main(["fit", *arguments, "--model.pretrained", other, "--ckpt_path", "last"])


def test_last_finds_the_same_model_by_another_path(
    arguments: list[str], pretrained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = main(["fit", *arguments, "--ckpt_path", "last"])
    monkeypatch.chdir(Path(pretrained).parent)
    again = [Path(pretrained).name if text == pretrained else text for text in arguments]
    assert main(["fit", *again, "--ckpt_path", "last"]).trainer.global_step == first.trainer.global_step


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


@pytest.fixture
def best_alone(tmp_path: Path) -> list[str]:
    """The best weights are saved, without what a run needs to resume."""
    settings = {"monitor": "val/loss", "save_weights_only": True, "dirpath": str(tmp_path / "run" / "checkpoints")}
    own = {"class_path": "ModelCheckpoint", "init_args": {**settings, "filename": "best"}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [own]}}))
    return ["--config", str(tmp_path / "own.yaml")]


def test_a_run_that_saves_the_best_weights_alone_resumes_all_the_same(
    arguments: list[str], best_alone: list[str], tmp_path: Path
) -> None:
    command = ["fit", *best_alone, *arguments, "--ckpt_path", "last"]
    first = main(command)
    again = main([*command, "--trainer.max_epochs", "2"])
    assert again.trainer.ckpt_path == of_kind(first, SafeCheckpoint)[0].best_model_path
    assert again.trainer.global_step == 2 * first.trainer.global_step
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == again.trainer.global_step + 2
    assert first.trainer.checkpoint_callback.monitor == "val/loss"  # of which HFExport takes the best


@pytest.mark.parametrize(
    ("settings", "is_added"),
    [
        ({}, False),
        ({"monitor": "val/loss"}, False),
        ({"save_weights_only": True}, True),
        ({"save_top_k": 0}, True),
        ({"save_top_k": 0, "save_last": True}, False),
    ],
)
def test_only_a_callback_that_saves_whole_checkpoints_takes_the_place_of_ours(
    settings: dict[str, Any], is_added: bool
) -> None:
    added = default_callbacks({"callbacks": [ModelCheckpoint(**settings)]}, True)
    assert any(isinstance(callback, SafeCheckpoint) for callback in added) is is_added
    assert not any(isinstance(callback, BestCheckpoint) for callback in added)


def test_the_best_weights_lie_beside_the_checkpoints_of_the_user(tmp_path: Path) -> None:
    added = default_callbacks({"callbacks": [SafeCheckpoint(tmp_path / "own")]}, True)
    [best] = [callback for callback in added if isinstance(callback, ModelCheckpoint)]
    assert (type(best), best.dirpath) == (BestCheckpoint, str(tmp_path / "own"))


@pytest.mark.parametrize("own", [SafeCheckpoint, BestCheckpoint])
def test_checkpoints_of_a_run_lie_in_its_folder_whichever_callback_the_user_lists(own: type, tmp_path: Path) -> None:
    given = own()
    added = default_callbacks({"callbacks": [given], "default_root_dir": str(tmp_path)}, True)
    savers = [given, *(callback for callback in added if isinstance(callback, ModelCheckpoint))]
    assert sorted(type(saver).__name__ for saver in savers) == ["BestCheckpoint", "SafeCheckpoint"]
    assert {saver.dirpath for saver in savers} == {str(tmp_path / "checkpoints")}


def test_a_callback_that_saves_on_an_error_alone_leaves_ours_in_its_place(tmp_path: Path) -> None:
    added = default_callbacks({"callbacks": [OnExceptionCheckpoint(tmp_path)]}, True)
    assert any(isinstance(callback, SafeCheckpoint) for callback in added)


def test_checkpoints_of_the_weights_alone_serve_all_but_resuming(
    arguments: list[str], best_alone: list[str], tmp_path: Path
) -> None:
    main(["fit", *best_alone, *arguments, "--ckpt_path", "last"])
    run = tmp_path / "run"
    for path in (run / "checkpoints").glob("resume-*"):
        path.unlink()
    test = ["--data.test", str(tmp_path / "train.jsonl"), "--ckpt_path", "last"]
    assert str(main(["test", *arguments, *test]).trainer.ckpt_path).endswith("best.ckpt")
    assert str(main(["validate", *arguments, "--ckpt_path", "last"]).trainer.ckpt_path).endswith("best.ckpt")
    assert Speaker(str(run)).model is not None
    assert main(["export", "--ckpt", str(run), "--out", str(tmp_path / "out")]).is_dir()
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    for command in (["--ckpt_path", "last"], []):
        with pytest.raises(InputError, match=r"run has finished step \d.*best.ckpt has only the weights.*export"):
            main(["fit", *best_alone, *arguments, *command])
    before[run / "config.yaml"] = (run / "config.yaml").read_bytes()  # of the last command, for Lightning writes it
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_resuming_from_weights_alone_is_one_message(
    arguments: list[str], best_alone: list[str], tmp_path: Path
) -> None:
    main(["fit", *best_alone, *arguments])
    [path] = (tmp_path / "run").rglob("best.ckpt")
    with pytest.raises(
        InputError, match=r"ckpt has only the weights \(save_weights_only\), from which no run can resume"
    ):
        main(["fit", *arguments, "--ckpt_path", str(path), "--trainer.default_root_dir", str(tmp_path / "other")])


@pytest.mark.parametrize("command", [["--ckpt_path", "last"], []])
def test_nothing_begins_over_a_run_whose_checkpoints_are_gone(
    arguments: list[str], tmp_path: Path, command: list[str]
) -> None:
    main(["fit", *arguments, "--ckpt_path", "last"])
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    record = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(InputError, match=r"run has finished step \d.*No readable checkpoint.*is left.*separate folder"):
        main(["fit", *arguments, *command])
    assert (tmp_path / "run" / "run.json").read_bytes() == record


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(arguments: list[str], tmp_path: Path) -> None:
    main(["fit", *arguments, "--ckpt_path", "last"])
    folder = tmp_path / "run"
    whole = (folder / "samples.jsonl").read_bytes()
    shutil.rmtree(folder / "checkpoints")
    (folder / "run.json").unlink()
    main(["fit", *arguments, "--ckpt_path", "last"])
    assert (folder / "samples.jsonl").read_bytes() == (folder / "samples.1.jsonl").read_bytes() == whole


def test_at_the_end_fit_says_why_where_the_checkpoints_are_and_what_to_do(
    arguments: list[str], best_alone: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    command = ["fit", *best_alone, *arguments, "--ckpt_path", "last"]
    with caplog.at_level("INFO"):
        trainer = main(command).trainer
    [said] = [message for message in caplog.messages if message.startswith("The fit ended")]
    best, last = (saver.best_model_path for saver in trainer.checkpoint_callbacks)
    assert said.splitlines() == [
        f"The fit ended after step {trainer.global_step}: trainer.max_epochs=1 reached.",
        f"Best by val/loss ({float(trainer.callback_metrics['val/loss']):.6g}): {best}",
        f"Last checkpoint: {last}",
        f"Talk to it: lightning-sft chat --model {best}",
        f"Export it: lightning-sft export --ckpt {best} --out FOLDER",
    ]
    with caplog.at_level("INFO"):
        main(command)
        main([*command, "--model.optimizer.lr", "1e-3", "--model.optimizer.weight_decay", "0"])
    same, changed = [message for message in caplog.messages if message.startswith("Nothing was left to train after")]
    assert "effect" not in same
    assert "Changed settings of the optimizer have had no effect: lr=0.001, weight_decay=0.0." in changed


@pytest.mark.parametrize(("given", "tried"), [("true", "1 micro-batch"), ("2", "2 micro-batches")])
def test_a_trial_says_that_it_was_one_and_saves_nothing(
    arguments: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, given: str, tried: str
) -> None:
    before = set(tmp_path.rglob("*"))
    with caplog.at_level("INFO"):
        main(["fit", *arguments, "--data.tokens_per_batch", "40", "--trainer.fast_dev_run", given])
    assert f"This was a trial of {tried} (trainer.fast_dev_run): nothing has been saved." in caplog.messages
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")  # of Lightning, in this mode
def test_barebones_takes_the_place_of_our_own_defaults_but_of_nothing_that_was_asked_for(arguments: list[str]) -> None:
    command = ["fit", *arguments, "--trainer.barebones", "true"]
    kept = [
        text
        for flag, value in zip(command[1::2], command[2::2], strict=True)
        if not flag.startswith(("--trainer.logger", "--trainer.enable"))
        for text in (flag, value)
    ]
    assert main(["fit", *kept]).trainer.global_step == 1
    with pytest.raises(InputError, match="log_every_n_steps=5"):
        main(["fit", *kept, "--trainer.log_every_n_steps", "5"])


def test_a_fit_that_ends_before_its_first_validation_says_so(
    arguments: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = ["--trainer.max_steps", "1", "--data.tokens_per_batch", "100"]
    for more, is_said in (([], True), (["--trainer.val_check_interval", "1"], False)):
        caplog.clear()
        with caplog.at_level("INFO"):
            main(["fit", *arguments, *short, *more, "--trainer.default_root_dir", str(tmp_path / str(is_said))])
        [said] = [message for message in caplog.messages if message.startswith("The fit ended")]
        assert ("No validation was due before that: trainer.val_check_interval" in said) is is_said


def test_the_last_checkpoint_is_one_to_resume_from_though_the_best_is_asked_for_first(
    arguments: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    own = ["--trainer.callbacks+", "lightning_sft.callbacks.SafeCheckpoint"]
    with caplog.at_level("INFO"):
        trainer = main(["fit", *arguments, *own]).trainer
    assert [type(saver) for saver in trainer.checkpoint_callbacks] == [BestCheckpoint, SafeCheckpoint]
    [said] = [message for message in caplog.messages if message.startswith("The fit ended")]
    assert f"Last checkpoint: {trainer.checkpoint_callbacks[1].best_model_path}" in said.splitlines()


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
        assert len(list((folder / "checkpoints").glob("resume-*.ckpt"))) == 1
        assert (folder / "checkpoints" / "best.ckpt").is_file()
    trainer = main(["fit", *arguments, *logger, "--ckpt_path", "last"]).trainer
    assert "version_1" in str(trainer.ckpt_path)
