"""The check of exports passes, and fails where a weight in the folder is not the trained one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lightning_sft.commands.verify import exports
from lightning_sft.commands.verify.exports import check_exports
from lightning_sft.training import checks as guards
from tests.helpers.verifying import LORA, subject


@pytest.mark.parametrize("model", [{}, LORA], ids=["whole", "lora"])
def test_it_passes_and_leaves_nothing_behind(pretrained: str, tmp_path: Path, model: Any) -> None:
    outcome = check_exports(subject(pretrained, tmp_path, **model))
    assert outcome.passed, outcome
    assert [case.name for case in outcome.cases] == (["likelihoods"] if model else ["weights", "likelihoods"])
    assert not list(tmp_path.iterdir())


def test_rows_of_token_ids_are_compared_on_built_in_rows(pretrained: str, tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}] * 8
    assert check_exports(subject(pretrained, tmp_path, {"train": rows})).passed


def test_an_export_in_16_bits_has_its_own_tolerance(
    pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "bfloat16_is_slow", lambda: True)  # whatever this machine is
    given = subject(pretrained, tmp_path)
    given.trainer.precision = "bf16-true"
    with pytest.warns(UserWarning, match="no fast bfloat16"):
        weights, likelihoods = check_exports(given).cases
    assert weights.passed
    assert (likelihoods.passed, likelihoods.tolerance) == (True, exports.ROUNDED)


@pytest.mark.parametrize("model", [{}, LORA], ids=["whole", "lora"])
def test_a_weight_that_is_changed_in_the_folder_is_found(
    pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Any
) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    write = exports.from_checkpoint

    def wrongly(ckpt: str, out: Path, *more: Any) -> Path:
        write(ckpt, out, *more)
        tensors = load_file(out / "model.safetensors")
        tensors[name] += 1.0
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        return out

    monkeypatch.setattr(exports, "from_checkpoint", wrongly)
    *weights, likelihoods = check_exports(subject(pretrained, tmp_path, **model)).cases
    assert likelihoods.failures
    assert all(failure.startswith("row ") for failure in likelihoods.failures)
    assert [case.failures for case in weights] == ([] if model else [[name]])
