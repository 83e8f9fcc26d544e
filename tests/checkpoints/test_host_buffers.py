"""Copies of checkpoints in host memory, and the thread that makes and writes them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_sft.checkpoints import background
from lightning_sft.checkpoints.background import BackgroundWriter, HostBuffers

Make = Callable[..., Trainer]


def test_a_copy_has_all_kinds_of_tensors_and_what_they_share(quiet_trainer: Make) -> None:
    quantized = pytest.importorskip("torchao.optim.subclass_8bit").OptimState8bit.zeros((256, 256))
    quantized.copy_(torch.linspace(-1, 1, 256).expand(256, 256))
    kept, tied, counts = quantized.dequantize(), torch.ones(4, 4), [1]
    writer, copies = BackgroundWriter(quiet_trainer().strategy), list[dict[str, Any]]()
    for settled in ([], [tied, quantized]):
        tied.fill_(1)
        quantized.copy_(kept)
        writer.begin(
            Path("a"),
            {"a": tied, "b": {"c": tied[:2]}, "state": [quantized], "counts": counts[:]},
            copies.append,
            settled,
        )
        writer.wait_for_copy()
        tied.mul_(2)
        quantized.copy_(torch.zeros(256, 256))
        assert writer.wait() is None
        a, b = copies[-1]["a"], copies[-1]["b"]["c"]
        assert a.eq(1).all()
        assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        assert torch.equal(copies[-1]["state"][0].dequantize(), kept)
        assert copies[-1]["counts"] == [1]
    assert copies[0]["a"].data_ptr() == copies[1]["a"].data_ptr(), "its buffers are used again"
    writer.close()


def test_a_copy_of_a_sharded_tensor_is_sharded_alike(quiet_trainer: Make) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        writer, copies = BackgroundWriter(quiet_trainer().strategy), list[dict[str, Any]]()
        shards = distribute_tensor(torch.ones(4, 2), init_device_mesh("cpu", (1,)), [Shard(0)])
        for settled in ([], [shards]):
            writer.begin(Path("a"), {"a": shards}, copies.append, settled)
            assert writer.wait() is None
        for copy in (copy["a"] for copy in copies):
            assert (copy.device_mesh, copy.placements) == (shards.device_mesh, shards.placements)
            assert torch.equal(copy.to_local(), shards.to_local())
            assert copy.to_local().data_ptr() != shards.to_local().data_ptr()
        writer.close()
    finally:
        torch.distributed.destroy_process_group()


def test_buffers_of_what_is_no_longer_there_are_freed_before_others_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is copied may be somewhere else each time: weights of a schedule-free optimizer are."""
    buffers, left = HostBuffers(torch.device("cpu")), list[bool]()
    before, after = torch.ones(4), torch.ones(4)
    before_copied = weakref.ref(buffers.begin([before], [])[0].untyped_storage())
    make = HostBuffers._buffer
    monkeypatch.setattr(
        HostBuffers, "_buffer", lambda self, *args: (left.append(before_copied() is not None), make(self, *args))[1]
    )
    buffers.begin([after], [])
    assert left == [False]


def test_the_thread_is_on_the_gpu_of_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads begin on the first one, where torch's writer of shards would use memory for each process."""
    found = list[tuple[str, Any]]()
    monkeypatch.setattr(background, "HostBuffers", lambda device: HostBuffers(torch.device("cpu")))
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: found.append((threading.current_thread().name, device))
    )
    writer = BackgroundWriter(SingleDeviceStrategy("cuda:1"))
    writer.begin(Path("a"), {}, lambda copy: None)
    assert writer.wait() is None
    writer.close()
    assert found == [("checkpoint_0", torch.device("cuda:1"))]
