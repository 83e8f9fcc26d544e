"""Asynchronous copies between host and device that do not wait for unrelated work on the device."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """Copies a small tensor to the host as soon as the device has computed it.

    The copy is queued at once, right after the operations that the tensor depends on. :meth:`wait` returns when it has
    arrived, while the device executes work queued later, such as the backward pass. A plain ``tensor.cpu()`` at that
    point would wait for all of it, and leave the device idle until the next kernels are launched.

    Args:
        tensor: Tensor on any device.

    >>> HostCopy(torch.tensor([1.0, 2.0])).wait().tolist()
    [1.0, 2.0]
    """

    def __init__(self, tensor: Tensor) -> None:
        tensor = tensor.detach()
        self._arrived = None
        if tensor.device.type == "cuda":
            self._value = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            self._value.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensor.device))
        else:
            self._value = tensor.cpu()

    def wait(self) -> Tensor:
        """The values, on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._value


def without_waiting(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU on a device; to CUDA from page-locked memory, so that the host does not wait for the copy."""
    is_real = type(tensor) is Tensor and torch.cuda.is_available()  # shapes alone have no memory
    if is_real and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
