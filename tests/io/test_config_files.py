"""What is wrong in a YAML file is said with its name and line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_sft.io.config_files import place_of
from lightning_sft.main import main
from lightning_sft.types import InputError


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("fit.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [\n", "fit.yaml:2: not valid YAML: while parsing a flow node"),
        ("model:\n\tpretrained: x\n", "fit.yaml:2: not valid YAML: .* with blanks, not with tabs"),
        ("model:\n  warmup: 0\n  warmup: 0.1\n", "fit.yaml:3: the key 'warmup' is there already, in line 2"),
        ("trainer: {}\nmodel: {}\ntrainer: {}\n", "fit.yaml:3: the key 'trainer' is there already, in line 1"),
        ("- a\n", "fit.yaml:1: expected sections with their keys"),
        ("", "fit.yaml:1: expected sections with their keys"),
        ("model:\n  pretrained: x\n  warmup: 3\n", "^fit.yaml:3: model.warmup is 3.0; expected"),
        ("model:\n  pretrained: x\n  lora:\n    r: 0\n", "^fit.yaml:4: model.lora.r is 0; expected"),
    ],
)
@pytest.mark.parametrize("verb", ["fit", "show"])
def test_a_refused_file_is_named_with_the_line(config: Path, text: str, message: str, verb: str) -> None:
    config.write_text(text)
    with pytest.raises(InputError, match=message):
        main([verb, "--config", str(config)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  pretraind: x\n", "fit.yaml:2: model.pretraind is not known. Did you mean model.pretrained"),
        ("trainer:\n\n  max_epochs: abc\n", "fit.yaml:3: trainer.max_epochs is abc; expected an integer or null"),
        ("mdel:\n  x: 1\n", "fit.yaml:2: mdel.x is not known"),
        (
            "model:\n  optimizer:\n    class_path: AdamW\n    init_args:\n      lrr: 1\n",
            "fit.yaml:5: .*lrr.* mean lr\\?",
        ),
        (
            "trainer:\n  callbacks:\n  - class_path: EarlyStopping\n    init_args:\n      patience: x\n",
            "fit.yaml:5: trainer.callbacks.patience is x; expected an integer",
        ),
    ],
)
def test_a_wrong_key_or_value_has_its_line(
    config: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(text)
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config)])
    assert re.search(message, capsys.readouterr().err)


def test_a_value_of_the_command_line_is_not_said_to_be_of_the_file(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text("model:\n  pretrained: x\n  schedule: linear\n  warmup: 0.1\n")
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config), "--model.schedule", "cosin"])
    assert "fit.yaml" not in capsys.readouterr().err
    with pytest.raises(InputError, match=r"^model.warmup is 3"):
        main(["fit", "--config", str(config), "--model.warmup", "3"])


def test_the_file_of_a_section_has_its_own_lines(config: Path) -> None:
    config.write_text("pretrained: x\nwarmup: 3\n")
    assert place_of(["fit", "--model", "fit.yaml"], "model.warmup") == "fit.yaml:2"
    assert place_of(["fit", "--model=fit.yaml"], "data.warmup") is None
