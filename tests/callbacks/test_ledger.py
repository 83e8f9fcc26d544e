from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks.ledger import SampleLedger
from lightning_sft.run_files import cut_off, line_of, lines_of
from lightning_sft.types import InputError


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
