"""The strategy ``fsdp2``: Lightning's ModelParallelStrategy with all devices data-parallel by default."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import torch
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

from lightning_sft.checkpoints.reading import INDEX, META, check_index, first_failure, tensors_alone
from lightning_sft.checkpoints.writing import write_shards
from lightning_sft.io.address import Address, place
from lightning_sft.io.arguments import Count, check_arguments
from lightning_sft.model.parallel.context import Context
from lightning_sft.model.parallel.sharding import DtypeName
from lightning_sft.types import InputError


class FSDP2Strategy(ModelParallelStrategy):
    """Shards parameters, gradients and optimizer states over all devices (FSDP2), optionally with tensor parallelism.

    Args:
        data_parallel_size: Number of data-parallel ranks. Defaults to all devices divided by ``tensor_parallel_size``.
        tensor_parallel_size: Number of devices that each matrix is sharded over.
        context_parallel_size: Number of devices that the tokens of each row are split over, for long documents: these
            devices get the same batches. It divides ``data_parallel_size``, since parameters are sharded over them too.
        compute_dtype: Dtype of the forward and backward pass; shards, optimizer states and reductions stay in the
            dtype of ``trainer.precision``. Defaults to bfloat16 with ``trainer.precision=bf16-mixed``.
        cpu_offload: Whether to keep shards and optimizer states in host memory.
        save_distributed_checkpoint: Whether each rank writes its shard into a folder, instead of rank 0 a single file.
        kwargs: Further arguments of Lightning's ``ModelParallelStrategy``.
    """

    def __init__(
        self,
        data_parallel_size: Count | Literal["auto"] = "auto",
        tensor_parallel_size: Count = 1,
        compute_dtype: DtypeName | None = None,
        cpu_offload: bool = False,
        save_distributed_checkpoint: bool = True,
        context_parallel_size: Count = 1,
        **kwargs: Any,
    ) -> None:
        check_arguments(FSDP2Strategy, locals())
        super().__init__(data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, **kwargs)
        self.compute_dtype, self.cpu_offload = compute_dtype, cpu_offload
        self.context_parallel_size = context_parallel_size
        self.context: Context | None = None  # the ranks that this one shares rows with

    def setup_environment(self) -> None:
        """Use all devices left over by tensor parallelism for data parallelism; Lightning's default is the reverse."""
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes // int(self._tensor_parallel_size)
        context, data = self.context_parallel_size, int(self._data_parallel_size)
        if data % context:
            raise InputError(
                f"trainer.strategy.context_parallel_size={context} does not divide the {data} data-parallel devices. "
                "Choose a divisor of them."
            )
        uses_host = self.cpu_offload or context > 1  # to sum the norm of offloaded gradients, or to probe a model
        if uses_host and self.root_device.type == "cuda" and self._process_group_backend is None:
            self._process_group_backend = "cpu:gloo,cuda:nccl"
        super().setup_environment()
        if context > 1:
            tensor = int(self._tensor_parallel_size)
            shape, names = (data // context, context, tensor), ("data", "context", "tensor")
            mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
            self.context = Context.of(mesh["context"], tensor)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which share of the batches a rank gets: those that share rows, or matrices, get the same."""
        assert self.device_mesh is not None
        mesh, context = self.device_mesh["data_parallel"], self.context_parallel_size
        return {"num_replicas": mesh.size() // context, "rank": mesh.get_local_rank() // context}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint; from a folder, only tensors and plain values, since torch would unpickle anything in it.

        With ``weights_only=False`` other objects are unpickled too, as in Lightning; the index is always checked.

        Raises:
            InputError: When it is a file at an address, or an index that could run code; or when shards cannot be read,
                or are those of another model.
        """
        from torch.distributed.checkpoint.api import CheckpointException

        path = place(checkpoint_path)
        is_folder = (path / INDEX).is_file()
        if is_folder:
            check_index(path)
        try:
            with tensors_alone() if is_folder and weights_only is not False else nullcontext():
                if not isinstance(path, Address):
                    return super().load_checkpoint(checkpoint_path, weights_only)
                if not is_folder:
                    raise InputError(f"{path} is not the folder of a complete checkpoint. Copy a file to a local disk.")
                return self._load_shards(path)
        except CheckpointException as error:
            raise InputError(f"{path} cannot be loaded: {first_failure(error)}") from error

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The model's state; its shards stay on their devices, from which they are written or copied."""
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        assert self.model is not None
        if self._save_distributed_checkpoint:
            return get_model_state_dict(self.model)
        return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of an optimizer; its shards stay on their devices."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        if not self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        assert self.model is not None
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return get_optimizer_state_dict(self.model, inner)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save a checkpoint; in shards also to an address."""
        if self._save_distributed_checkpoint and storage_options is None:
            write_shards(checkpoint, place(self.broadcast(filepath)))
        else:
            super().save_checkpoint(checkpoint, filepath, storage_options)

    def _load_shards(self, folder: Address) -> dict[str, Any]:
        """Load the shards of this rank from an address, as Lightning does from a local folder."""
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_model_state_dict,
            get_optimizer_state_dict,
            set_optimizer_state_dict,
        )
        from torch.distributed.checkpoint.state_dict_loader import load

        assert self.model is not None
        state: dict[str, Any] = {"state_dict": get_model_state_dict(self.model)}
        load(state, checkpoint_id=str(folder))
        self.model.load_state_dict(state["state_dict"])
        for number, optimizer in enumerate(self.optimizers):
            name = f"optimizer_{number}"
            state = {name: get_optimizer_state_dict(self.model, optimizer)}
            load(state, checkpoint_id=str(folder))
            options = StateDictOptions(cpu_offload=True)
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=state[name], options=options)
        with (folder / META).open() as file:
            rest: dict[str, Any] = torch.load(file, weights_only=True)
        return rest

    def model_to_device(self) -> None:
        """Move the modules that are not sharded; shards are already in place, possibly in host memory."""
        from torch.distributed.tensor import DTensor

        assert self.model is not None
        for child in self.model.children():
            if not any(isinstance(parameter, DTensor) for parameter in child.parameters()):
                child.to(self.root_device)
        _update_properties(self.model, device=self.root_device)  # the device of batches and of logged values


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2: parameters and optimizer sharded over devices")


def layout(strategy: Strategy) -> tuple[DtypeName | None, bool]:
    """Compute dtype and CPU offload of an FSDP2 strategy; ``(None, False)`` for any other strategy.

    Under ``bf16-mixed`` parameters are gathered in bfloat16, so that autocast does not cast them: it would
    keep copies of all of them until the backward pass.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return None, False
    mixed: DtypeName | None = "bfloat16" if strategy.precision_plugin.precision == "bf16-mixed" else None
    own = strategy if isinstance(strategy, FSDP2Strategy) else None
    return (own and own.compute_dtype) or mixed, bool(own and own.cpu_offload)
