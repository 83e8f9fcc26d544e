"""What a GPU would refuse is refused here: devices are never mixed, and a step waits for the device once."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import (
    DriftMonitor,
    HFExport,
    OptimizerInBackward,
    Preempt,
    RunRecord,
    SafeCheckpoint,
    SampleGenerations,
    SampleLedger,
)
from lightning_sft.data.batches.collate import collate
from lightning_sft.data.rows.mixture import Mixture, Part
from lightning_sft.demos import tiny_model, tiny_pretrained
from lightning_sft.model.attention.choice import probed
from lightning_sft.model.backbone import backbone_and_head
from lightning_sft.model.experts import Routers, find_routers
from lightning_sft.model.likelihood import LikelihoodModel
from lightning_sft.types import Example
from tests.helpers.fake_cuda import fake_cuda, to_cuda
from tests.helpers.gradients import QUIET
from tests.helpers.second_device import counted_waits, on_second, second_device, without_float64
from tests.helpers.slow import slow_but

ROWS = [{"prompt": f"What is {i} and {i}?", "completion": f"It is {i + i}, I think."} for i in range(24)]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_pretrained(tmp_path_factory.mktemp("second"))


class Observer(Callback):
    """Where parameters are, and what steps wait for, from their batch to the end of their update."""

    def __init__(self) -> None:
        self.devices: set[torch.device] = set()
        self.waits: list[Counter[str]] = []
        self._open = ExitStack()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.devices |= {p.device for p in pl_module.parameters()} | {batch.input_ids.device}
        self.waits.append(self._open.enter_context(counted_waits()))

    def on_train_batch_end(self, *_: Any) -> None:
        self._open.close()


def fit(
    pretrained: str,
    trainer: dict[str, Any],
    data: dict[str, Any] | None = None,
    ckpt_path: str | None = None,
    **model: Any,
) -> tuple[SFTModule, Trainer, Observer]:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"optimizer": partial(SGD, lr=0.1), "schedule": "constant"} | model
    module, observer = SFTModule(pretrained, **settings), Observer()
    of_data: dict[str, Any] = {"train": ROWS, "val": ROWS[:6], "tokens_per_batch": 128, "cache": None} | (data or {})
    settings = {"max_epochs": 1, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0} | trainer
    settings["callbacks"] = [observer, *settings.get("callbacks", [])]
    own = Trainer(**QUIET | settings)
    own.fit(module, SFTDataModule(**of_data), ckpt_path=ckpt_path)
    return module, own, observer


def test_the_second_device_is_as_strict_as_a_gpu() -> None:
    with second_device() as device:
        here = torch.zeros(3, device=device)
        with pytest.raises(RuntimeError, match="same device"):
            here + torch.zeros(3)
        with torch.device(device), pytest.raises(RuntimeError, match="generator"):
            torch.randint(5, (3,), generator=torch.Generator())
        with torch.device(device):
            assert torch.arange(3).device == torch.tensor([1.0]).device == device
        with counted_waits() as waits:
            assert (here + 1).sum().item() == 3
            assert here[here > 0].cpu().tolist() == []
        assert sum(waits.values()) == 3  # the sum, the boolean index, the copy


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_fit_on_a_second_device_is_that_on_the_cpu(pretrained: str, precision: str) -> None:
    expected, on_cpu, _ = fit(pretrained, {"accelerator": "cpu", "precision": precision})
    with second_device() as device:
        module, trainer, observer = fit(pretrained, on_second(precision))
        assert observer.devices == {device}
        assert module.attention is not None
        assert module.attention.name == "per_document", module.attention.why
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if precision == "32-true" else {"rtol": 2e-2, "atol": 2e-3}
    torch.testing.assert_close(module.state_dict(), expected.state_dict(), **tolerance)
    for name in ("train/loss", "val/loss", "train/gradient_norm"):
        torch.testing.assert_close(
            trainer.callback_metrics[name].cpu(), on_cpu.callback_metrics[name].cpu(), **tolerance
        )


def test_a_step_waits_for_the_device_once(pretrained: str) -> None:
    with second_device():
        _, _, observer = fit(pretrained, on_second())
    micro_batches = Counter(sum(waits.values()) for waits in observer.waits)
    assert sum(observer.waits, Counter()).keys() == {"_to_copy in machine/host_copy.py:__init__"}
    assert micro_batches == {0: 6, 1: 6}  # at the end of steps of two micro-batches


MODELS: dict[str, dict[str, Any]] = {
    "adapters": {"lora": {"r": 4}},
    "adapters and new tokens": {"lora": {"r": 4}, "new_tokens": ["<|a|>"]},
    "new tokens": {"new_tokens": ["<|a|>"]},
    "8 bits": {"lora": {"r": 4}, "quantize": "8bit"},
    "noise": {"neftune_alpha": 5.0},
    "checkpointing": {"gradient_checkpointing": True},
    "frozen": {"frozen": ["*.layers.0.*"]},
    "dataset": {"normalize": "dataset"},
    "stock attention": {"attn_implementation": "sdpa"},
    "eager attention": {"attn_implementation": "eager"},
}


@pytest.mark.parametrize("name", slow_but(["checkpointing", "adapters and new tokens", "8 bits"], MODELS))
def test_every_way_to_train_a_model_works_there(pretrained: str, name: str) -> None:
    with second_device() as device:
        _, trainer, observer = fit(pretrained, on_second("bf16-mixed"), **MODELS[name])
        assert observer.devices == {device}
    assert trainer.global_step == 6
    assert trainer.callback_metrics["train/loss"].isfinite()


DATA: dict[str, dict[str, Any]] = {
    "a mixture": {"train": Mixture({"a": Part(ROWS[:12]), "b": Part(ROWS[12:])})},
    "a stream": {"streaming": True, "buffer_rows": 8},
    "padded rows": {"packing": "padded"},
    "workers": {"num_workers": 1},
}


@pytest.mark.parametrize("name", DATA)
def test_every_kind_of_data_works_there_and_a_step_waits_once(pretrained: str, name: str) -> None:
    with second_device():
        _, trainer, observer = fit(pretrained, on_second() | {"max_steps": 4, "max_epochs": -1}, data=DATA[name])
    assert trainer.global_step == 4
    assert sum(observer.waits, Counter()) == {"_to_copy in machine/host_copy.py:__init__": 4}


def test_callbacks_and_a_resumed_run_work_there(pretrained: str, tmp_path: Path) -> None:
    def callbacks(folder: str) -> list[Callback]:
        path = str(tmp_path / folder)
        return [
            SafeCheckpoint(path, every_n_train_steps=1, keep_last=9),
            SampleLedger(path),
            RunRecord(path),
            Preempt(),
            DriftMonitor(sequences=2),
            SampleGenerations(max_new_tokens=3),
            HFExport(str(tmp_path / folder / "exported")),
        ]

    with second_device():
        settings = {"enable_checkpointing": True, "val_check_interval": 4}
        whole, trainer, _ = fit(pretrained, on_second() | settings | {"callbacks": callbacks("whole")})
        half = min((tmp_path / "whole").glob("resume-*step=2.ckpt"))
        again, resumed, _ = fit(
            pretrained, on_second() | settings | {"callbacks": callbacks("again")}, ckpt_path=str(half)
        )
    assert resumed.global_step == trainer.global_step == 6
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all("train/gradient_norm" in row for row in rows if "train/loss" in row)
    assert {"drift/kl", "train/loss", "val/loss"} <= set().union(*rows)


def test_an_optimizer_in_the_backward_pass_works_there(pretrained: str) -> None:
    with second_device():
        settings = {"accumulate_grad_batches": 1, "gradient_clip_val": None, "callbacks": [OptimizerInBackward()]}
        _, trainer, _ = fit(pretrained, on_second() | settings)
    assert trainer.global_step == 12


def test_a_non_finite_loss_names_its_row_there(pretrained: str) -> None:
    class Poison(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            poison = ord("~") - 33  # a byte that only one row has
            pl_module.model.get_input_embeddings().weight.data[poison] = torch.nan

    rows = [*ROWS[:5], {"prompt": "bad ~", "completion": "ok"}, *ROWS[5:]]
    with second_device(), pytest.raises(FloatingPointError, match=r"Samples: row 6\. Nothing was updated"):
        fit(pretrained, on_second() | {"callbacks": [Poison()]}, data={"train": rows})


def test_predict_and_test_work_there(pretrained: str) -> None:
    with second_device():
        module = SFTModule(pretrained, max_new_tokens=3, sampling={"temperature": 1.0})
        data = SFTDataModule(test=ROWS[:6], predict=ROWS[:6], cache=None)
        [figures] = Trainer(**QUIET | on_second()).test(module, data)
        [answers] = Trainer(**QUIET | on_second()).predict(module, data)
    assert figures["test/loss"] > 0
    assert len(answers) == 6


def plain_batches() -> list[dict[str, Tensor]]:
    """Batches of a collator of the user's."""
    return [{"input_ids": torch.arange(2 * n).view(2, n), "labels": torch.arange(2 * n).view(2, n)} for n in (7, 9)]


def test_a_device_without_float64_trains_evaluates_and_draws(pretrained: str) -> None:
    """Apple's MPS is such a one."""
    with second_device() as device, without_float64():
        with pytest.raises(TypeError, match="float64"):
            torch.ones(2, dtype=torch.float64, device=device)
        callbacks = [DriftMonitor(4), SampleGenerations(2, 3, console=False)]
        module, trainer, _ = fit(
            pretrained, on_second() | {"callbacks": callbacks}, max_new_tokens=3, sampling={"temperature": 1.0}
        )
        assert {"drift/kl", "val/loss", "train/gradient_norm"} <= trainer.callback_metrics.keys()
        Trainer(**QUIET | on_second() | {"max_steps": 2}).fit(module, DataLoader(plain_batches(), batch_size=None))
        data = SFTDataModule(test=ROWS[:6], predict=ROWS[:6], cache=None)
        [figures] = Trainer(**QUIET | on_second()).test(module, data)
        [answers] = Trainer(**QUIET | on_second()).predict(module, data)
    assert figures["test/loss"] > 0
    assert len(answers) == 6


FAKE = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "gpt_oss": {"sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


@pytest.mark.parametrize("model_type", FAKE)
def test_a_likelihood_on_a_gpu_mixes_no_devices_and_waits_for_nothing(
    monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """Under FakeTensorMode on ``cuda:0`` mixed devices are an error, and so is a value that the host would need."""
    model = tiny_model(model_type, **FAKE[model_type])
    backbone, head = backbone_and_head(model)
    attention, findings = probed(model, backbone, head)
    assert attention.name.startswith("per_document"), attention.why
    found, _ = find_routers(model)
    routers = Routers(found, coefficient=0.1) if found else None
    scorer = LikelihoodModel(model, findings, routers=routers).bfloat16().requires_grad_(False)
    examples = [Example(range(5, 5 + n), [0.0, *[1.0] * (n - 1)]) for n in (7, 3, 9)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))  # transformers asks
    with fake_cuda() as mode:
        batch = collate(examples, fill=24)._map(mode.from_tensor).to("cuda:0")
        to_cuda(scorer, mode)
        total, weight, log_probs, correct, entropy, *balance = scorer(batch)
    assert {x.device for x in balance} == ({torch.device("cuda:0")} if found else set())
    assert {x.device for x in (total, weight, log_probs, correct, entropy)} == {torch.device("cuda:0")}
    assert log_probs.shape == (16,)
    assert log_probs.dtype == torch.float32
