"""Tiny checkpoints in the formats of quantizers, written by hand, and the values that they hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_sft.demos import tiny_pretrained

SIZE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32}
SIZES: dict[str, dict[str, Any]] = {
    "qwen3": SIZE,
    "gpt_oss": {**SIZE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**SIZE, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
}
GROUP = 32  # rows of a matrix that share a scale
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # values of e2m1, without their sign
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of eight columns, in the order in which an integer holds them

Packed = tuple[dict[str, Tensor], Tensor]
"""Tensors by the end of their names, and the matrix that they stand for."""


def fp8(weight: Tensor) -> Packed:
    """Blocks of 16 by 16 share a scale."""
    blocks = weight.unflatten(0, (-1, 16)).unflatten(-1, (-1, 16))  # [rows, 16, columns, 16]
    scale = blocks.abs().amax((1, 3)) / 448
    stored = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    values = (stored.float() * scale[:, None, :, None]).view_as(weight)
    return {".weight": stored.view_as(weight), ".weight_scale_inv": scale}, values


def compressed(weight: Tensor) -> Packed:
    """FP8 with a scale for each row, as llm-compressor writes it."""
    scale = weight.abs().amax(1, keepdim=True) / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {".weight": stored, ".weight_scale": scale}, stored.float() * scale


def mxfp4(weight: Tensor) -> Packed:
    """Blocks of 32 columns share a power of two; two values in a byte, the first in its lower bits."""
    blocks = weight.mT.unflatten(-1, (-1, 32))  # of experts; files have them transposed: [E, out, in / 32, 32]
    exponent = torch.floor(torch.log2(blocks.abs().amax(-1))) - 2
    scaled = blocks / exponent.exp2()[..., None]
    code = (scaled.abs()[..., None] - FP4).abs().argmin(-1)
    values = FP4[code] * scaled.sign() * exponent.exp2()[..., None]
    nibbles = (code + 8 * (scaled < 0)).to(torch.uint8)
    packed = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    return {"_blocks": packed, "_scales": (exponent + 127).to(torch.uint8)}, values.flatten(-2).mT.contiguous()


def _rounded(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integers ``[in, out]``, and zeros and scales of groups of rows ``[in / GROUP, out]``."""
    groups = weight.T.unflatten(0, (-1, GROUP))
    low, high = groups.amin(1), groups.amax(1)
    scales = ((high - low) / (2**bits - 1)).half()
    zeros = (-low / scales.float()).round().clamp(0, 2**bits - 1).int()
    zeros[0, 0] = 0
    q = (groups / scales.float()[:, None] + zeros[:, None]).round().clamp(0, 2**bits - 1).int()
    return q.flatten(0, 1), zeros, scales


def _pack(values: Tensor, bits: int) -> Tensor:
    """Along the last dimension, lowest bits first."""
    parts = values.long().unflatten(-1, (-1, 32 // bits))
    whole = sum(parts[..., i] << (bits * i) for i in range(32 // bits))
    return torch.where(whole >= 2**31, whole - 2**32, whole).int()


def gptq(weight: Tensor, bits: int = 4, ordered: bool = False, version: int = 1) -> Packed:
    """Rows may be in any group (``desc_act``); zeros minus 1 in the first version."""
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
    rows = order if ordered else torch.arange(weight.shape[1])
    q, zeros, scales = _rounded(weight[:, rows], bits)
    group = torch.empty(len(rows), dtype=torch.int32)
    group[rows] = torch.arange(len(rows), dtype=torch.int32) // GROUP
    back = torch.empty_like(rows)
    back[rows] = torch.arange(len(rows))
    q = q[back]
    values = (scales.float()[group.long()] * (q - zeros[group.long()])).T
    tensors = {
        ".qweight": _pack(q.T, bits).T.contiguous(),
        ".qzeros": _pack((zeros - int(version == 1)) % 2**bits, bits),
    }
    return {**tensors, ".scales": scales, ".g_idx": group}, values.contiguous()


def awq(weight: Tensor) -> Packed:
    """Eight columns in an integer, in an order of its own."""
    q, zeros, scales = _rounded(weight, 4)
    values = (scales.float().repeat_interleave(GROUP, 0) * (q - zeros.repeat_interleave(GROUP, 0))).T
    packed = (_pack(x.unflatten(-1, (-1, 8))[..., list(AWQ_COLUMNS)].flatten(-2), 4) for x in (q, zeros))
    return dict(zip((".qweight", ".qzeros"), packed, strict=True)) | {".scales": scales}, values.contiguous()


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
_CHANNEL = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
_COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*mlp.gate$"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": _CHANNEL, "format": "float-quantized"}},
}
KINDS: dict[str, tuple[str, dict[str, Any], Callable[[Tensor], Packed]]] = {
    "mxfp4": ("gpt_oss", {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}, mxfp4),
    "fp8": ("qwen3", _FP8, fp8),
    "fp8_moe": ("qwen3_moe", _FP8, fp8),
    "compressed-tensors": ("qwen3", _COMPRESSED, compressed),
    "compressed-tensors_moe": ("qwen3_moe", _COMPRESSED, compressed),
    "gptq": ("qwen3", {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}, gptq),
    "gptq_8bit": ("qwen3", {"quant_method": "gptq", "bits": 8, "group_size": GROUP}, lambda w: gptq(w, 8)),
    "gptq_desc_act": (
        "qwen3",
        {"quant_method": "gptq", "bits": 4, "desc_act": True, "checkpoint_format": "gptq_v2"},
        lambda w: gptq(w, 4, True, 2),
    ),
    "gptq_moe": ("qwen3_moe", {"quant_method": "gptq", "bits": 4, "group_size": GROUP}, gptq),
    "awq": ("qwen3", {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, awq),
}
"""For each kind an architecture, the quantization config, and how a matrix is packed."""


def prequantized(folder: Path, kind: str) -> tuple[str, str]:
    """Write a checkpoint in a format of :data:`KINDS`, and a plain one of the same values; the paths of both."""
    architecture, settings, pack = KINDS[kind]
    plain, quantized = (tiny_pretrained(folder / name, architecture, **SIZES[architecture]) for name in ("plain", kind))
    weights = load_file(Path(plain, "model.safetensors"))
    stored = dict(weights)
    for name, weight in weights.items():
        ends = ("experts.gate_up_proj", "experts.down_proj") if kind == "mxfp4" else ("_proj.weight",)
        if name.endswith(ends):
            tensors, weights[name] = pack(weight)
            del stored[name]
            stored |= {name.removesuffix(".weight") + end: tensor for end, tensor in tensors.items()}
    save_file(weights, Path(plain, "model.safetensors"), {"format": "pt"})
    save_file(stored, Path(quantized, "model.safetensors"), {"format": "pt"})
    path = Path(quantized, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    return quantized, plain
