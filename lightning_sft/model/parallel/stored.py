"""Tensors in safetensors files: the rows that a rank asks for are read straight into their memory.

Slices of the package safetensors read the whole tensor first and copy a part of it, or map the file, whose pages count
as the process's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers.modeling_utils import str_to_torch_dtype

from lightning_sft.types import InputError


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, to be indexed; transformers reads weights and their slices from such objects.

    Args:
        path: Path of the file.
        begin: Number of the first byte of the tensor in the file.
        shape: Shape of the whole tensor.
        dtype: Dtype that it is stored in.
    """

    path: str
    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def get_shape(self) -> list[int]:
        """The shape, by the name that the package safetensors gives it."""
        return list(self.shape)

    def __getitem__(self, index: Any) -> Tensor:
        """A part on the CPU, in memory of its own; only the rows that it has entries of are read."""
        first, *others = index if isinstance(index, tuple) else (index,)
        if isinstance(first, slice) and first.step in (None, 1):
            begin, end, _ = first.indices(self.shape[0])
            rows = self._rows(begin, max(begin, end))
            part = rows[(slice(None), *others)]
        else:
            rows = self._rows(0, self.shape[0] if self.shape else 1)
            part = rows[index]
        return part.clone() if part.numel() < rows.numel() else part

    def _rows(self, begin: int, end: int) -> Tensor:
        rows = torch.empty((end - begin, *self.shape[1:]) if self.shape else (), dtype=self.dtype)
        left = memoryview(cast(Any, rows.view(-1).view(torch.uint8).numpy()))
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.begin + begin * self.dtype.itemsize * math.prod(self.shape[1:]))
            while left:
                if not (count := file.readinto(left)):
                    raise InputError(f"{self.path} is incomplete. Download or copy it again.")
                left = left[count:]
        return rows


def stored_tensors(paths: Iterable[str]) -> dict[str, StoredTensor]:
    """The tensors of files by their names; nothing but the headers is read.

    Args:
        paths: Safetensors files.

    Raises:
        InputError: When a dtype is not one of torch's.
    """
    found = {}
    for path in paths:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in str_to_torch_dtype:
                raise InputError(f"{name} in {path} is stored as {entry['dtype']}, which torch does not have.")
            dtype, begin = str_to_torch_dtype[entry["dtype"]], 8 + size + entry["data_offsets"][0]
            found[name] = StoredTensor(path, begin, tuple(entry["shape"]), dtype)
    return found
