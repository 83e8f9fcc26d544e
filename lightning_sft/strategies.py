"""The strategy ``fsdp2``: Lightning's ModelParallelStrategy with all devices data-parallel by default."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry

from lightning_sft.checkpoints.reading import check_index, tensors_alone
from lightning_sft.io.arguments import Count, check_arguments
from lightning_sft.model.parallel.sharding import DtypeName


class FSDP2Strategy(ModelParallelStrategy):
    """Shards parameters, gradients and optimizer over all devices (FSDP2), and, if asked to, layers over some of them.

    Args:
        data_parallel_size: Devices that see different data. All of them by default, divided by the next.
        tensor_parallel_size: Devices that share each matrix.
        compute_dtype: Dtype of the forward and backward pass; shards, optimizer and sums over ranks stay in that of
            ``trainer.precision``. With ``trainer.precision=bf16-mixed`` it is bfloat16 unless it says otherwise.
        cpu_offload: Keep shards and optimizer in the host's memory.
        save_distributed_checkpoint: Whether each rank writes its own shard, into a folder, or rank 0 one whole file.
        kwargs: As in Lightning.
    """

    def __init__(
        self,
        data_parallel_size: Count | Literal["auto"] = "auto",
        tensor_parallel_size: Count = 1,
        compute_dtype: DtypeName | None = None,
        cpu_offload: bool = False,
        save_distributed_checkpoint: bool = True,
        **kwargs: Any,
    ) -> None:
        check_arguments(FSDP2Strategy, locals())
        super().__init__(data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, **kwargs)
        self.compute_dtype, self.cpu_offload = compute_dtype, cpu_offload

    def setup_environment(self) -> None:
        """Give the data all devices that tensors do not take, over all nodes: Lightning's default is the reverse."""
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes // int(self._tensor_parallel_size)
        if self.cpu_offload and self.root_device.type == "cuda" and self._process_group_backend is None:
            self._process_group_backend = "cpu:gloo,cuda:nccl"  # the norm of offloaded gradients is summed on the host
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint; of a folder, tensors and plain values alone: torch would unpickle whatever it holds.

        With ``weights_only=False`` whatever else is in it is trusted, as in Lightning; its index never is.
        """
        is_folder = (Path(checkpoint_path) / ".metadata").is_file()
        if is_folder:
            check_index(Path(checkpoint_path))
        with tensors_alone() if is_folder and weights_only is not False else nullcontext():
            return super().load_checkpoint(checkpoint_path, weights_only)

    def model_to_device(self) -> None:
        """Move what is not sharded: shards are where they belong, which may be the host's memory."""
        from torch.distributed.tensor import DTensor

        assert self.model is not None
        for child in self.model.children():
            if not any(isinstance(parameter, DTensor) for parameter in child.parameters()):
                child.to(self.root_device)
        _update_properties(self.model, device=self.root_device)  # where batches go, and what is logged


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2: parameters and optimizer sharded over devices")


def layout(strategy: Strategy) -> tuple[DtypeName | None, bool]:
    """Dtype of computation and CPU offload of a strategy that shards by FSDP2; others have neither.

    Under ``bf16-mixed`` parameters are gathered in bfloat16, so that autocast has none to cast: it would keep copies of
    all of them until the backward pass.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return None, False
    mixed: DtypeName | None = "bfloat16" if strategy.precision_plugin.precision == "bf16-mixed" else None
    own = strategy if isinstance(strategy, FSDP2Strategy) else None
    return (own and own.compute_dtype) or mixed, bool(own and own.cpu_offload)
