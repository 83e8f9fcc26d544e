from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.optim import Optimizer

from lightning_sft.main import main


class AdamW(torch.optim.AdamW):
    """As packages have one of their own, of this name."""


class StepLR(torch.optim.lr_scheduler.StepLR):
    """The same of a scheduler."""


class Twofold(torch.optim.SGD):
    """Of which torch has none of this name."""


def test_a_short_name_is_torchs_own_class_also_where_other_packages_have_one(
    pretrained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "o.yaml").write_text("model: {optimizer: {class_path: AdamW, init_args: {lr: 0.5}}}")
    (tmp_path / "two.yaml").write_text("model: {optimizers: [{optimizer: AdamW}]}")
    for given in (
        ["--model.optimizer", "AdamW", "--model.optimizer.lr", "0.5"],
        ["--model.optimizer=AdamW", "--model.schedule", "StepLR", "--model.schedule.step_size", "3"],
        ["--config", str(tmp_path / "o.yaml")],
        ["--config", str(tmp_path / "two.yaml")],
    ):
        with pytest.raises(SystemExit):
            main(["fit", "--model.pretrained", pretrained, *given, "--print_config"])
        printed = capsys.readouterr().out
        assert "class_path: torch.optim.AdamW" in printed
        assert f"class_path: {__name__}" not in printed
        assert ("class_path: torch.optim.lr_scheduler.StepLR" in printed) is ("StepLR" in given)


def test_a_short_name_that_torch_does_not_have_is_still_refused_where_several_packages_have_it(
    pretrained: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = type("Twofold", (Optimizer,), {"__module__": "tests.helpers.gradients"})
    import tests.helpers.gradients as module

    module.Twofold = other  # type: ignore[attr-defined]  # so that it can be found there
    try:
        with pytest.raises(SystemExit):
            main(["fit", "--model.pretrained", pretrained, "--model.optimizer", "Twofold"])
    finally:
        del module.Twofold  # type: ignore[attr-defined]  # the same
    assert "Multiple subclasses with name Twofold" in capsys.readouterr().err
