"""Every strategy takes the same steps as one device, and goes on bit by bit from its own checkpoints."""

from __future__ import annotations

import importlib.util
import json
import pickle
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException

from lightning_sft.callbacks import RunRecord
from lightning_sft.demos import tiny_model
from lightning_sft.model.parallel.sharding import layers
from lightning_sft.strategies import FSDP2Strategy, layout
from lightning_sft.training.optimizers import clip_gradients
from lightning_sft.types import InputError
from tests.helpers.parallel import (
    ALONE,
    CASES,
    LAUNCHES,
    PAGE,
    SLOW,
    launch,
    measured,
    model,
    run_all,
    table,
    write_page,
)
from tests.helpers.payload import Payload
from tests.helpers.second_device import second_device

WITH_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
NAMES = [
    pytest.param(name, marks=[pytest.mark.slow] if names in SLOW else [])
    for names in LAUNCHES
    for name in names
    if WITH_DEEPSPEED or not CASES[name].stage
]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what cases have shown; those of a single process, which others are compared with, are in it."""
    folder = tmp_path_factory.mktemp("strategies")
    model(folder / "model")
    run_all(str(folder / "model"), folder, [])
    return folder


def run_case(name: str, out: Path) -> None:
    """Run a case with those that can share its processes, if it has not been run."""
    if not (out / f"{name}.json").exists():
        launch(next(names for names in LAUNCHES if name in names), str(out / "model"), out)


@pytest.mark.parametrize("name", [*ALONE, *NAMES])
def test_ten_steps_are_those_of_one_device_and_a_resumed_run_repeats_them(out: Path, name: str) -> None:
    """Loss and gradient norm to 1e-5, with accumulation, clipping and a short window; the resumed losses bit by bit."""
    run_case(name, out)
    assert all(measured(name, out).values()), measured(name, out)


@pytest.mark.slow
@pytest.mark.skipif(not WITH_DEEPSPEED, reason="the table has DeepSpeed in it")
def test_the_table_of_the_page_is_what_was_measured(out: Path) -> None:
    for name in CASES:
        run_case(name, out)
    page = PAGE.read_text(encoding="utf-8")
    assert page == write_page(page, table(out)), "run: python -m tests.helpers.parallel"
    assert table(out) in page


def test_the_strategy_is_known_by_its_name() -> None:
    trainer = Trainer(strategy="fsdp2", accelerator="cpu", devices=2, logger=False, enable_checkpointing=False)
    assert isinstance(trainer.strategy, FSDP2Strategy)
    assert layout(trainer.strategy) == (None, False)


OTHER = torch.device("meta")  # stands for a GPU; FakeTensorMode lets 0-dimensional tensors of two devices be stacked


def test_the_norm_of_gradients_on_the_host_and_on_a_gpu_is_joint() -> None:
    on_gpu, on_host = (torch.nn.Parameter(torch.ones(3, device=device)) for device in (OTHER, "cpu"))
    on_host.device_mesh = "that of sharded parameters which are offloaded"
    for parameter in (on_gpu, on_host):
        parameter.grad = torch.ones_like(parameter)
    norm = clip_gradients(torch.optim.SGD([on_gpu, on_host]), None)
    assert norm is not None
    assert norm.device == OTHER


def test_figures_on_the_host_and_on_a_gpu_are_recorded_together(tmp_path: Path) -> None:
    record = RunRecord()
    record._begin, record._folder = 0.0, tmp_path
    with second_device() as device:
        figures = {"train/loss": torch.ones(()), "train/gradient_norm": torch.full((), 2.0, device=device)}
        record._add(SimpleNamespace(global_step=1, current_epoch=0), figures)
        record._write()
    [line] = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (line["train/loss"], line["train/gradient_norm"]) == (1, 2)


def test_a_sharded_module_says_which_device_it_computes_on() -> None:
    """Its shards are left where they are; batches of callbacks, and what is logged, go where the module says."""
    strategy = FSDP2Strategy()
    strategy.parallel_devices = [OTHER]
    strategy.model = LightningModule()
    strategy.cluster_environment = LightningEnvironment()
    strategy.model_to_device()
    assert strategy.model.device == OTHER


def test_an_index_that_would_run_code_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "sprung")))
    with pytest.raises(InputError, match="could run code"):
        FSDP2Strategy().load_checkpoint(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_shards_that_cannot_be_read_are_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_short(*args: Any) -> None:
        raise CheckpointException("read", {1: (EOFError("Ran out of input"), traceback.StackSummary())})

    monkeypatch.setattr(ModelParallelStrategy, "load_checkpoint", cut_short)
    with pytest.raises(InputError, match=r"a.ckpt cannot be loaded: Ran out of input"):
        FSDP2Strategy().load_checkpoint(tmp_path / "a.ckpt")


def test_layers_are_found_again_when_fsdp2_has_given_them_a_class_of_its_own() -> None:
    llama = tiny_model()
    found = layers(llama)
    for layer in found:
        layer.__class__ = type("FSDP" + type(layer).__name__, (type(layer),), {})
    assert layers(llama) == found
