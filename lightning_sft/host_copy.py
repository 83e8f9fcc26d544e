"""Figures on their way from the device to the host, without a wait for what the device has been given to do since."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """Copies a small tensor to the host as soon as the device has computed it.

    The copy is queued at once, behind what the tensor depends on. :meth:`wait` returns when it has arrived, while the
    device works through what was queued later: of a training step, its backward pass. A plain ``tensor.cpu()`` at that
    point would wait for all of it, and leave the device idle until the next kernels are launched.

    Args:
        tensor: On any device.

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
