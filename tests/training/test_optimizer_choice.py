"""What is given for optimizers, schedules and adapters is used or refused, with what to give instead."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from torch.optim import SGD, AdamW

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.io.closest import SCHEDULES
from lightning_sft.main import main
from lightning_sft.model.tuning.adapters import Lora
from lightning_sft.training.optimizers import Chained, OptimizerPart
from lightning_sft.types import InputError
from tests.helpers.gradients import ROWS

Make = Callable[..., Trainer]
BOTH = r"model\.optimizer and model\.optimizers are both given"


def test_an_optimizer_beside_several_is_refused(pretrained: str) -> None:
    parts = [OptimizerPart(partial(AdamW, lr=0.5))]
    for own in (partial(SGD, lr=3.0), partial(AdamW, lr=1e-3), lambda groups: AdamW(groups)):
        with pytest.raises(InputError, match=BOTH):
            SFTModule(pretrained, optimizer=own, optimizers=parts)
    assert SFTModule(pretrained, optimizers=parts).optimizer is parts


def test_on_a_command_line_only_an_optimizer_that_was_given_counts(pretrained: str, tmp_path: Path, jsonl: Any) -> None:
    config = tmp_path / "parts.yaml"
    part = {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}}
    config.write_text(yaml.safe_dump({"model": {"optimizers": [part]}}))
    flags = {"model.pretrained": pretrained, "data.train": jsonl(ROWS), "trainer.accelerator": "cpu"}
    flags |= {
        "trainer.max_steps": "1",
        "trainer.default_root_dir": str(tmp_path),
        "trainer.enable_progress_bar": "false",
    }
    given = ["fit", *(text for key, value in flags.items() for text in (f"--{key}", value)), "--config", str(config)]
    trainer = main(given).trainer
    assert isinstance(trainer.optimizers[0], Chained)
    saved = next(tmp_path.rglob("config.yaml"))  # which has the default optimizer, too
    assert yaml.safe_load(saved.read_text())["model"]["optimizer"]["class_path"] == "torch.optim.AdamW"
    again = main(["fit", "--config", str(saved), "--trainer.default_root_dir", str(tmp_path / "again")]).trainer
    assert isinstance(again.optimizers[0], Chained)
    for own in (["--model.optimizer.lr", "0.5"], ["--model.optimizer", "SGD", "--model.optimizer.lr", "0.5"]):
        with pytest.raises(InputError, match=BOTH):
            main([*given, *own])


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_of_other_trainers_says_what_to_give(
    name: str, pretrained: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="expected cosine, linear, constant, wsd") as refused:
        SFTModule(pretrained, schedule=name)  # type: ignore[arg-type]  # none of the names
    assert SCHEDULES[name] in str(refused.value)
    with pytest.raises(SystemExit):
        main(["fit", "--model.pretrained", pretrained, "--model.schedule", name])
    assert SCHEDULES[name] in capsys.readouterr().err


def test_the_paths_that_are_given_for_schedules_exist() -> None:
    classes = {word for text in SCHEDULES.values() for word in text.replace(",", "").split() if "lr_scheduler." in word}
    assert classes
    for path in classes:
        assert hasattr(torch.optim.lr_scheduler, path.rpartition(".")[2])
    page = Path("docs/howto/schedules.md").read_text(encoding="utf-8")
    for words in ("A schedule of your own", "Follow the validation loss", "WithFloor", "OneCycleLR"):
        assert words in page
    assert "inverse_square_root" in page


def test_a_warmup_in_steps_says_that_it_is_a_share(pretrained: str) -> None:
    with pytest.raises(InputError, match=r"model\.warmup is 100; .* for 100 of 2,000 steps, give 100 / 2000"):
        SFTModule(pretrained, warmup=100)
    with pytest.raises(InputError, match=r"dropout is 5; .* It is a share: 5 % are 0\.05"):
        Lora(dropout=5)
    with pytest.raises(InputError) as refused:
        SFTModule(pretrained, warmup=-1)
    assert "share" not in str(refused.value)


def test_a_configuration_of_peft_is_answered_with_the_same_settings_as_ours(pretrained: str) -> None:
    peft = pytest.importorskip("peft")
    given = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, target_modules=["v_proj", "q_proj"], use_rslora=True)
    with pytest.raises(InputError) as refused:
        SFTModule(pretrained, lora=given)
    wanted = "Lora(r=4, targets=['q_proj', 'v_proj'], alpha=6, dropout=0.1, rslora=True)"
    assert f"Give {wanted} (from lightning_sft.model.tuning.adapters import Lora)" in str(refused.value)
    assert eval(wanted).targets == ["q_proj", "v_proj"]
    with pytest.raises(InputError, match=r"Give Lora\(r=8, alpha=8\) "):
        SFTModule(pretrained, lora=peft.LoraConfig(init_lora_weights="pissa", target_modules="q.*"))


class NoClosure(SGD):
    """An optimizer of a step without a closure."""

    def step(self) -> None:  # type: ignore[override]  # what is refused
        super().step()


@pytest.mark.parametrize("own", [False, True])
def test_an_optimizer_without_a_closure_says_how_its_step_has_to_begin(
    own: bool, pretrained: str, quiet_trainer: Make
) -> None:
    class Configured(SFTModule):
        def configure_optimizers(self) -> Any:
            return NoClosure(self.parameters(), lr=1.0) if own else super().configure_optimizers()

    with pytest.raises(InputError, match=r"NoClosure\.step takes no closure.* Declare step\(self, closure=None\)"):
        quiet_trainer(max_steps=1).fit(
            Configured(pretrained, optimizer=partial(NoClosure, lr=1.0)), SFTDataModule(ROWS)
        )
