from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import SafeCheckpoint
from lightning_sft.training import throughput as step_figures
from lightning_sft.training.flops import Flops
from lightning_sft.training.throughput import StepMetrics, peak_memory
from lightning_sft.types import Batch

Make = Callable[..., Trainer]
MADE = {"train/tokens_seen", "train/targets_seen", "train/packing_efficiency"}


class Figures(Callback):
    """What was logged at the end of each optimizer step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step > len(self.rows):
            self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_an_epoch_has_seen_every_token_and_target_and_its_fill_is_that_of_the_plan(
    pretrained: str, quiet_trainer: Make, rows: list[dict[str, str]], packing: Any
) -> None:
    figures, data = Figures(), SFTDataModule(train=rows, tokens_per_batch=100, packing=packing)
    trainer = quiet_trainer(max_epochs=2, accumulate_grad_batches=2, callbacks=[figures])
    trainer.fit(SFTModule(pretrained), data)
    planned, last = data.planned("train"), figures.rows[-1]
    assert last["train/tokens_seen"] == 2 * planned.split.lengths.sum()
    assert last["train/targets_seen"] == 2 * planned.split.num_targets
    one = Figures()
    one_step = quiet_trainer(accumulate_grad_batches=100, callbacks=[one])
    one_step.fit(SFTModule(pretrained), SFTDataModule(train=rows, tokens_per_batch=100, packing=packing))
    assert one.rows[0]["train/packing_efficiency"] == pytest.approx(planned.fill)


def test_what_a_run_has_seen_survives_its_end(
    pretrained: str, quiet_trainer: Make, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    def run(folder: str, ckpt_path: Any = None, **settings: Any) -> list[dict[str, float]]:
        figures, saver = Figures(), SafeCheckpoint(str(tmp_path / folder), every_n_train_steps=2)
        trainer = quiet_trainer(callbacks=[figures, saver], enable_checkpointing=True, **settings)
        if ckpt_path:
            figures.rows = [{}] * 2
        trainer.fit(SFTModule(pretrained), SFTDataModule(train=rows, tokens_per_batch=100), ckpt_path=ckpt_path)
        return [{name: row[name] for name in MADE} for row in figures.rows if row]

    whole = run("whole")
    run("first", max_steps=2)
    [checkpoint] = (tmp_path / "first").glob("*.ckpt")
    assert run("second", checkpoint) == whole[2:]


def test_speeds_are_means_over_ten_steps_without_the_time_of_validations(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(step_figures.time, "perf_counter", lambda: now[0])
    trainer: Any = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        precision_plugin=None,
        datamodule=None,
        world_size=1,
    )
    monkeypatch.setattr(step_figures, "peak_rate", lambda trainer: 1000.0)
    monkeypatch.setattr(step_figures, "flops", lambda model: Flops(3.0, 5.0, {("full", 0): 7.0}))
    figures = StepMetrics()
    figures.begin(trainer, None)
    batch = Batch.of({"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.ones(2, 4, dtype=torch.long)})
    for step in range(30):
        seconds = 1.0 if step < 15 else 2.0
        now[0] += seconds
        found = figures.close(trainer, figures.counts([batch, batch]), torch.tensor(12.0))
        figures.pause()
        now[0] += 50
        figures.pause()
        now[0] += 7
        figures.resume()
        figures.resume()
    assert found["tokens_per_second"] == 16 / 2
    assert found["targets_per_second"] == 12 / 2
    pairs = 4 * (4 * 5 / 2)
    assert found["mfu"] == pytest.approx((16 * 3 + 12 * 5 + pairs * 7) / 2 / 1000)
    assert (found["tokens_seen"], found["targets_seen"]) == (30 * 16, 30 * 12)
    assert found["fill"] == found["packing_efficiency"] == 1


def test_memory_is_counted_in_bytes() -> None:
    held = torch.ones(50_000_000)
    assert held.numel() * 4 < peak_memory(torch.device("cpu")) < 1e12
