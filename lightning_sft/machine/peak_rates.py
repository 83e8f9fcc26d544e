"""Peak matmul rates of GPUs, the denominator of MFU.

Dense rates, as vendors' data sheets give them; where a sheet has rates with 2:4 sparsity alone, half of these. Rates of
GeForce and RTX cards are those with accumulation in float32, as torch has it. Lightning's own table mixes rates with
sparsity, without tensor cores, and for pairs of cards.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_TERA = 1e12

# pattern of the device's name: TFLOP/s in half precision and in TF32 on tensor cores, and in float32 without them
_RATES: tuple[tuple[str, float, float, float], ...] = (
    # https://resources.nvidia.com/en-us-blackwell-architecture/datasheet: HGX B200, GB200
    (r"GB200", 2500.0, 1250.0, 80.0),
    (r"B200", 2250.0, 1125.0, 75.0),
    # https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet: H100; H800 is the same
    (r"H[18]00 NVL", 835.5, 417.5, 60.0),
    (r"H[18]00 PCIe", 756.5, 378.0, 51.0),
    (r"H[18]00", 989.4, 494.7, 66.9),
    (r"GH200", 989.4, 494.7, 66.9),
    # https://resources.nvidia.com/en-us-data-center-overview-mc/en-us-data-center-overview/hpc-datasheet-sc23-h200
    (r"H200 NVL", 835.5, 417.5, 60.0),
    (r"H200", 989.4, 494.7, 66.9),
    # https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
    (r"A[18]00", 312.0, 156.0, 19.5),
    # https://www.nvidia.com/en-us/data-center/products/a30-gpu, a40, a10-gpu; AWS's data sheet of the A10G
    (r"A30", 165.0, 82.0, 10.3),
    (r"A40", 149.7, 74.8, 37.4),
    (r"A10G", 70.0, 35.0, 31.5),
    (r"A10", 125.0, 62.5, 31.2),
    # https://www.nvidia.com/en-us/data-center/l40s, l40, l4
    (r"L40S", 362.0, 183.0, 91.6),
    (r"L40", 181.0, 90.5, 90.5),
    (r"L4", 121.0, 60.0, 30.3),
    # https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf
    (r"RTX 5090", 209.5, 104.8, 104.8),
    (r"RTX 5080", 112.6, 56.3, 56.3),
    (r"RTX PRO 6000 Blackwell", 503.8, 251.9, 126.0),
    # https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf
    (r"RTX 4090", 165.2, 82.6, 82.6),
    (r"RTX 4080 SUPER", 104.4, 52.2, 52.2),
    (r"RTX 4080", 97.5, 48.7, 48.7),
    (r"RTX 6000 Ada", 364.2, 182.1, 91.1),
    # https://images.nvidia.com/aem-dam/en-zz/Solutions/geforce/ampere/pdf/NVIDIA-ampere-GA102-GPU-Architecture-Whitepaper-V1.pdf
    (r"RTX 3090 Ti", 80.0, 40.0, 40.0),
    (r"RTX 3090", 71.0, 35.6, 35.6),
    (r"RTX 3080 Ti", 68.2, 34.1, 34.1),
    (r"RTX 3080", 59.5, 29.8, 29.8),
    (r"RTX A6000", 154.8, 77.4, 38.7),
)
_SLOWER = re.compile(r"\b(MIG|Laptop|Max-Q|D)\b")  # parts and variants of cards that have names like the whole ones


def peak_rate(trainer: Trainer) -> float | None:
    """FLOP/s of a trainer's device in the dtype that its model's matmuls are in, or ``None`` where it is not known.

    Args:
        trainer: Lightning trainer.
    """
    device, dtype = trainer.strategy.root_device, matmul_dtype(trainer)
    if device.type != "cuda" or dtype is None:
        return None
    return rate_of(torch.cuda.get_device_name(device), dtype, rounds_to_tf32())


def matmul_dtype(trainer: Trainer) -> torch.dtype | None:
    """Dtype of the inputs of matmuls: the dtype of autocast in mixed precision, else that of the parameters.

    Args:
        trainer: Lightning trainer.

    Returns:
        ``None`` for precisions that are none of torch's dtypes, as ``transformer-engine``.
    """
    of_fsdp2 = getattr(trainer.strategy, "compute_dtype", None)
    name = of_fsdp2 or _DTYPES.get(str(trainer.precision).partition("-")[0])
    return None if name is None else getattr(torch, name)


def rounds_to_tf32() -> bool:
    """Whether matmuls in float32 are allowed to round their inputs to TF32, however that was set."""
    matmul: Any = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # from torch 2.9; after its setter, allow_tf32 raises
    return bool(matmul.allow_tf32 if precision is None else precision == "tf32")


def rate_of(name: str, dtype: torch.dtype, tf32: bool = False) -> float | None:
    """FLOP/s of a GPU, dense, or ``None`` where it is not known.

    Args:
        name: Device name from ``torch.cuda.get_device_name``.
        dtype: Dtype of the inputs of matmuls.
        tf32: Whether float32 inputs are rounded to TF32.

    >>> rate_of("NVIDIA H100 80GB HBM3", torch.bfloat16)
    989400000000000.0
    """
    rates = next((rates for chip, *rates in _RATES if re.search(rf"\b{chip}\b", name)), None)
    if rates is None or _SLOWER.search(name):
        return None
    of_halves, of_tf32, of_float32 = rates
    of_dtype = {torch.float16: of_halves, torch.bfloat16: of_halves, torch.float32: of_tf32 if tf32 else of_float32}
    found = of_dtype.get(dtype)
    return None if found is None else found * _TERA


_DTYPES = {"16": "float16", "bf16": "bfloat16", "32": "float32", "64": "float64"}
