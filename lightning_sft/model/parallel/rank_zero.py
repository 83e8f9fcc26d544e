"""Work that rank 0 does for all ranks: they wait for its result or error, and unsharded weights are gathered on it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lightning_sft.model.parallel.sharding import full, gathered
from lightning_sft.types import InputError

T = TypeVar("T")


class FirstRank:
    """Runs a function on rank 0; every rank must call it, and receives the result or the error.

    The other ranks wait in a separate CPU process group, because writing a large model may exceed the timeout of
    collectives on a device. Without a process group the function is just called.

    >>> FirstRank()(lambda: 1 + 1)
    2
    """

    def __init__(self) -> None:
        dist = torch.distributed
        self.group: Any = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        self.is_here = self.group is None or dist.get_rank() == 0
        self._told: Exception | None = None  # the last error of rank 0, as this rank has it

    def __call__(self, work: Callable[[], T]) -> T:
        """The result of ``work`` on rank 0.

        Args:
            work: Function to call on rank 0; its result is pickled.

        Raises:
            InputError: On every rank, if ``work`` raised it.
            RuntimeError: On the other ranks, if ``work`` raised anything else.
        """
        result, error = self.tried(work)
        if error is not None:
            raise error
        return cast(T, result)

    def tried(self, work: Callable[[], T]) -> tuple[T | None, Exception | None]:
        """The result of ``work`` on rank 0, and the error if it raised one, on every rank."""
        outcome: list[Any] = [None, None, False]  # result, error message, whether it is an InputError
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
            text = f"Rank 0 failed while this rank waited for it. {message}"
            raised = InputError(text) if is_of_user else RuntimeError(text)
        self._told = raised
        return result, raised

    def shared(self, work: Callable[[], object]) -> Exception | None:
        """The error of ``work``, which all ranks do together, on every rank: one that rank 0 has told them.

        Args:
            work: Function that every rank calls, with the same calls of this object inside.

        Raises:
            Exception: What else ``work`` raises. Other ranks may wait for this one, until its process ends.
        """
        try:
            work()
        except Exception as error:
            if error is not self._told:
                raise
            return error
        return None


def whole_state(module: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Gather unsharded CPU copies of all weights and buffers of a module, one at a time.

    Args:
        module: Module, sharded or not; every rank must call this.
        keep: Whether to return the copies on this rank; otherwise the result is empty.
    """
    found = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            continue
        with gathered([value] if isinstance(value, nn.Parameter) else []):
            whole = full(value)
            if keep:
                found[name] = whole.to("cpu", copy=True)
    return found
