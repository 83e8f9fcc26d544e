from __future__ import annotations

import io
import logging
import re
import sys
from functools import partial
from typing import Any

import pyte
import pytest
from lightning.pytorch import Callback

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import SampleGenerations, TrainingProgress, progress
from lightning_sft.machine.terminal import Console


def test_the_line_has_the_figures_and_the_time_left_of_the_whole_fit(
    pretrained: str, quiet_trainer: Any, rows: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    class Watched(TrainingProgress):
        def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
            clock[0] += 0.0 if trainer.sanity_checking else 0.1
            found = super().get_metrics(trainer, pl_module)
            seen.append({"step": trainer.global_step, "at": clock[0], **found})
            return found

    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    trainer = quiet_trainer(
        max_epochs=3, callbacks=[Watched(every_seconds=0.0, every_seconds_in_files=0.0)], enable_progress_bar=True
    )
    trainer.fit(SFTModule(pretrained), SFTDataModule(train=rows, val=rows[:2], tokens_per_batch=100))
    at_six = next(shown for shown in seen if shown["step"] == 6)
    assert at_six.keys() >= {"loss", "val", "tokens/s", "targets", "lr", "|g|", "left"}
    assert trainer.global_step == 12
    assert at_six["left"] == str(progress.timedelta(seconds=round((at_six["at"] - 100) / 6 * 6)))
    assert "left" not in seen[-1]
    assert float(seen[-1]["loss"]) == pytest.approx(trainer.callback_metrics["train/loss"].item(), abs=1e-3)


def test_figures_are_read_no_more_often_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Figure:
        reads = 0

        def __float__(self) -> float:
            self.reads += 1
            return 1.0

    clock, figure = [1.0], Figure()
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    bar, trainer = TrainingProgress(every_seconds=0.5), type("Trainer", (), {"global_step": 0})()
    trainer.callback_metrics, bar._total = {"train/loss": figure}, 9
    for _ in range(20):
        assert bar.get_metrics(trainer, None) == {"loss": "1.000"}
        clock[0] += 0.1
    assert figure.reads == 4


@pytest.fixture
def fitted(pretrained: str, quiet_trainer: Any, rows: list[dict[str, str]]) -> Any:
    def fit(*callbacks: Any, **settings: Any) -> Any:
        trainer = quiet_trainer(max_epochs=2, callbacks=list(callbacks), enable_progress_bar=True, **settings)
        trainer.fit(SFTModule(pretrained), SFTDataModule(train=rows, val=rows[:2], tokens_per_batch=100))
        return trainer

    return fit


def screen(monkeypatch: pytest.MonkeyPatch, columns: int, **settings: Any) -> tuple[pyte.Screen, Any]:
    """A terminal that shows what the bar prints."""
    shown = pyte.Screen(columns, 60)
    stream = pyte.Stream(shown)

    class Terminal(io.StringIO):
        def write(self, text: str) -> int:
            stream.feed(text.replace("\n", "\r\n"))
            return len(text)

        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    console = partial(Console, file=terminal, force_terminal=True, width=columns, legacy_windows=False, **settings)
    monkeypatch.setattr(progress, "Console", console)
    return shown, terminal


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_a_terminal_shows_one_line_below_what_is_printed_and_no_ghosts(
    columns: int, monkeypatch: pytest.MonkeyPatch, fitted: Any
) -> None:
    class Talks(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            logging.getLogger("lightning.pytorch").warning("logged at %d", trainer.global_step)
            trainer.print(f"printed at {trainer.global_step}")

    shown, terminal = screen(monkeypatch, columns)
    monkeypatch.setattr(sys, "stderr", terminal)
    logger = logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(terminal)])
    fitted(TrainingProgress(every_seconds=0.0), Talks())
    lines = [line.rstrip() for line in shown.display if line.strip()]
    steps = [line for line in lines if re.match(r"Step \d+/", line)]
    assert len(steps) == 1
    assert steps == lines[-1:]
    assert re.match(r"Step 8/8 ━{16} 0:00:\d\d", steps[0])
    assert ("tokens/s" in steps[0]) is (columns >= 80)
    said = [line for line in lines if "at" in line.split()]
    assert said == [f"{verb} at {step}" for step in range(1, 9) for verb in ("logged", "printed")]
    assert [line.partition(":")[0] for line in lines if "val/loss" in line] == ["Step 4", "Step 8"]


def test_tables_of_answers_stand_above_the_line_and_leave_no_ghosts(
    monkeypatch: pytest.MonkeyPatch, fitted: Any
) -> None:
    shown, _ = screen(monkeypatch, 80)
    answers = SampleGenerations(prompts=1, max_new_tokens=2)
    fitted(TrainingProgress(every_seconds=0.0), answers)
    lines = [line.strip() for line in shown.display if line.strip()]
    assert [line for line in lines if "Answers at" in line] == [f"Answers at step {step}" for step in (0, 4, 8)]
    assert [line.partition(" ━")[0] for line in lines if re.search(r"\d/\d", line)] == ["Step 8/8"]


def test_a_file_gets_whole_lines_and_no_control_characters(fitted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fitted(TrainingProgress(every_seconds_in_files=0.0))
    lines = capsys.readouterr().out.splitlines()
    steps = [line.split()[1] for line in lines if re.match(r"Step \d+/", line)]
    assert list(dict.fromkeys(steps)) == [f"{step}/8" for step in range(1, 9)]
    assert all(character.isprintable() for line in lines for character in line)


def test_a_notebook_shows_one_line_without_widgets(
    monkeypatch: pytest.MonkeyPatch, fitted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "Console", partial(Console, force_jupyter=True, force_terminal=False))
    fitted(TrainingProgress(every_seconds=0.0))
    shown = pyte.Screen(120, 40)
    pyte.Stream(shown).feed(capsys.readouterr().out.replace("\n", "\r\n"))
    lines = [line.rstrip() for line in shown.display if line.startswith("Step")]
    assert [line.partition(" ━")[0].partition(":")[0] for line in lines] == ["Step 4", "Step 8", "Step 8/8"]


@pytest.mark.parametrize("width", range(20, 140, 7))
def test_a_line_never_exceeds_its_width_and_drops_the_least_important_first(width: int) -> None:
    metrics = {"loss": "1.703", "val": "1.650", "tokens/s": "123,456", "lr": "1.9e-06", "left": "1 day, 0:02:37"}
    line = progress.progress_line("Step", 1234, 26000, 5000, metrics, width)
    assert len(line) <= width
    names = [name for name in ("loss", "val", "tokens/s", "lr") if f", {name} " in line]
    assert names == sorted(names, key=list(metrics).index)
