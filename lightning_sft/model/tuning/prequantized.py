"""Pre-quantized checkpoints as a base of adapters: read as the values that they store, in floating point.

=====================  =================================================================================================
kind                   what adapters are trained on
=====================  =================================================================================================
bitsandbytes, 4 bits   the packed weights, dequantized in each layer's forward pass
torchao, weight-only   the same
MXFP4, FP8, MXFP8      plain weights, dequantized on loading by transformers
compressed-tensors     the same, by the package of this name
bitsandbytes, 8 bits   plain weights, dequantized on loading
GPTQ, AWQ              plain weights, unpacked here: no package is needed
=====================  =================================================================================================

All of these are weights alone. Kernels that also round activations (FP8, LLM.int8) do so at inference; their gradients
would depend on the rest of the micro-batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lightning_sft.model.tuning.quantization import dequantize, is_packed, is_quantized, remove_marks
from lightning_sft.types import InputError

_NEEDS = {  # packages that transformers reads a kind with
    "fp8": "accelerate",
    "mxfp8": "accelerate",
    "compressed-tensors": "compressed_tensors",
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
}
_BY_TRANSFORMERS = ("mxfp4", "fp8", "mxfp8", "compressed-tensors")
_UNPACKED = ("gptq", "awq")
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # place of each column among the eight that an integer holds


@dataclass(frozen=True)
class Prequantized:
    """How the weights of a checkpoint are quantized.

    Args:
        method: Name of the method in transformers, such as ``gptq``.
        settings: Quantization config of the checkpoint.
    """

    method: str
    settings: dict[str, Any]

    @classmethod
    def of(cls, config: PretrainedConfig) -> Prequantized | None:
        """That of a model's configuration; ``None`` for plain weights."""
        both = (getattr(part, "quantization_config", None) for part in (config, config.get_text_config()))
        given: Any = next(filter(None, both), None)
        if given is None:
            return None
        settings: dict[str, Any] = given if isinstance(given, dict) else given.to_dict()
        in_old_files = any(settings.get(key) for key in ("load_in_4bit", "load_in_8bit"))  # they do not say the method
        method = settings.get("quant_method") or ("bitsandbytes" if in_old_files else "unknown")
        return cls(str(getattr(method, "value", method)), settings)

    @property
    def stays_packed(self) -> bool:
        """Whether the model computes with packed weights."""
        return self.method == "torchao" or (self.method == "bitsandbytes" and bool(self.settings.get("load_in_4bit")))

    @property
    def is_unpacked_here(self) -> bool:
        """Whether the weights are read by :meth:`unpacked`."""
        return self.method in _UNPACKED

    @property
    def fits_bfloat16(self) -> bool:
        """Whether the dequantized values are those of bfloat16: 2 bits of mantissa and a power of two."""
        return self.method == "mxfp4"

    def check(self, pretrained: str, has_adapters: bool) -> None:
        """Refuse what cannot be trained on, before anything is loaded.

        Args:
            pretrained: Hub name or path of the model, for messages.
            has_adapters: Whether adapters are trained instead of the model.

        Raises:
            InputError: Without adapters, for an unknown kind, or when the package that reads it is not installed.
        """
        if not has_adapters:
            raise InputError(
                f"The weights of {pretrained!r} are quantized ({self.method}), and rounded weights cannot be trained. "
                "Train adapters on them (model.lora.r=16), or use the model before quantization."
            )
        is_known = self.method in (*_BY_TRANSFORMERS, "bitsandbytes") or self._is_unpackable or self._is_weight_only
        if not is_known:
            raise InputError(
                f"The weights of {pretrained!r} are quantized with {self._described}; adapters can be trained on "
                "weights of bitsandbytes, torchao (weight-only), MXFP4, FP8, compressed-tensors, GPTQ (2, 4 or 8 bits) "
                "and AWQ (4 bits, gemm). Use the model before quantization; model.quantize quantizes it on loading."
            )
        self.check_package(pretrained)

    def check_package(self, pretrained: str) -> None:
        """Refuse weights whose package is missing.

        Args:
            pretrained: Path or hub name of the model, for the message.

        Raises:
            InputError: When the package that reads them is not installed.
        """
        needed = _NEEDS.get(self.method)
        if needed is not None and find_spec(needed) is None:
            raise InputError(
                f"The weights of {pretrained!r} are quantized with {self.method}, and reading them needs a "
                f"package that is not installed: pip install {needed.replace('_', '-')}. Or use the model before "
                "quantization."
            )

    def dequantize_on_loading(self, config: PretrainedConfig) -> None:
        """Change a model's configuration, in place, so that transformers dequantizes on loading, if it can."""
        if self.method in _BY_TRANSFORMERS:
            config.quantization_config = self.settings | {"dequantize": True}

    def finish(self, model: PreTrainedModel) -> None:
        """Turn a loaded model into a plain one if its weights do not stay packed, in place.

        Raises:
            InputError: When a weight is not plain then.
        """
        if self.stays_packed:
            return
        if self.method == "bitsandbytes":
            dequantize(model)
        elif is_quantized(model):
            remove_marks(model)
        packed = [name for name, p in model.named_parameters() if is_packed(p) or p.dtype not in _PLAIN]
        if packed:
            raise InputError(
                f"{packed[0]} and {len(packed) - 1} more weights, quantized with {self._described}, were not "
                "dequantized on loading. Use the model before quantization."
            )

    def unpacked(self, files: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of safetensors files, with those of quantized matrices replaced by ``weight`` in float32.

        Raises:
            InputError: When a quantized matrix lacks a tensor.
        """
        found: dict[str, Tensor] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
        for name in [name.removesuffix(".qweight") for name in found if name.endswith(".qweight")]:
            missing = [part for part in ("qzeros", "scales") if f"{name}.{part}" not in found]
            if missing:
                raise InputError(f"The matrix {name}, quantized with {self._described}, has no {missing[0]}.")
            qweight, qzeros, scales = (found.pop(f"{name}.{part}") for part in ("qweight", "qzeros", "scales"))
            found[f"{name}.weight"] = self._matrix(qweight, qzeros, scales, found.pop(f"{name}.g_idx", None))
        return found

    def _matrix(self, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None) -> Tensor:
        """``[out, in]`` of ``scale · (q − zero)``; groups of rows ``[in]`` share scales and zeros ``[groups, out]``.

        GPTQ packs q along the rows, AWQ along the columns in an order of its own; both pack zeros along the columns.
        The first format of GPTQ stores zeros minus 1, and 0 as the largest integer.
        """
        if self.method == "gptq":
            q, zeros = _unpacked(qweight.T, self._bits).T, _unpacked(qzeros, self._bits)
            zeros = (zeros + 1) % 2**self._bits if self._format == "gptq" else zeros
        else:
            q, zeros = (_reordered(_unpacked(packed, self._bits)) for packed in (qweight, qzeros))
        size = int(self.settings.get("group_size") or self.settings.get("q_group_size") or -1)
        rows = torch.arange(len(q)) // (size if size > 0 else len(q))
        group = rows if g_idx is None else g_idx.long()
        return (scales.float()[group] * (q - zeros[group])).T.contiguous()

    @property
    def _bits(self) -> int:
        return int(self.settings.get("bits") or self.settings.get("w_bit") or 4)

    @property
    def _format(self) -> str:
        """The layout of packed integers."""
        own = self.settings
        named = own.get("version") if self.method == "awq" else own.get("checkpoint_format") or own.get("format")
        return str(named or {"awq": "gemm"}.get(self.method, "gptq")).lower()

    @property
    def _is_unpackable(self) -> bool:
        if self.settings.get("dynamic"):  # other bits for some modules
            return False
        if self.method == "awq":
            return (self._format, self._bits) == ("gemm", 4)
        return self.method == "gptq" and self._format in ("gptq", "gptq_v2") and self._bits in (2, 4, 8)

    @property
    def _is_weight_only(self) -> bool:
        return self.method == "torchao" and "WeightOnly" in json.dumps(self.settings.get("quant_type"), default=repr)

    @property
    def _described(self) -> str:
        if not self.is_unpacked_here:
            return self.method
        return f"{self.method} ({self._bits} bits, {self._format}{', dynamic' if self.settings.get('dynamic') else ''})"


_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """The integers in a matrix of 32-bit integers, lowest bits first: ``[n, m]`` to ``[n, m · 32 / bits]``."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    found: Tensor = (packed[..., None] >> shifts) & (2**bits - 1)
    return found.flatten(-2)


def _reordered(columns: Tensor) -> Tensor:
    """Columns of AWQ in their order, ``[n, m]``."""
    eights: Tensor = columns.view(len(columns), -1, len(_AWQ_ORDER))
    return eights[..., list(_AWQ_ORDER)].flatten(-2)
