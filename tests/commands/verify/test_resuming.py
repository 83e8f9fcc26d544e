"""The check of resuming passes, and fails where anything is not restored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.optim import AdamW

from lightning_sft.checkpoints import resume
from lightning_sft.commands.verify.resuming import check_resuming
from tests.helpers.verifying import LORA, subject


@pytest.mark.parametrize("model", [{}, LORA], ids=["whole", "lora"])
def test_it_passes_with_dropout_and_noise_and_leaves_no_checkpoint(pretrained: str, tmp_path: Path, model: Any) -> None:
    outcome = check_resuming(subject(pretrained, tmp_path, **model))
    assert outcome.passed, outcome
    assert not list(tmp_path.rglob("*.ckpt"))


def test_dropout_that_is_not_seeded_again_is_found(
    pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "seed_micro_batch", lambda *place: None)
    losses, weights = check_resuming(subject(pretrained, tmp_path, **LORA)).cases
    assert [failure.partition(":")[0] for failure in losses.failures] == ["step 3", "step 4"]
    assert not weights.passed


def test_an_optimizer_that_forgets_its_moments_is_found(
    pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AdamW, "load_state_dict", lambda optimizer, state: None)
    losses, weights = check_resuming(subject(pretrained, tmp_path)).cases
    assert [failure.partition(":")[0] for failure in losses.failures] == ["step 4"]  # after the first update without
    assert weights.failures
