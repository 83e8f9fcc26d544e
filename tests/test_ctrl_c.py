"""Ctrl-C outside the steps of a fit, which Preempt is for, ends in one line and leaves nothing half-written."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from lightning_sft import main as command_line
from lightning_sft.main import console
from tests.helpers.processes import fork

ENCODING = "lightning_sft.data.tokens.encode:_drafted"


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("verb", "place"),
    [
        ("show", ENCODING),
        ("plan", ENCODING),
        ("fit", ENCODING),
        ("validate", ENCODING),
        ("fit", "lightning_sft.module:assemble"),
        ("export", "lightning_sft.export.convert:model_card"),
    ],
)
def test_ctrl_c_ends_in_one_line_and_leaves_nothing_half_written(
    verb: str, place: str, pretrained: str, jsonl: Any, tmp_path: Path
) -> None:
    path = jsonl([{"prompt": f"Say {i}", "completion": str(i)} for i in range(8)])
    cache, out = tmp_path / "cache", tmp_path / "out"
    flags = ["--model.pretrained", pretrained, "--data.train", path, "--data.val", path, "--data.cache", str(cache)]
    trainer = ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(out), "--trainer.logger", "false"]
    if verb in ("fit", "validate"):
        flags += trainer
    if verb == "export":
        fit = ["fit", *flags, *trainer, "--trainer.max_steps", "1"]
        fork("lightning_sft", *fit)
        flags = ["--ckpt", str(out), "--out", str(tmp_path / "exported")]
    before = files(tmp_path)
    [ended] = fork("tests.helpers.ctrl_c", place, verb, *flags, fails=True)
    assert ended.code == 130, ended.errors
    assert ended.errors.splitlines()[-1] == "lightning-sft: interrupted"
    assert "Traceback" not in ended.errors
    assert "KeyboardInterrupt" not in ended.errors
    assert not (tmp_path / "exported").exists()
    assert {path.name for path in files(tmp_path) - before} <= {"config.yaml"}  # of a run that would begin


@pytest.mark.parametrize("is_kept", [False, True], ids=["itself", "as Lightning ends"])
def test_ctrl_c_has_the_exit_code_that_shells_expect_and_other_exits_keep_theirs(
    is_kept: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ends(code: int | None) -> None:
        try:
            if code is None:
                signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            if not is_kept:
                raise
            raise SystemExit(1)  # noqa: B904  # as Lightning does
        raise SystemExit(code)

    monkeypatch.setattr(command_line, "quiet_others", lambda debug: None)
    for code, expected in ((None, 130), (75, 75)):
        monkeypatch.setattr(command_line, "_from_shell", lambda code=code: ends(code))
        with pytest.raises(SystemExit) as ended:
            console()
        assert ended.value.code == expected
    assert capsys.readouterr().err == "lightning-sft: interrupted\n"
