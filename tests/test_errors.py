"""What ends a command is one message in the shell, whoever raised it; the traceback is kept, and shown by --debug."""

from __future__ import annotations

import errno
import json
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import Trainer
from safetensors import SafetensorError
from torch.utils.data import DataLoader

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.main import console
from lightning_sft.types import InputError

Shell = Callable[..., str]


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Shell:
    """What a command ends with in the shell; nothing where it ends with 0."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: Any) -> str:
        monkeypatch.setattr(sys, "argv", ["lightning-sft", *map(str, arguments)])
        try:
            console()
        except SystemExit as end:
            return str(end.code or "")
        return ""

    return call


@pytest.fixture
def given(pretrained: str, jsonl: Any, rows: list[dict[str, str]], tmp_path: Path) -> list[Any]:
    path = jsonl(rows)
    flags = {
        "model.pretrained": pretrained,
        "data.train": path,
        "data.val": path,
        "data.tokens_per_batch": 60,
        "data.cache": "null",
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": tmp_path / "run",
        "trainer.logger": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.limit_train_batches": 2,
    }
    return [text for key, value in flags.items() for text in (f"--{key}", value)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ckpt_path", "best"], "ckpt_path=best is the best checkpoint of a fit in the same process"),
        (["--ckpt_path", "nowhere.ckpt"], "There is no checkpoint 'nowhere.ckpt'"),
        (["--trainer.val_check_interval", 1000], "`val_check_interval` (1000) must be less than or equal to"),
        (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss"],
            "EarlyStopping monitors 'val_loss', which nothing logs. Did you mean val/loss?",
        ),
        (
            ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=x"],
            "ModelCheckpoint monitors 'x', which no",
        ),
        (["--trainer.callbacks+=LearningRateMonitor"], "Cannot use `LearningRateMonitor`"),
        (["--trainer.default_root_dir", "/proc/nowhere"], "/proc/nowhere"),
    ],
    ids=lambda value: None if isinstance(value, list) else value[:30],
)
def test_what_lightning_and_the_system_refuse_is_one_message(
    shell: Shell, given: list[Any], flags: list[Any], message: str
) -> None:
    told = shell("fit", *given, "--trainer.limit_val_batches", 1, *flags)
    assert message in told
    assert told.startswith("lightning-sft: ")
    assert "traceback" not in told


def test_a_full_disk_is_one_message(shell: Shell, given: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(SFTModule, "on_train_start", full)
    assert shell("fit", *given) == "lightning-sft: [Errno 28] No space left on device: 'metrics.jsonl'"


def test_an_export_to_a_full_disk_is_one_message(
    shell: Shell, given: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not shell("fit", *given)

    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full)
    told = shell("export", "--ckpt", tmp_path / "run", "--out", tmp_path / "out")
    assert told == "lightning-sft: Error while serializing: I/O error: No space left on device (os error 28)"
    assert not (tmp_path / "out").exists()


def test_an_unexpected_error_says_how_to_get_its_traceback(
    shell: Shell, given: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise LookupError("of ours")

    monkeypatch.setattr(SFTModule, "on_train_start", broken)
    first, last = shell("fit", *given).splitlines()
    assert first == "lightning-sft: LookupError: of ours."
    assert last.startswith("For the traceback: it is in ")
    assert "--debug" in last
    assert "raise LookupError" in Path(last.removeprefix("For the traceback: it is in ").partition(",")[0]).read_text()
    with pytest.raises(LookupError):
        shell("fit", "--debug", *given)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([1, 2], "it holds a list, not a dictionary"),
        ({"epoch": 1}, "a dictionary of epoch"),
        ({"hyper_parameters": [1]}, "its 'hyper_parameters' are not a dictionary"),
    ],
)
@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_a_file_of_torch_that_is_no_checkpoint_is_said_so(
    shell: Shell, given: list[Any], tmp_path: Path, verb: str, held: Any, message: str
) -> None:
    torch.save(held, tmp_path / "odd.ckpt")
    told = shell(verb, *given, "--ckpt_path", tmp_path / "odd.ckpt")
    assert "is not a checkpoint of Lightning" in told
    assert message in told


def test_from_python_too_a_list_is_no_checkpoint(
    pretrained: str, rows: Any, quiet_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    torch.save([1, 2], tmp_path / "odd.ckpt")
    with pytest.raises(InputError, match="is not a checkpoint of Lightning"):
        quiet_trainer().fit(SFTModule(pretrained), SFTDataModule(train=rows), ckpt_path=tmp_path / "odd.ckpt")


def rewritten(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], object]:
    def rewrite(folder: Path) -> None:
        (folder / name).write_text(json.dumps(change(json.loads((folder / name).read_text()))))

    return rewrite


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"weight": Path("anything")}, file)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "weights cut short": lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:3000]
    ),
    "no weights": lambda folder: (folder / "model.safetensors").write_bytes(b"hello"),
    "pickled weights": pickled,
    "a list as config": rewritten("config.json", lambda config: []),
    "null as config": rewritten("config.json", lambda config: None),
    "a size in words": rewritten("config.json", lambda config: config | {"hidden_size": "large"}),
    "no heads": rewritten("config.json", lambda config: config | {"num_attention_heads": 0}),
    "an odd size": rewritten("config.json", lambda config: config | {"hidden_size": 7}),
    "a small vocabulary": rewritten("config.json", lambda config: config | {"vocab_size": 100}),
    "an unknown activation": rewritten("config.json", lambda config: config | {"hidden_act": "nope"}),
    "an empty tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "a list as tokenizer's config": lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
    "a list as generation config": lambda folder: (folder / "generation_config.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_folder_is_one_message_that_names_it(
    given: list[Any], shell: Shell, pretrained: str, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(pretrained, folder)
    DAMAGE[damage](folder)
    told = shell("fit", *given, "--model.pretrained", folder)
    assert f"can be loaded from {str(folder)!r}" in told
    assert "weights_only` set to `False`" not in told  # advice of torch that would run what is in the file


def test_a_link_to_a_checkpoint_that_is_gone_does_not_block_the_others(
    shell: Shell, given: list[Any], tmp_path: Path
) -> None:
    assert not shell("fit", *given, "--ckpt_path", "last")
    (tmp_path / "run" / "checkpoints" / "resume-epoch=9-step=99.ckpt").symlink_to(tmp_path / "gone.ckpt")
    with pytest.warns(UserWarning, match=r"99.ckpt"):
        assert not shell("validate", *given, "--ckpt_path", "last")


def test_resuming_with_other_frozen_parameters_is_refused(shell: Shell, given: list[Any], tmp_path: Path) -> None:
    """Also where as many are frozen as before, which the optimizer's state would fit."""
    assert not shell("fit", *given, "--model.frozen", "['*.layers.0.*']")
    [path] = (tmp_path / "run").rglob("resume-*.ckpt")
    told = shell("fit", *given, "--model.frozen", "['*.layers.1.*']", "--ckpt_path", path, "--trainer.max_epochs", 2)
    assert "model.frozen=['*.layers.0.*'], now ['*.layers.1.*']" in told
    assert "Use the same settings to resume" in told


def test_several_validation_loaders_have_figures_of_their_own(
    pretrained: str, quiet_trainer: Callable[..., Trainer]
) -> None:
    def loader(first: int) -> Any:
        ids = torch.arange(first, first + 12).view(2, 6)
        return DataLoader([{"input_ids": ids, "labels": ids}], batch_size=None)

    module, trainer = SFTModule(pretrained), quiet_trainer(limit_train_batches=1)
    one, two = (quiet_trainer().validate(module, loader(first))[0]["val/loss"] for first in (5, 80))
    trainer.fit(module, loader(40), [loader(5), loader(80)])
    parts = quiet_trainer().validate(SFTModule(pretrained), [loader(5), loader(80)])
    both = {name: value for part in parts for name, value in part.items()}
    assert both["val/loss/dataloader_idx_0"] == pytest.approx(one)
    assert both["val/loss/dataloader_idx_1"] == pytest.approx(two)
    assert {"val/loss/dataloader_idx_0", "val/loss/dataloader_idx_1"} <= trainer.callback_metrics.keys()
    assert one != two


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fti"], "There is no verb 'fti'. Did you mean fit?"),
        (["train"], "There is no verb 'train'. Did you mean fit?"),
        (["shwo"], "There is no verb 'shwo'. Did you mean show\\?"),
        (["fit", "--model.pretraind", "x"], "lightning-sft fit: .* Did you mean --model.pretrained\\?"),
        (["fit", "--data.tokens_per_bach", 5], "lightning-sft fit: .* Did you mean --data.tokens_per_batch\\?"),
        (["show", "--data.tokens_per_bach", 5], "lightning-sft show: .* Did you mean --data.tokens_per_batch\\?"),
        (["export", "--cpkt", "x"], "lightning-sft export: .* Did you mean --ckpt\\?"),
        (["report", "--ovewrite"], "lightning-sft report: [Uu]nrecognized arguments: --ovewrite"),
        (["doctor", "--jsn"], "lightning-sft doctor: .* Did you mean --json\\?"),
        (["plan"], "lightning-sft plan: .*required.* --model.pretrained|model.pretrained"),
        (["fit", "--data.packing", "none"], "--data.packing is none; expected packed or padded"),
    ],
    ids=str,
)
def test_a_typo_is_one_line_with_what_may_be_meant(
    shell: Shell, capsys: pytest.CaptureFixture[str], arguments: list[Any], message: str
) -> None:
    ended = shell(*arguments)
    told = capsys.readouterr().err if ended == "2" else ended
    assert ended == "2" or "no verb" not in message
    assert re.search(message, told)
    assert len(told.strip().splitlines()) == 1
    assert "usage:" not in told


@pytest.mark.parametrize("verb", ["init", "report", "export", "plan", "verify", "replay", "fit"])
def test_the_usage_of_a_verb_has_its_name(verb: str, shell: Shell, capsys: pytest.CaptureFixture[str]) -> None:
    shell(verb, "--help")
    assert re.match(rf"usage: lightning-sft (\[options\] )?{verb} ", capsys.readouterr().out)
