"""Sharding of a model over devices: tensor parallelism and FSDP2 of torch, on the meshes of Lightning's strategy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_sft.machine.contexts import blocks
from lightning_sft.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DtypeName = Literal["bfloat16", "float32"]  # float16 would need its loss scaled


@dataclass(frozen=True)
class Sharding:
    """How a model is laid out on a mesh of ``("data_parallel", "tensor_parallel")``.

    Args:
        mesh: The devices.
        compute_dtype: Dtype of the forward and backward pass; the shards, and the sums over ranks, keep their own.
        cpu_offload: Whether shards, gradients and optimizer live in the host's memory between their uses.
    """

    mesh: DeviceMesh
    compute_dtype: DtypeName | None = None
    cpu_offload: bool = False

    def apply(self, root: nn.Module, model: PreTrainedModel) -> None:
        """Shard in place: first the matrices of a layer over tensor-parallel ranks, then all of it over the others.

        Args:
            root: What is called, with the model in it: its parameters outside of layers are gathered on its call.
            model: The model of transformers, on any device.

        Raises:
            InputError: When transformers has no tensor-parallel plan for it, or one that is not of plain matrices.
        """
        if self.mesh["tensor_parallel"].size() > 1:
            _parallelize(model, self.mesh["tensor_parallel"])
        self._fully_shard(root, model)

    def _fully_shard(self, root: nn.Module, model: PreTrainedModel) -> None:
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        settings: dict[str, Any] = {"mesh": self.mesh["data_parallel"]}
        if self.compute_dtype is not None:
            dtype = getattr(torch, self.compute_dtype)
            settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        if self.cpu_offload:
            settings["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
        for layer in layers(model):
            fully_shard(layer, **settings)
        fully_shard(root, **settings)


def layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers of a transformers model: the modules of which it says that they must not be split.

    Raises:
        InputError: When it does not say so.
    """
    found = blocks(model)
    if not found:
        raise InputError(
            f"{type(model).__name__} does not say which modules are its layers; they cannot be told apart."
        )
    return found


def _parallelize(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    plan: dict[str, str] = getattr(model.config.get_text_config(), "base_model_tp_plan", None) or {}
    if not plan or not set(plan.values()) <= styles.keys():
        given = f"needs {sorted(set(plan.values()) - styles.keys())}" if plan else "transformers has no plan"
        raise InputError(
            f"{type(model).__name__} cannot be split over tensor-parallel ranks: {given}; matrices can be split by "
            "columns and rows. Set trainer.strategy.tensor_parallel_size=1, or use trainer.strategy=fsdp2."
        )
    heads = {name: getattr(model.config.get_text_config(), name, None) for name in _HEADS}
    if odd := {name: count for name, count in heads.items() if count and count % mesh.size()}:
        raise InputError(
            f"trainer.strategy.tensor_parallel_size={mesh.size()} does not divide the model's {odd}. Choose a divisor."
        )
    parallelize_module(model.base_model, mesh, {pattern: styles[style]() for pattern, style in plan.items()})


_HEADS = ("num_attention_heads", "num_key_value_heads")
