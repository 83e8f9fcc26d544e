"""Work that one rank does for all: whole weights gathered on it, and the others waiting for its result or its error."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lightning_sft.model.parallel.sharding import gathered
from lightning_sft.types import InputError

T = TypeVar("T")


class FirstRank:
    """Runs work on rank 0; every rank has to call it, and gets what it returned, or the error that it raised.

    The others wait in a process group of their own, on the CPU: writing a large model may take longer than collectives
    on a device are given. Without processes, the work is simply done.

    >>> FirstRank()(lambda: 1 + 1)
    2
    """

    def __init__(self) -> None:
        dist = torch.distributed
        self.group: Any = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        self.is_here = self.group is None or dist.get_rank() == 0

    def __call__(self, work: Callable[[], T]) -> T:
        """The result of the work.

        Raises:
            InputError: On every rank, where the work raised it.
            RuntimeError: On other ranks, where the work raised anything else.
        """
        result, error = self.tried(work)
        if error is not None:
            raise error
        return cast(T, result)

    def tried(self, work: Callable[[], T]) -> tuple[T | None, Exception | None]:
        """The result of the work, and the error that it raised: no rank goes on as if nothing were wrong."""
        outcome: list[Any] = [None, None, False]  # result, error in words, whether it is one of the user's making
        raised: Exception | None = None
        if self.is_here:
            try:
                outcome[0] = work()
            except Exception as error:
                raised, outcome[1:] = error, [f"{type(error).__name__}: {error}", isinstance(error, InputError)]
        if self.group is not None:
            torch.distributed.broadcast_object_list(outcome, src=0, group=self.group)
        result, message, is_of_user = outcome
        if message is not None and raised is None:
            text = f"Rank 0 failed, for which this rank was waiting. {message}"
            raised = InputError(text) if is_of_user else RuntimeError(text)
        return result, raised


def whole_state(module: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Copies of all weights and buffers of a module on the CPU, whole, one after the other, however they are sharded.

    Args:
        module: The module; every rank has to call this.
        keep: Whether this rank wants them; else they are gathered, and nothing is returned.
    """
    found = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            continue
        with gathered([value] if isinstance(value, nn.Parameter) else []):
            whole: Any = value.detach()
            if hasattr(whole, "full_tensor"):  # on its device, also where it is offloaded to the host
                whole = whole.to(whole.device_mesh.device_type).full_tensor()
            if keep:
                found[name] = whole.to("cpu", copy=True)
    return found
