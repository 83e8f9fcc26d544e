from __future__ import annotations

from typing import Any

import pytest

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import TrainingProgress, progress


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
    trainer = quiet_trainer(max_epochs=3, callbacks=[Watched(every_seconds=0.0)], enable_progress_bar=True)
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
