from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.strategies import DDPStrategy

from lightning_sft.data.batches.split_plan import default_tokens_per_batch
from lightning_sft.training import trainer as trainer_facts
from lightning_sft.training.trainer import (
    Agreement,
    data_parallel,
    how_to_resume,
    on_cuda,
    sum_over_ranks,
    trainer_on_paper,
)


def trainer(monkeypatch: pytest.MonkeyPatch, said: list[float], world_size: int = 2) -> Any:
    """One whose other process says yes at the times that are listed, and whose collectives are counted."""
    asked: list[torch.Tensor] = []

    def all_reduce(value: torch.Tensor) -> None:
        asked.append(value)
        value += torch.tensor([said.pop(0) if said else 0.0, 0.0])

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(strategy=strategy, world_size=world_size, is_global_zero=True, asked=asked)


@pytest.mark.parametrize(("seconds", "times"), [(0.01, 5), (0.25, 11), (3.0, 38)])
def test_processes_ask_each_other_about_once_a_second(
    monkeypatch: pytest.MonkeyPatch, seconds: float, times: int
) -> None:
    now = [0.0]
    monkeypatch.setattr(trainer_facts.time, "monotonic", lambda: now[0])
    own, agreement = trainer(monkeypatch, []), Agreement()
    for _ in range(38):
        now[0] += seconds
        assert not agreement.one_says(own, False)
    assert len(own.asked) == times


def test_one_process_is_enough_and_a_single_one_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Agreement().one_says(trainer(monkeypatch, [1.0]), False)
    assert Agreement().one_says(trainer(monkeypatch, []), True)
    alone = trainer(monkeypatch, [], world_size=1)
    assert [Agreement().one_says(alone, yes) for yes in (True, False)] == [True, False]
    assert not alone.asked


def test_sums_over_processes_have_no_barrier_since_that_of_nccl_waits_for_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    barriers: list[Any] = []
    monkeypatch.setattr(torch.distributed, "barrier", lambda *args, **kwargs: barriers.append(kwargs))
    strategy = SimpleNamespace(reduce=DDPStrategy().reduce, root_device=torch.device("cpu"))
    ranks = {"rank": 0, "num_replicas": 2}
    one_of_two = SimpleNamespace(strategy=strategy, world_size=2, is_global_zero=True, distributed_sampler_kwargs=ranks)
    given = torch.tensor([1.0, 2.0])
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert torch.equal(sum_over_ranks(one_of_two, given), given)
        assert Agreement().one_says(one_of_two, True)
    finally:
        torch.distributed.destroy_process_group()
    assert not barriers


@pytest.mark.parametrize(("accelerator", "tokens"), [("cpu", 2048), ("gpu", 16_384), ("cuda", 16_384)])
def test_a_micro_batch_has_more_tokens_on_a_gpu(accelerator: str, tokens: int) -> None:
    names = ("limit_train_batches", "overfit_batches", "fast_dev_run", "strategy")
    settings = SimpleNamespace(
        accelerator=accelerator, devices=1, num_nodes=1, accumulate_grad_batches=1, **dict.fromkeys(names, 0)
    )
    paper = trainer_on_paper(None, settings)
    assert on_cuda(paper) == (accelerator != "cpu")
    assert default_tokens_per_batch(on_cuda(paper)) == tokens
    assert default_tokens_per_batch(on_cuda(None)) == 2048


def test_on_paper_devices_that_share_a_batch_are_one_rank() -> None:
    names = ("limit_train_batches", "overfit_batches", "fast_dev_run")
    sizes = {"tensor_parallel_size": 2, "context_parallel_size": 2, "data_parallel_size": "auto"}
    for own, num_ranks in ((sizes, 2), ({"tensor_parallel_size": "auto"}, 8), ({}, 8)):
        settings = SimpleNamespace(
            **{"accelerator": "cpu", "devices": 4, "num_nodes": 2, "accumulate_grad_batches": 1},
            **{"strategy": SimpleNamespace(class_path="fsdp2", init_args=own), **dict.fromkeys(names, 0)},
        )
        assert data_parallel(trainer_on_paper(None, settings)) == (0, num_ranks)


def test_how_a_run_resumes_is_said_as_it_was_started(quiet_trainer: Any) -> None:
    assert how_to_resume(quiet_trainer()) == 'trainer.fit(..., ckpt_path="last")'
    of_cli = SaveConfigCallback(LightningArgumentParser(), Namespace())
    assert how_to_resume(quiet_trainer(callbacks=[of_cli]), "a.ckpt") == "--ckpt_path a.ckpt"
