"""What part of a model each device has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_sft.commands.plan.layout import Layout, Model
from lightning_sft.types import InputError

MODEL = Model(layer=1000, others=5000, trained=25_000, trained_layer=1000)


def layout(strategy: Any, precision: str = "32-true", num_devices: int = 4) -> Layout:
    return Layout.of(SimpleNamespace(strategy=strategy, precision=precision), num_devices)


def fsdp2(**settings: Any) -> dict[str, Any]:
    return {"class_path": "lightning_sft.strategies.FSDP2Strategy", "init_args": settings}


@pytest.mark.parametrize(
    ("strategy", "weights", "gradients", "optimizer"),
    [
        ("auto", 1, 1, 1),
        ("ddp", 1, 1, 1),
        ("fsdp2", 1 / 4, 1 / 4, 1 / 4),
        (fsdp2(tensor_parallel_size=2), 1 / 2, 1 / 2, 1 / 2),  # the other half is in the matrices, which are cut
        (fsdp2(cpu_offload=True), 0, 0, 0),
        ("deepspeed_stage_1", 1, 1, 1 / 4),
        ("deepspeed_stage_2", 1, 1 / 4, 1 / 4),
        ("deepspeed_stage_2_offload", 1, 1 / 4, 0),
        ("deepspeed_stage_3", 1 / 4, 1 / 4, 1 / 4),
    ],
)
def test_what_a_device_keeps(strategy: Any, weights: float, gradients: float, optimizer: float) -> None:
    assert layout(strategy).shares == {"weights": weights, "gradients": gradients, "optimizer": optimizer}


@pytest.mark.parametrize(
    ("strategy", "offloaded"),
    [
        ("ddp", {}),
        ("deepspeed_stage_2_offload", {"optimizer": 1 / 4}),
        (fsdp2(cpu_offload=True), {"weights": 1 / 4, "gradients": 1 / 4, "optimizer": 1 / 4}),
    ],
)
def test_what_the_host_keeps_for_a_rank(strategy: Any, offloaded: dict[str, float]) -> None:
    assert layout(strategy).offloaded == offloaded


def test_ranks_that_share_rows_or_matrices_get_the_same_batches() -> None:
    shared = layout(fsdp2(tensor_parallel_size=2, context_parallel_size=4), num_devices=16)
    assert (shared.data_parallel, shared.tensor_parallel, shared.context_parallel) == (8, 2, 4)
    assert shared.num_batches == 2
    assert shared.name == "FSDP2 over 8, tensor-parallel over 2, context-parallel over 4"
    assert shared.shares["weights"] == 1 / 8  # those that share rows have shards of their own


def test_devices_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(InputError, match=r"4 devices cannot be divided .*context_parallel_size=3.*a multiple of 3"):
        layout(fsdp2(context_parallel_size=3))


@pytest.mark.parametrize(("settings", "precision"), [({"compute_dtype": "bfloat16"}, "32-true"), ({}, "bf16-mixed")])
def test_shards_are_wider_than_what_is_computed_with(settings: Any, precision: str) -> None:
    in_bfloat16 = layout(fsdp2(**settings), precision)
    assert in_bfloat16.computes_in == torch.bfloat16
    assert in_bfloat16.shares["weights"] == 2 / 4  # counted in bfloat16, kept in float32 by four
    assert in_bfloat16.extra(MODEL)["gathered parameters"] == 2 * (2 * 1000 + 5000)


def test_deepspeed_keeps_a_float32_copy_of_16_bits() -> None:
    mixed = layout("deepspeed_stage_2", "bf16-mixed")
    assert mixed.dtype == torch.bfloat16
    assert mixed.shares["optimizer"] == 2 / 4
    assert mixed.extra(MODEL)["float32 copy of what is trained"] == 4 * 25_000 / 4


def test_ddp_has_buckets_of_gradients() -> None:
    assert layout("ddp").extra(MODEL) == layout("auto").extra(MODEL) == {"buckets of gradients": 4 * 25_000}
    assert layout("auto", num_devices=1).extra(MODEL) == {}


@pytest.mark.parametrize(
    ("precision", "dtype", "autocast"),
    [
        ("32-true", torch.float32, None),
        (None, torch.float32, None),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("16-mixed", torch.float32, torch.float16),
        ("bf16-true", torch.bfloat16, None),
        (64, torch.float64, None),
    ],
)
def test_precisions(precision: Any, dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    found = layout("auto", precision, 1)
    assert (found.dtype, found.autocast) == (dtype, autocast)


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(InputError, match=r"plan does not support trainer.strategy='xla', only auto, ddp, fsdp2"):
        layout("xla")
    with pytest.raises(InputError, match=r"plan does not support trainer.precision='transformer-engine'"):
        layout("auto", "transformer-engine")
