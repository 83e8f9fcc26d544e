"""Settings of the trainer that Lightning does not take are one message, with their own names."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lightning_sft.main import main
from lightning_sft.types import InputError


def run(verb: str, pretrained: str, jsonl: Any, rows: Any, *flags: str) -> Any:
    quiet = ["--trainer.logger", "false", "--trainer.enable_checkpointing", "false", "--data.cache", "null"]
    return main([verb, "--model.pretrained", pretrained, "--data.train", jsonl(rows), *quiet, *flags])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--trainer.accelerator cpu --trainer.devices -1", "trainer.devices is -1; on a CPU, .* Set it to 1"),
        ("--trainer.accelerator cpu --trainer.devices [0]", "trainer.devices is [0]; on a CPU, "),
        ("--trainer.devices 0", "trainer.devices is 0; expected a number of devices"),
        ("--trainer.devices a", "trainer.devices is a; expected a number of devices"),
        ("--trainer.num_nodes 0", "trainer.num_nodes is 0; expected at least 1"),
        ("--trainer.strategy ddpp", "trainer.strategy is ddpp; .* Did you mean ddp?"),
        ("--trainer.accelerator gpuu", "trainer.accelerator is gpuu; .* Did you mean gpu?"),
        pytest.param(
            "--trainer.precision transformer-engine",
            "Lightning makes no trainer .*: Requirement 'transformer_engine",
            marks=pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="it is installed"),
        ),
        ("--trainer.max_steps=-5", "Lightning makes no trainer .*: `max_steps` must be"),
        pytest.param(
            "--trainer.logger WandbLogger",
            "lightning.pytorch.loggers.WandbLogger: Requirement 'wandb.*pip install",
            marks=pytest.mark.skipif(find_spec("wandb") is not None, reason="it is installed"),
        ),
    ],
)
def test_settings_that_make_no_trainer_are_refused_by_name(
    pretrained: str, jsonl: Any, rows: Any, flags: str, message: str
) -> None:
    pattern = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(InputError, match=f"^{pattern}"):
        run("fit", pretrained, jsonl, rows, *flags.split())


@pytest.mark.parametrize("verb", ["plan", "show", "verify"])
@pytest.mark.parametrize("setting", ["strategy=ddpp", "accelerator=gpuu"])
def test_verbs_without_a_trainer_refuse_names_too(
    pretrained: str, jsonl: Any, rows: Any, verb: str, setting: str
) -> None:
    with pytest.raises(InputError, match=rf"trainer.{setting.replace('=', ' is ')}; .* Did you mean (ddp|gpu)\?"):
        run(verb, pretrained, jsonl, rows, f"--trainer.{setting}")


@pytest.mark.parametrize("setting", ["devices", "num_nodes"])
def test_verbs_without_a_trainer_refuse_them_too(pretrained: str, jsonl: Any, rows: Any, setting: str) -> None:
    with pytest.raises(InputError, match=rf"trainer.{setting} is 0; expected"):
        run("plan", pretrained, jsonl, rows, f"--trainer.{setting}=0")


def test_a_gpu_that_is_not_there(
    pretrained: str, jsonl: Any, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    (tmp_path / "fit.yaml").write_text("trainer:\n  accelerator: gpu\n")
    with pytest.raises(InputError, match=r"fit.yaml:2: trainer.accelerator is gpu, and torch finds no GPU here"):
        run("fit", pretrained, jsonl, rows, "--config", str(tmp_path / "fit.yaml"))
