from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import DriftMonitor, RunRecord, SampleGenerations
from lightning_sft.callbacks.progress import TrainingProgress
from lightning_sft.types import InputError


class Memory(Logger):
    """A logger that takes text, as that of Weights & Biases."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[tuple[str, int, list[str], list[list[Any]]]] = []
        self.metrics: dict[str, float] = {}

    name, version = "memory", 0

    @property
    def experiment(self) -> None:
        return None

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics |= metrics

    def log_text(self, key: str, columns: list[str], data: list[list[Any]], step: int) -> None:
        self.texts.append((key, step, columns, data))


def fit(quiet_trainer: Any, pretrained: str, rows: Any, *callbacks: Any, **settings: Any) -> Any:
    trainer = quiet_trainer(callbacks=list(callbacks), val_check_interval=2, log_every_n_steps=1, **settings)
    module = SFTModule(pretrained, max_new_tokens=5)
    trainer.fit(module, SFTDataModule(train=rows, val=rows[:3], tokens_per_batch=100, seed=1))
    return trainer


def test_every_logger_gets_figures_and_those_that_take_text_get_the_answers(
    pretrained: str, quiet_trainer: Any, rows: list[dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory, board, table = Memory(), TensorBoardLogger(str(tmp_path)), CSVLogger(str(tmp_path))
    samples = SampleGenerations(prompts=2)
    trainer = fit(quiet_trainer, pretrained, rows, samples, DriftMonitor(2, 16), logger=[board, memory, table])
    wanted = {"train/loss", "train/tokens_per_second", "train/targets_seen", "train/packing_efficiency", "lr"}
    wanted |= {"val/bits_per_byte"}
    wanted |= {"train/peak_memory_gib", "train/gradient_norm", "drift/all", "drift/kl", "val/loss_position/1"}
    assert wanted <= memory.metrics.keys()
    header = next(Path(table.log_dir).glob("metrics.csv")).read_text().splitlines()[0].split(",")
    assert wanted <= set(header)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board.experiment.flush()
    events = EventAccumulator(board.log_dir).Reload()
    assert wanted <= set(events.Tags()["scalars"])
    assert {"samples/row 1/text_summary", "samples/row 2/text_summary"} <= set(events.Tags()["tensors"])
    files = sorted((Path(board.log_dir) / "samples").glob("*.jsonl"))
    steps = [step for _, step, _, _ in memory.texts]
    assert steps[0] == 0
    assert steps[-1] == trainer.global_step
    assert [file.name for file in files] == [f"step={step:08d}.jsonl" for step in steps]
    for file, (_, step, columns, data) in zip(files, memory.texts, strict=True):
        read = [json.loads(line) for line in file.read_text().splitlines()]
        assert [[row[name] for name in columns] for row in read] == data
        assert [row["step"] for row in read] == [step, step]
    assert "Answers at step 0" in capsys.readouterr().out


def test_sampling_and_measuring_change_nothing_about_the_training(
    pretrained: str, quiet_trainer: Any, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    plain = fit(quiet_trainer, pretrained, rows)
    extra = SampleGenerations(2, console=False), DriftMonitor(2), RunRecord(str(tmp_path / "r")), TrainingProgress()
    watched = fit(quiet_trainer, pretrained, rows, *extra, enable_progress_bar=True)
    for name in ("train/loss", "train/gradient_norm", "val/loss"):
        assert plain.callback_metrics[name] == watched.callback_metrics[name]


def test_questions_may_be_given_as_texts(
    pretrained: str, quiet_trainer: Any, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    record = RunRecord(str(tmp_path / "run"))
    fit(quiet_trainer, pretrained, rows, SampleGenerations(["Who?", "Why?"], 3, console=False), record, max_steps=2)
    first = (tmp_path / "run" / "samples" / "step=00000000.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in first] == ["user\nWho?\nassistant\n", "user\nWhy?\nassistant\n"]
    with pytest.raises(InputError, match="prompts is 0; expected an integer >= 1 or a list of strings"):
        SampleGenerations(0)
