"""Our classes made from configs: Hydra's, and a command line of a user."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.data.rows.mixture import Mixture
from lightning_sft.types import InputError
from tests.helpers.dropping import blocks, run_code
from tests.helpers.gradients import ROWS


def is_plain(value: Any) -> bool:
    if type(value) is dict:
        return all(is_plain(inner) for inner in value.values())
    return all(map(is_plain, value)) if type(value) is list else type(value) in (str, int, float, bool, type(None))


def test_hydra_makes_all_of_it(project: Path) -> None:
    pytest.importorskip("hydra")
    (project / "config.yaml").write_text(blocks("Hydra", "yaml")[0])
    scope = run_code("Hydra")
    module, data, trainer = scope["model"], scope["data"], scope["trainer"]
    assert isinstance(module, SFTModule)
    assert isinstance(data, SFTDataModule)
    assert trainer.global_step == data.steps_per_epoch > 0
    assert trainer.optimizers[0].param_groups[0]["initial_lr"] == 1e-3
    assert module.sampling.temperature == 0.5
    assert not module.model.model.layers[0].self_attn.q_proj.weight.requires_grad
    assert data.sources["train"].names == ["one", "other"]
    assert type(data.sources["val"]) is list
    [path] = (project / "checkpoints").glob("resume-*.ckpt")
    saved = torch.load(path, weights_only=True)
    assert is_plain(saved["hyper_parameters"])
    assert saved["hyper_parameters"]["frozen"] == ["*.layers.0.*"]


def test_rows_and_columns_of_hydra_are_taken(project: Path, quiet_trainer: Any) -> None:
    pytest.importorskip("hydra")
    from hydra.utils import instantiate

    rows = [{"question": row["prompt"], "answer": row["completion"]} for row in ROWS]
    columns = {"prompt": "question", "completion": "answer"}
    config = {"_target_": "lightning_sft.SFTDataModule", "train": rows, "columns": columns, "tokenizer": "SmolLM2"}
    lengths = []
    for data in (instantiate(config), SFTDataModule(train=ROWS, tokenizer="SmolLM2")):
        data.setup("fit")
        lengths.append(data.splits["train"].lengths.tolist())
    assert lengths[0] == lengths[1]


def test_a_mixture_of_dictionaries_is_one_of_parts() -> None:
    mixture = Mixture({"a": {"source": "a.jsonl", "share": 3}, "b": {"source": ["b.jsonl"], "share": 1.5}})
    assert [part.share for part in mixture.of_name.values()] == [3, 1.5]
    assert mixture.of_name["b"].source == ["b.jsonl"]
    with pytest.raises(InputError, match=r"Part has no 'shares'; it has source, share, .* Did you mean share\?"):
        Mixture({"a": {"source": "a.jsonl", "shares": 3}})


def test_a_command_line_of_a_user_says_what_a_wrong_argument_may_mean(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = blocks("Your LightningCLI", "bash")[0].replace("\\\n", " ").split()
    for wrong, own in (("--model.lr", "model.optimizer.lr"), ("--data.batch_size", "tokens_per_batch")):
        monkeypatch.setattr(sys, "argv", [*words[1:], wrong, "1"])
        with pytest.raises(SystemExit):
            exec(blocks("Your LightningCLI")[0], {"__name__": "__main__"})
        assert f"Did you mean {own}?" in capsys.readouterr().err.splitlines()[-1]


def test_a_command_line_of_a_user_takes_our_classes(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [command] = blocks("Your LightningCLI", "bash")
    words = command.replace("\\\n", " ").split()
    assert words[:2] == ["python", "train.py"]
    made: list[LightningCLI] = []
    monkeypatch.setattr(sys, "argv", words[1:])
    monkeypatch.setattr(LightningCLI, "before_fit", lambda cli: made.append(cli), raising=False)
    scope = {"__name__": "__main__"}
    exec(blocks("Your LightningCLI")[0], scope)
    [cli] = made
    assert isinstance(cli.model, SFTModule)
    assert isinstance(cli.datamodule, SFTDataModule)
    assert cli.trainer.global_step == cli.datamodule.steps_per_epoch > 0
    assert cli.trainer.optimizers[0].param_groups[0]["initial_lr"] == 1e-3
    [path] = project.glob("lightning_logs/version_0/checkpoints/*.ckpt")
    again = SFTModule.load_from_checkpoint(path, weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), cli.model.parameters(), strict=True))
