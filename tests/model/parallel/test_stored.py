"""What is read of safetensors files is what the package safetensors reads, and no more than is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_sft.model.parallel.stored import stored_tensors
from lightning_sft.types import InputError

MIB = 2**20
TENSORS = {
    "matrix": torch.randn(12, 6),
    "rounded": torch.randn(7, 5, 3).bfloat16(),
    "numbers": torch.arange(9),
    "flags": torch.tensor([True, False, True]),
    "nothing": torch.empty(0, 4),
    "scale": torch.tensor(2.5),
}


@pytest.fixture
def path(tmp_path: Path) -> str:
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    return str(tmp_path / "model.safetensors")


@pytest.mark.parametrize("index", [..., slice(None), slice(2, 5), slice(5, 99), slice(3, 3), (slice(1, 3), ...)])
@pytest.mark.parametrize("name", TENSORS)
def test_parts_are_those_of_the_tensor_in_memory_of_their_own(name: str, index: Any, path: str) -> None:
    if name == "scale":
        index = ...
    found = stored_tensors([path])[name]
    part = found[index]
    assert found.get_shape() == list(TENSORS[name].shape)
    assert part.dtype == TENSORS[name].dtype
    assert torch.equal(part, TENSORS[name][index])
    assert part.untyped_storage().nbytes() == part.nbytes


@pytest.mark.parametrize("index", [(slice(None), slice(1, 4)), (slice(2, 7), slice(0, 2)), slice(0, 9, 2), 3])
def test_columns_and_steps_are_read_too(index: Any, path: str) -> None:
    part = stored_tensors([path])["matrix"][index]
    assert torch.equal(part, TENSORS["matrix"][index])
    assert part.untyped_storage().nbytes() == part.nbytes


def bytes_read() -> int:
    """Those that this process has read so far, from disks or their cache."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts them")
def test_only_the_rows_that_are_asked_for_are_read(tmp_path: Path) -> None:
    """A slice of the package safetensors reads the whole tensor for them."""
    save_file({"weight": torch.randn(1024, 2048)}, tmp_path / "model.safetensors")
    stored = stored_tensors([str(tmp_path / "model.safetensors")])["weight"]
    before = bytes_read()
    assert stored[256:512].shape == (256, 2048)
    assert 2 * MIB <= bytes_read() - before < 2.1 * MIB
    with safe_open(tmp_path / "model.safetensors", framework="pt", backend="pread") as file:
        before = bytes_read()
        file.get_slice("weight")[256:512]
        assert bytes_read() - before >= 8 * MIB, "safetensors reads no more than is asked for: use its slices"


def test_a_file_that_was_cut_is_one_error(path: str) -> None:
    stored = stored_tensors([path])
    Path(path).write_bytes(Path(path).read_bytes()[:-400])
    with pytest.raises(InputError, match=r"model.safetensors is incomplete. Download or copy it again"):
        [value[...] for value in stored.values()]
