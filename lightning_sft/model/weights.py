"""Pretrained weights read from their files a few rows at a time, without a second copy of the model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from lightning_sft.model.pretrained import load_model

_PLAIN = ("F64", "F32", "F16", "BF16")  # not quantized


class PretrainedWeights:
    """Weights of a pretrained model by parameter name.

    Parameters that are not in safetensors files under transformers' names (another format, experts that are fused on
    loading) are read by loading the model a second time, and only those are kept.

    Args:
        pretrained: A hub name, a folder, or a GGUF file.
        names: Names of the parameters that will be read.

    >>> import tempfile
    >>> from lightning_sft.demos import tiny_pretrained
    >>> weights = PretrainedWeights(tiny_pretrained(tempfile.mkdtemp()), ["model.norm.weight"])
    >>> weights.shape("model.norm.weight"), weights.rows("model.norm.weight", 0, 2).tolist()
    ((16,), [1.0, 1.0])
    """

    def __init__(self, pretrained: str, names: list[str]) -> None:
        self._files: dict[str, Any] = {}
        for path in _files(pretrained):
            file: Any = safe_open(path, framework="pt")
            plain = (name for name in file.keys() if file.get_slice(name).get_dtype() in _PLAIN)  # noqa: SIM118, not a mapping
            self._files |= dict.fromkeys(plain, file)
        self._kept: dict[str, Tensor] = {}
        if missing := set(names) - self._files.keys():
            model = load_model(pretrained)
            self._kept = {name: p.detach().clone() for name, p in model.named_parameters() if name in missing}

    def __contains__(self, name: str) -> bool:
        return name in self._files or name in self._kept

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter."""
        return tuple(self._slice(name).get_shape()) if name in self._files else tuple(self._kept[name].shape)

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Rows ``begin:end`` of a parameter along its first dimension, in the dtype of the file."""
        found: Tensor = self._slice(name)[begin:end] if name in self._files else self._kept[name][begin:end]
        return found

    def _slice(self, name: str) -> Any:
        return self._files[name].get_slice(name)


def _files(pretrained: str) -> list[Path]:
    folder = Path(pretrained).expanduser()
    if not folder.exists():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            found = snapshot_download(pretrained, allow_patterns="*.safetensors", local_files_only=True)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
            return []
        folder = Path(found)
    return sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
