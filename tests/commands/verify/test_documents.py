"""The check of packed documents passes where they are kept apart, and fails where they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sft import SFTModule
from lightning_sft.commands.verify.documents import check_documents
from lightning_sft.demos import tiny_pretrained
from lightning_sft.model.likelihood import LikelihoodModel
from lightning_sft.types import Batch
from tests.helpers.verifying import LORA, subject


@pytest.mark.parametrize("model", [{}, {"attn_implementation": "eager"}, LORA], ids=str)
def test_it_passes_where_documents_are_kept_apart(pretrained: str, tmp_path: Path, model: Any) -> None:
    outcome = check_documents(subject(pretrained, tmp_path, **model))
    assert outcome.passed
    assert outcome.cases[1].measured == 0.0


def test_of_a_model_that_leaks_it_proves_the_padded_rows(tmp_path: Path) -> None:
    pretrained = tiny_pretrained(tmp_path / "bloom", "bloom", hidden_dropout=0.1, attention_dropout=0.1)
    outcome = check_documents(subject(pretrained, tmp_path))
    assert outcome.passed, outcome
    assert outcome.cases[0].name == "padded against alone"


def test_documents_that_see_each_other_are_found_and_named(
    pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leak comes after the probe: positions go on from one document to the next."""
    hidden = LikelihoodModel.hidden

    def leaking(scorer: LikelihoodModel, batch: Batch) -> Any:
        positions = torch.arange(batch.input_ids.shape[1])[None]
        return hidden(scorer, Batch(batch.input_ids, batch.labels, positions, batch.target_weights))

    monkeypatch.setattr(LikelihoodModel, "hidden", leaking)
    outcome = check_documents(subject(pretrained, tmp_path))
    alone, untouched = outcome.cases
    assert not alone.passed
    assert not untouched.passed
    assert all(failure.startswith("row ") for case in outcome.cases for failure in case.failures)
    assert len(untouched.failures) == 7  # all but the first document of the pack


def test_logits_of_another_scale_are_found(pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = SFTModule.configure_model

    def wrongly(module: SFTModule) -> None:
        load(module)
        assert module.scorer is not None
        object.__setattr__(module.scorer.findings, "scale", 1.1)

    monkeypatch.setattr(SFTModule, "configure_model", wrongly)
    alone, untouched = check_documents(subject(pretrained, tmp_path)).cases
    assert not alone.passed
    assert untouched.passed
