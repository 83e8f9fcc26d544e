"""What MFU is a fraction of: the dense rate of a GPU in the dtype of the matmuls."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_sft.machine.peak_rates import matmul_dtype, peak_rate, rate_of
from lightning_sft.strategies import FSDP2Strategy


@pytest.fixture
def precision() -> Iterator[None]:
    """Leaves the precision of matmuls in float32 as it was."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("bf16-mixed", torch.bfloat16),
        ("bf16-true", torch.bfloat16),
        ("16-true", torch.float16),
        ("32-true", torch.float32),
        ("64-true", torch.float64),
    ],
)
def test_the_dtype_of_matmuls_is_that_of_the_precision(quiet_trainer: Any, given: Any, expected: torch.dtype) -> None:
    assert matmul_dtype(quiet_trainer(precision=given)) == expected


def test_the_dtype_of_fsdp2_wins() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, strategy=FSDP2Strategy(compute_dtype="bfloat16"))
    assert matmul_dtype(trainer) == torch.bfloat16
    trainer = Trainer(accelerator="cpu", logger=False, strategy=FSDP2Strategy(), precision="bf16-true")
    assert matmul_dtype(trainer) == torch.bfloat16


def test_deepspeed_computes_mixed_precision_in_16_bits() -> None:
    for precision, dtype in (("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16), ("32-true", torch.float32)):
        trainer = SimpleNamespace(strategy=SimpleNamespace(), precision=precision)
        assert matmul_dtype(trainer) == dtype


def test_names_that_lead_to_no_dtype_have_no_rate() -> None:
    trainer: Any = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cuda:0")), precision="transformer-engine"
    )
    assert peak_rate(trainer) is None


def test_a_cpu_has_no_rate(quiet_trainer: Any) -> None:
    assert peak_rate(quiet_trainer()) is None


def test_tf32_counts_where_matmuls_are_allowed_to_round_to_it(monkeypatch: pytest.MonkeyPatch, precision: None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda:0")), precision="32-true")
    torch.set_float32_matmul_precision("highest")
    assert peak_rate(trainer) == 19.5e12
    torch.set_float32_matmul_precision("high")
    assert peak_rate(trainer) == 156e12
    trainer.precision = "bf16-mixed"
    assert peak_rate(trainer) == 312e12


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090 Ti", 80.0),
        ("NVIDIA GeForce RTX 3090", 71.0),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A16", None),
        ("Tesla P100-PCIE-16GB", None),
    ],
)
def test_names_as_drivers_give_them_find_their_card(name: str, teraflops: float | None) -> None:
    assert rate_of(name, torch.bfloat16) == (None if teraflops is None else teraflops * 1e12)


def test_rates_go_up_as_numbers_get_shorter() -> None:
    """Sheets with sparsity are double: no dense rate in 16 bits is more than four times that of TF32."""
    for name in ("NVIDIA H100", "NVIDIA A100", "NVIDIA L4", "NVIDIA L40S", "NVIDIA GeForce RTX 4090", "NVIDIA A10G"):
        halves, tf32, plain = (
            rate_of(name, dtype, tf32) or 0
            for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, True), (torch.float32, False))
        )
        assert plain <= tf32 <= halves <= 2.05 * tf32
