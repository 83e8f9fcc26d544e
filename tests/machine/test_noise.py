"""The terminal says what matters to the user of the command line, and nothing else."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from lightning.fabric.utilities import warnings as lightning_warnings

from lightning_sft.machine import noise
from tests.helpers.processes import ROOT


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the command line sets for its process."""
    factory = logging.getLogRecordFactory()
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.delenv("TQDM_DELAY", raising=False)
    for name in noise._LOGS:
        monkeypatch.setattr(logging.getLogger(name), "filters", [])
    monkeypatch.setattr(noise, "_format", [])
    yield
    logging.setLogRecordFactory(factory)


@pytest.mark.parametrize("debug", [True, False])
def test_messages_of_the_tables_are_heard_with_debug_alone_and_others_always(
    debug: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("torch"), "propagate", True)  # torch 2.10 prints its records by itself
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        noise.quiet_others(debug)
        logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
        logger.warning("GPU available: False, used: False")
        logger.warning("Something else")
        logging.getLogger("torch.utils._pytree").warning("<enum 'KernelPreference'> is an Enum")
        warnings.warn("Precision bf16-mixed is not supported by the model summary.", stacklevel=1)
        warnings.warn("The learning rate is 0.", stacklevel=1)
    heard = [record.getMessage() for record in caplog.records]
    assert ("Something else" in heard, "GPU available: False, used: False" in heard) == (True, debug)
    assert any("KernelPreference" in text for text in heard) is debug
    assert ["model summary" in str(warning.message) for warning in recorded] == [True, False][not debug :]


def test_a_warning_is_printed_as_text_without_its_place_in_the_code() -> None:
    noise.quiet_others()
    assert warnings.formatwarning("It is\x1b[2J 0.", UserWarning, "a.py", 1) == "Warning: It is<U+001B>[2J 0.\n"


@pytest.mark.parametrize("debug", [True, False])
def test_a_warning_of_lightning_has_no_place_either_once_it_is_imported(
    debug: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path(lightning_warnings.__file__)
    noise.quiet_others(debug)
    monkeypatch.setattr(warnings, "formatwarning", lightning_warnings._custom_format_warning)  # as its import does
    monkeypatch.setattr(lightning_warnings, "_is_path_in_lightning", lambda path: True)
    assert str(own) in warnings.formatwarning("predict: 1 row", UserWarning, str(own), 1)
    noise.keep_quiet()
    assert (str(own) in warnings.formatwarning("predict: 1 row", UserWarning, str(own), 1)) is debug


@pytest.mark.parametrize("debug", [True, False])
def test_warnings_and_log_records_of_others_cannot_control_the_terminal(
    debug: bool, caplog: pytest.LogCaptureFixture
) -> None:
    noise.quiet_others(debug)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").warning("Loaded model weights from %s", "e\x1b[31mvil")
    assert caplog.messages == ["Loaded model weights from e<U+001B>[31mvil"]
    assert caplog.records[0].message == caplog.messages[0]  # what handlers print
    printed = warnings.formatwarning("e\x1b[31mvil", UserWarning, "a.py", 1)
    assert "e<U+001B>[31mvil" in printed
    assert ("a.py" in printed) is debug


def test_a_whole_fit_prints_our_lines_alone(pretrained: str, jsonl: object, tmp_path: Path) -> None:
    """In a process of its own, as from a shell, with every extra that is installed here."""
    assert callable(jsonl)
    data, val = (
        jsonl([{"prompt": f"{say} {i}", "completion": f"{i} it is"} for i in range(12)], f"{say}.jsonl")
        for say in ("Say", "Tell")
    )
    flags = ["--model.pretrained", pretrained, "--data.train", data, "--data.val", val, "--trainer.accelerator", "cpu"]
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-m", "lightning_sft", "fit", *flags, "--trainer.max_epochs", "3"],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line.partition(" ")[0] for line in done.stderr.splitlines()] == ["The", "Best", "Last", "Talk", "Export"]
    ours = ("Data", "rows", "refused", "left out", "cut", "expanded", "sequences", "tokens", "targets", "longest", "──")
    ours += ("An epoch", "So few optimizer steps", "Model", "Trained", "Precision", "Devices", "Attention", "Kernels")
    ours += ("Optimizer", "Steps", "Memory", "Checkpoints", "Logs", "Step ")
    lines = [line for line in done.stdout.splitlines() if line.strip() and not line.startswith(" " * 8)]
    assert [line for line in lines if not line.strip().startswith(ours)] == []
