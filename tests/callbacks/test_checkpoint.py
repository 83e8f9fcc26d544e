from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks.checkpoint import BestCheckpoint, SafeCheckpoint
from lightning_sft.checkpoints.reading import Checkpoint
from lightning_sft.checkpoints.writing import AtomicIO, newest
from lightning_sft.types import InputError

Make = Callable[..., Trainer]


@pytest.fixture
def fit(pretrained: str, quiet_trainer: Make, rows: list[dict[str, str]]) -> Callable[..., Trainer]:
    def run(*callbacks: Any, ckpt_path: Any = None, **settings: Any) -> Trainer:
        trainer = quiet_trainer(enable_checkpointing=True, callbacks=list(callbacks), **{"max_epochs": 2, **settings})
        data = SFTDataModule(train=rows, tokens_per_batch=100)  # 6 micro-batches
        trainer.fit(SFTModule(pretrained, schedule="constant"), data, ckpt_path=ckpt_path)
        return trainer

    return run


def steps(folder: Path) -> list[int]:
    return sorted(torch.load(path, weights_only=True)["global_step"] for path in folder.glob("*.ckpt"))


def test_the_last_few_are_kept_also_of_a_run_that_goes_on(fit: Callable[..., Trainer], tmp_path: Path) -> None:
    last = fit(SafeCheckpoint(str(tmp_path), 2, keep_last=3)).global_step
    every_other = sorted({*range(2, last, 2), last // 2, last})  # and the end of each epoch
    assert steps(tmp_path) == every_other[-3:]
    trainer = fit(SafeCheckpoint(str(tmp_path), 2, keep_last=1), ckpt_path="last", max_epochs=3)
    assert steps(tmp_path) == [last, trainer.global_step]  # and the one that it was resumed from
    fit(SafeCheckpoint(str(tmp_path), 2, keep_last=1), ckpt_path="last", max_epochs=4)
    assert len(steps(tmp_path)) == 2


def test_a_time_between_checkpoints_is_kept_and_never_inside_a_step(
    fit: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[tuple[int, int]] = []
    trainers: list[Trainer] = []

    class Spy(SafeCheckpoint):
        def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
            saved.append((trainer.global_step, trainer.fit_loop.batch_idx + 1))
            super()._save_checkpoint(trainer, filepath)

    trainers.append(fit(Spy(str(tmp_path), every_n_minutes=0.0), max_epochs=1, accumulate_grad_batches=2))
    assert [step for step, _ in saved] == list(range(1, trainers[0].global_step + 1))
    assert all(micro_batch % 2 == 0 for _, micro_batch in saved)


def test_a_folder_that_holds_another_run_is_refused(fit: Callable[..., Trainer], tmp_path: Path) -> None:
    fit(SafeCheckpoint(str(tmp_path / "a")), max_epochs=1)
    fit(SafeCheckpoint(str(tmp_path / "b")), max_epochs=1)
    [of_b] = (tmp_path / "b").glob("*.ckpt")
    for ckpt_path, remedy in (
        (None, r'Resume .*trainer.fit\(\.\.\., ckpt_path="last"'),
        (of_b, "resumes from .*b/.*move the others away"),
    ):
        with pytest.raises(InputError, match=rf"a holds the checkpoints of another run.*{remedy}"):
            fit(SafeCheckpoint(str(tmp_path / "a")), ckpt_path=ckpt_path)


def test_too_small_a_disk_is_refused_before_the_first_step(
    fit: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match=r"A checkpoint needs about 0.0 GB, but .* Make room"):
        fit(SafeCheckpoint(str(tmp_path)))
    assert not list(tmp_path.glob("*.ckpt"))


def test_last_passes_over_what_was_cut_short(fit: Callable[..., Trainer], tmp_path: Path) -> None:
    last = fit(SafeCheckpoint(str(tmp_path), 1)).global_step
    newest = max(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[:5000])
    with pytest.warns(UserWarning, match=r"Skipping"):
        trainer = fit(SafeCheckpoint(str(tmp_path), 1), ckpt_path="last")
    assert trainer.global_step == last
    assert str(trainer.ckpt_path).endswith(f"step={last - 1}.ckpt")


def test_a_users_own_checkpoints_are_written_whole_too(fit: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = fit(ModelCheckpoint(tmp_path / "own"), SafeCheckpoint(str(tmp_path / "safe")), max_epochs=1)
    assert type(trainer.strategy.checkpoint_io) is AtomicIO
    assert len(list((tmp_path / "own").iterdir())) == len(list((tmp_path / "safe").iterdir())) == 1


def test_a_clock_that_was_set_back_removes_no_new_checkpoint(fit: Callable[..., Trainer], tmp_path: Path) -> None:
    last = fit(SafeCheckpoint(str(tmp_path), 1)).global_step
    for path in tmp_path.glob("*.ckpt"):
        os.utime(path, (4e9, 4e9))  # far ahead
    trainer = fit(SafeCheckpoint(str(tmp_path), 1), ckpt_path="last", max_epochs=3)
    assert steps(tmp_path) == [last, trainer.global_step - 1, trainer.global_step]  # the first was resumed from
    assert str(newest([tmp_path])) == trainer.checkpoint_callbacks[0].best_model_path


def test_a_run_that_goes_back_to_an_earlier_checkpoint_keeps_what_it_saves(
    fit: Callable[..., Trainer], tmp_path: Path
) -> None:
    fit(SafeCheckpoint(str(tmp_path), 1, keep_last=9))
    (tmp_path / "resume-mine.ckpt").touch()  # a name of the user's own
    [early] = tmp_path.glob("*-step=2.ckpt")
    fit(SafeCheckpoint(str(tmp_path), 1, keep_last=1), ckpt_path=early, max_epochs=-1, max_steps=3)
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {
        early.name,
        "resume-epoch=0-step=3.ckpt",
        "resume-mine.ckpt",
    }


def test_what_is_resumed_from_may_be_in_the_folder_of_another_callback(
    fit: Callable[..., Trainer], tmp_path: Path
) -> None:
    def callbacks() -> list[Any]:
        return [ModelCheckpoint(tmp_path / "own", save_top_k=-1), SafeCheckpoint(str(tmp_path / "safe"))]

    fit(*callbacks(), max_epochs=1)
    [own] = (tmp_path / "own").glob("*.ckpt")
    assert fit(*callbacks(), ckpt_path=own).current_epoch == 2


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(InputError, match=r"SafeCheckpoint.keep_last is 0; expected an integer >= 1"):
        SafeCheckpoint(keep_last=0)


class Losses(Callback):
    """Sets the loss of each validation, and notes the weights that it was taken at."""

    def __init__(self, *losses: float) -> None:
        self.losses, self.weights = iter(losses), []

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log("val/chosen", next(self.losses), sync_dist=True)
        self.weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


def fit_validated(make: Make, pretrained: str, rows: Any, *callbacks: Any, **settings: Any) -> Trainer:
    trainer = make(enable_checkpointing=True, callbacks=list(callbacks), num_sanity_val_steps=0, max_epochs=3)
    data = SFTDataModule(train=rows, val=rows[:4], tokens_per_batch=100)
    trainer.fit(SFTModule(pretrained, schedule="constant"), data, **settings)
    return trainer


@pytest.mark.parametrize("best", [BestCheckpoint, ModelCheckpoint])
def test_the_best_is_not_the_newest_in_any_order(fit: Callable[..., Trainer], tmp_path: Path, best: type) -> None:
    saver = best(dirpath=tmp_path / "best", monitor="train/loss")
    trainer = fit(SafeCheckpoint(tmp_path, 2), saver)
    assert trainer.checkpoint_callback is saver
    assert trainer.checkpoint_callbacks[-1].best_model_path != saver.best_model_path


@pytest.mark.parametrize(("mode", "best"), [("min", 1), ("max", 2)])
def test_the_weights_of_the_best_validation_are_kept_alone(
    pretrained: str, quiet_trainer: Make, rows: Any, tmp_path: Path, mode: Any, best: int
) -> None:
    losses, saver = Losses(3.0, 1.0, 4.0), BestCheckpoint(tmp_path, "val/chosen", mode)
    fit_validated(quiet_trainer, pretrained, rows, losses, saver, SafeCheckpoint(tmp_path / "whole"))
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["best.ckpt"]
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert saved.keys() & {"optimizer_states", "callbacks"} == set()
    weights = losses.weights[best]
    assert all(torch.equal(saved["state_dict"][name], value) for name, value in weights.items())
    assert not all(torch.equal(losses.weights[0][name], value) for name, value in weights.items())


def test_a_resumed_run_knows_the_best_of_before(
    pretrained: str, quiet_trainer: Make, rows: Any, tmp_path: Path
) -> None:
    before = fit_validated(
        quiet_trainer,
        pretrained,
        rows,
        Losses(2.0, 1.0, 3.0),
        BestCheckpoint(tmp_path, "val/chosen"),
        SafeCheckpoint(tmp_path / "whole", keep_last=9),
    )
    best = (tmp_path / "best.ckpt").read_bytes()
    [second] = (tmp_path / "whole").glob("resume-epoch=1-*.ckpt")
    saver = BestCheckpoint(tmp_path, "val/chosen")
    fit_validated(
        quiet_trainer, pretrained, rows, Losses(1.5), saver, SafeCheckpoint(tmp_path / "whole"), ckpt_path=str(second)
    )
    assert saver.best_model_score == 1.0
    assert (tmp_path / "best.ckpt").read_bytes() == best
    assert before.global_step > Checkpoint(tmp_path / "best.ckpt").step == Checkpoint(second).step


def test_two_that_would_save_the_same_file_are_refused(fit: Callable[..., Trainer], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Two BestCheckpoint save .*best.ckpt. Give each a separate dirpath"):
        fit(BestCheckpoint(tmp_path), BestCheckpoint(tmp_path, "val/accuracy", "max"))


def test_a_fit_without_validation_keeps_no_best_weights(fit: Callable[..., Trainer], tmp_path: Path) -> None:
    fit(BestCheckpoint(tmp_path / "best"), SafeCheckpoint(tmp_path))
    assert not (tmp_path / "best").exists()


def test_at_the_same_step_the_checkpoint_that_a_run_resumes_from_is_the_newest(
    pretrained: str, quiet_trainer: Make, rows: Any, tmp_path: Path
) -> None:
    losses = Losses(3.0, 2.0, 1.0)
    fit_validated(
        quiet_trainer, pretrained, rows, losses, BestCheckpoint(tmp_path, "val/chosen"), SafeCheckpoint(tmp_path)
    )
    assert Checkpoint(tmp_path / "best.ckpt").step == max(steps(tmp_path))
    assert Path(str(newest([tmp_path], resumable=False))).name.startswith("resume-")
