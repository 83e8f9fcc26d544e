from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import RunRecord, SampleLedger
from lightning_sft.checkpoints.run_files import cut_off, line_of, lines_of
from lightning_sft.checkpoints.run_lock import FolderLock
from lightning_sft.types import InputError
from tests.checkpoints.test_run_lock import kill, other_process


def test_each_step_has_its_samples_and_every_sample_comes_once_an_epoch(
    pretrained: str, quiet_trainer: Callable[..., Trainer], rows: list[dict[str, str]], tmp_path: Path
) -> None:
    losses = []

    class Module(SFTModule):
        def on_train_batch_end(self, *args: object) -> None:
            losses.append(self.trainer.callback_metrics.get("train/loss"))

    trainer = quiet_trainer(max_epochs=2, accumulate_grad_batches=2, callbacks=[SampleLedger(str(tmp_path), 3)])
    trainer.fit(Module(pretrained), SFTDataModule(train=rows, tokens_per_batch=100))
    lines = [line for line, _ in lines_of(tmp_path / "samples.jsonl")]
    assert [line["step"] for line in lines] == list(range(1, trainer.global_step + 1))
    assert [line["loss"] for line in lines] == [float(loss) for loss in losses[1::2]]
    for epoch in (0, 1):
        samples = [s for x in lines if x["epoch"] == epoch for rank in x["samples"] for micro in rank for s in micro]
        assert Counter(samples) == Counter(f"row {i}" for i in range(1, len(rows) + 1))
        assert [x["micro_batch"] for x in lines if x["epoch"] == epoch] == list(range(0, len(losses) // 2, 2))


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)) + '{"step": 6, "lo')
    return path


def test_steps_that_are_taken_again_and_a_line_cut_short_are_cut_off(ledger: Path) -> None:
    assert cut_off(ledger, 9) == 5
    assert cut_off(ledger, 3) == 3
    assert [line["step"] for line, _ in lines_of(ledger)] == [1, 2, 3]


def test_the_ledger_of_another_run_is_put_aside(ledger: Path) -> None:
    before = ledger.read_bytes()
    assert cut_off(ledger, 0) == 0
    assert not ledger.exists()
    assert (ledger.parent / "samples.1.jsonl").read_bytes() == before


def test_a_step_that_is_not_there_is_an_error_that_says_which_are(ledger: Path) -> None:
    assert line_of(ledger, 4) == {"step": 4}
    with pytest.raises(InputError, match=r"has no step 7. It has 1 to 5"):
        line_of(ledger, 7)
    with pytest.raises(InputError, match=r"There is no ledger 'nowhere'"):
        line_of("nowhere", 1)


def test_a_run_that_fails_has_all_steps_that_it_has_taken(
    pretrained: str, quiet_trainer: Callable[..., Trainer], rows: list[dict[str, str]], tmp_path: Path
) -> None:
    class Fails(SFTModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(batch, batch_idx)
            if batch_idx == 3:
                raise RuntimeError("as it may be")

    trainer = quiet_trainer(callbacks=[SampleLedger(str(tmp_path)), RunRecord(str(tmp_path))])
    with pytest.raises(RuntimeError, match="as it may be"):
        trainer.fit(Fails(pretrained), SFTDataModule(train=rows, tokens_per_batch=100))
    for name in ("samples.jsonl", "metrics.jsonl"):
        assert [line["step"] for line, _ in lines_of(tmp_path / name)] == [1, 2, 3]
    [start] = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert start["end"] == {"step": 3, "reason": "RuntimeError: as it may be"}
    assert [path.name for path in tmp_path.glob(".*")] == []  # nor is its folder locked any more


def test_a_damaged_line_is_skipped_by_name_and_the_ledger_is_cut_all_the_same(ledger: Path) -> None:
    ledger.write_bytes(ledger.read_bytes().replace(b'{"step": 2}', b'{"st'))
    with pytest.warns(UserWarning, match=r"Skipping line 2 of .*samples.jsonl"):
        assert cut_off(ledger, 4) == 4
    with pytest.warns(UserWarning, match=r"Skipping line 2 of .*samples.jsonl"):
        assert line_of(ledger, 4) == {"step": 4}


@pytest.mark.parametrize("kind", [SampleLedger, RunRecord])
def test_a_second_process_in_the_folder_of_a_run_is_refused(
    pretrained: str,
    quiet_trainer: Callable[..., Trainer],
    rows: list[dict[str, str]],
    tmp_path: Path,
    kind: Callable[..., Any],
) -> None:
    def lock() -> None:
        FolderLock().take(quiet_trainer(), tmp_path)

    owner = other_process(lock)
    try:
        with pytest.raises(InputError, match=rf"in use: process {owner}"):
            quiet_trainer(callbacks=[kind(str(tmp_path))]).fit(SFTModule(pretrained), SFTDataModule(train=rows))
    finally:
        kill(owner)
