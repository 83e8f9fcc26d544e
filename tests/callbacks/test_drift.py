from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import DriftMonitor, SafeCheckpoint, SampleGenerations
from lightning_sft.model.weights import PretrainedWeights
from lightning_sft.strategies import FSDP2Strategy
from tests.helpers.gradients import QUIET, ROWS
from tests.helpers.processes import torchrun

LORA: dict[str, Any] = {"lora": {"r": 4}}


def fit(pretrained: str, out: Path, ckpt_path: Any = None, model: Any = None, **settings: Any) -> Trainer:
    """A few steps with both callbacks that look at the model from outside."""
    callbacks = [DriftMonitor(4, 16), SampleGenerations(3, 4, console=False)]
    if saved := settings.pop("saved", None):
        callbacks.append(SafeCheckpoint(str(saved), every_n_train_steps=2))
        settings["enable_checkpointing"] = True
    common: dict[str, Any] = {**QUIET, "accelerator": "cpu", "max_steps": 4, "val_check_interval": 2}
    trainer = Trainer(**{**common, "callbacks": callbacks, "default_root_dir": out, **settings})
    module = SFTModule(pretrained, schedule="constant", warmup=0.0, **(model or {}))
    trainer.fit(module, SFTDataModule(train=ROWS, val=ROWS[:5], tokens_per_batch=100), ckpt_path=ckpt_path)
    return trainer


def drift(trainer: Trainer) -> dict[str, float]:
    found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("drift/")}
    assert set(found) == {"drift/all", "drift/kl", "drift/other", "drift/layer_00", "drift/layer_01"} | (
        {"drift/embeddings", "drift/head"} & set(found)
    )
    return found


def test_norms_are_those_of_the_weights_by_group(pretrained: str, tmp_path: Path) -> None:
    trainer = fit(pretrained, tmp_path)
    before = dict(AutoModelForCausalLM.from_pretrained(pretrained).named_parameters())
    after = dict(trainer.lightning_module.model.named_parameters())
    moved = {
        name: tuple(float(change.detach().norm() ** 2) for change in (after[name] - old, old))
        for name, old in before.items()
    }
    parts = {"all": "", "layer_00": "layers.0.", "layer_01": "layers.1.", "embeddings": "embed_", "head": "lm_head"}
    parts["other"] = "model.norm"
    for group, part in parts.items():
        change, size = (sum(pair[i] for name, pair in moved.items() if part in name) for i in (0, 1))
        assert drift(trainer)[f"drift/{group}"] == pytest.approx((change / size) ** 0.5, rel=1e-4)


def test_of_adapters_it_is_what_they_add_to_their_matrices(pretrained: str, tmp_path: Path) -> None:
    trainer = fit(pretrained, tmp_path, model=LORA)
    found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("drift/")}
    squares = [0.0, 0.0]
    for name, layer in trainer.lightning_module.model.named_modules():
        if hasattr(layer, "get_delta_weight") and ".layers.1." in name:
            squares[0] += float(layer.get_delta_weight("default").detach().double().norm() ** 2)
            squares[1] += float(layer.base_layer.weight.double().norm() ** 2)
    assert squares[0] > 0
    assert found["drift/layer_01"] == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-4)
    assert found["drift/kl"] > 0
    assert found.keys() == {"drift/all", "drift/kl", "drift/layer_00", "drift/layer_01"}


@pytest.mark.parametrize("model", [{}, LORA])
def test_a_run_that_goes_on_measures_from_the_pretrained_model(pretrained: str, tmp_path: Path, model: Any) -> None:
    whole = fit(pretrained, tmp_path, model=model, saved=tmp_path / "c")
    [checkpoint] = (tmp_path / "c").glob("*step=2.ckpt")
    resumed = fit(pretrained, tmp_path / "r", checkpoint, model, saved=tmp_path / "c")
    names = [name for name in whole.callback_metrics if name.startswith("drift/")]
    assert len(names) > 3
    for name in names:
        assert resumed.callback_metrics[name] == whole.callback_metrics[name]


def test_weights_that_files_do_not_have_by_that_name_are_loaded(pretrained: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pretrained)
    model.half().save_pretrained(tmp_path, safe_serialization=True)
    name = "model.layers.1.mlp.up_proj.weight"
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    weights = PretrainedWeights(str(tmp_path), [name])
    assert weights.shape(name) == (32, 16)
    assert torch.allclose(weights.rows(name, 3, 5), model.state_dict()[name][3:5].float())
    assert "nothing" not in weights


STRATEGIES: dict[str, Any] = {"ddp": lambda: "ddp", "fsdp2": FSDP2Strategy, "tensor": lambda: FSDP2Strategy(1, 2)}


@pytest.mark.slow
def test_two_processes_measure_and_sample_what_one_does(pretrained_for_two: str, tmp_path: Path) -> None:
    torchrun("tests.callbacks.test_drift", pretrained_for_two, str(tmp_path))
    whole = fit(pretrained_for_two, tmp_path / "one", accumulate_grad_batches=2)
    for name in STRATEGIES:
        kept = torch.load(tmp_path / f"{name}.pt")
        assert kept == pytest.approx(drift(whole), rel=1e-3)
        files = [sorted((tmp_path / folder).rglob("samples/*.jsonl")) for folder in ("one", name)]
        assert len(files[0]) >= 2
        assert [file.read_text() for file in files[0]] == [file.read_text() for file in files[1]]


if __name__ == "__main__":  # under torchrun
    folder = Path(sys.argv[2])
    for strategy, make in STRATEGIES.items():
        accumulate = {"accumulate_grad_batches": 2} if strategy == "tensor" else {}
        interval = {} if strategy == "tensor" else {"val_check_interval": 1}
        one = fit(sys.argv[1], folder / strategy, devices=2, strategy=make(), **accumulate, **interval)
        if one.global_rank == 0:
            torch.save(drift(one), folder / f"{strategy}.pt")
