"""Sharding of a model over devices: tensor parallelism and FSDP2 of torch, on the meshes of Lightning's strategy.

And what DeepSpeed's ZeRO-3 asks of a model: there, a rank holds only a piece of each parameter from the start.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_sft.machine.contexts import blocks
from lightning_sft.model.backbone import backbone_and_head
from lightning_sft.types import InputError

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy
    from transformers import PreTrainedModel

DtypeName = Literal["bfloat16", "float32"]  # float16 would need loss scaling


@dataclass(frozen=True)
class Sharding:
    """Layout of a model on a mesh with dimensions ``("data_parallel", "tensor_parallel")``.

    Args:
        mesh: Device mesh.
        compute_dtype: Dtype of the forward and backward pass; shards keep their dtype, gradients are reduced in
            float32.
        cpu_offload: Whether to keep shards, gradients and optimizer state in host memory between uses.
    """

    mesh: DeviceMesh
    compute_dtype: DtypeName | None = None
    cpu_offload: bool = False

    @property
    def gathered_dtype(self) -> torch.dtype:
        """Dtype in which parameters of torch's default dtype are gathered."""
        dtype: torch.dtype = (
            torch.get_default_dtype() if self.compute_dtype is None else getattr(torch, self.compute_dtype)
        )
        return dtype

    def apply(
        self, root: nn.Module, model: PreTrainedModel, prepare: Callable[[nn.Module], object] = lambda part: None
    ) -> None:
        """Shard in place: first matrices over tensor-parallel ranks, then all parameters over data-parallel ranks.

        Args:
            root: Module that is called and contains the model; a call gathers its parameters outside of layers.
            model: Model of transformers, on any device.
            prepare: Function that is called with each layer before it is sharded, and with ``root`` at last.

        Raises:
            InputError: When transformers has no tensor-parallel plan for the model, or a plan that is not supported
                here, or when layers share parameters.
        """
        if self.mesh["tensor_parallel"].size() > 1:
            _parallelize(model, self.mesh["tensor_parallel"])
        self._fully_shard(root, model, prepare)

    def _fully_shard(self, root: nn.Module, model: PreTrainedModel, prepare: Callable[[nn.Module], object]) -> None:
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        settings: dict[str, Any] = {"mesh": self.mesh["data_parallel"]}
        if self.compute_dtype is not None:
            dtype = getattr(torch, self.compute_dtype)
            settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        if self.cpu_offload:
            settings["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
        for part in (*_to_shard(model), root):
            prepare(part)
            fully_shard(part, **settings)


def layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers of a transformers model, as declared by its ``_no_split_modules``.

    Raises:
        InputError: When it declares none.
    """
    found = blocks(model)
    if not found:
        raise InputError(f"{type(model).__name__} does not declare which modules are its layers (_no_split_modules).")
    return found


def _to_shard(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that are in no other one, as the mixer of a Mamba layer is.

    Raises:
        InputError: When layers share parameters.
    """
    found = layers(model)
    inner = {module for layer in found for module in layer.modules() if module is not layer}
    outer = [layer for layer in found if layer not in inner]
    owners = Counter(parameter for layer in outer for parameter in set(layer.parameters()))
    if any(count > 1 for count in owners.values()):
        raise InputError(
            f"In {type(model).__name__} layers share parameters, which FSDP2 cannot shard. Use trainer.strategy=ddp."
        )
    return outer


def _parallelize(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    plan: dict[str, str] = getattr(model.config.get_text_config(), "base_model_tp_plan", None) or {}
    if not plan or not set(plan.values()) <= styles.keys():
        given = f"needs {sorted(set(plan.values()) - styles.keys())}" if plan else "transformers has no plan"
        raise InputError(
            f"{type(model).__name__} does not support tensor parallelism: {given}; supported are splits of "
            "matrices by columns and rows. Set trainer.strategy.tensor_parallel_size=1, or use trainer.strategy=fsdp2."
        )
    heads = {name: getattr(model.config.get_text_config(), name, None) for name in _HEADS}
    if odd := {name: count for name, count in heads.items() if count and count % mesh.size()}:
        raise InputError(
            f"trainer.strategy.tensor_parallel_size={mesh.size()} does not divide the model's {odd}. Choose a divisor."
        )
    parallelize_module(backbone_and_head(model)[0], mesh, {pattern: styles[style]() for pattern, style in plan.items()})


_HEADS = ("num_attention_heads", "num_key_value_heads")


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this rank has a shard."""
    return hasattr(tensor, "full_tensor")


def check_sharded(module: nn.Module, mesh: DeviceMesh | None) -> None:
    """Refuse a module that was loaded whole, without the strategy: each rank would train a model of its own.

    Args:
        module: The module of a model that is loaded.
        mesh: Device mesh of the strategy of the trainer; ``None`` if it does not shard.

    Raises:
        InputError: When it is not sharded, and should be.
    """
    if mesh is not None and not any(map(is_sharded, module.parameters())):
        raise InputError(
            "The model was loaded before its trainer was known (configure_model, load_from_checkpoint, or another "
            "trainer), and this strategy shards it while it is loaded. Pass a new SFTModule; to begin from a "
            "checkpoint, export it (lightning-sft export) and set model.pretrained to that folder."
        )


def full(tensor: Tensor) -> Tensor:
    """A parameter as a whole, without gradient, gathered if it is sharded; every rank of its mesh calls this."""
    whole: Any = tensor.detach()
    if is_sharded(whole):  # gathered on the device, even if offloaded to the host
        whole = whole.to(whole.device_mesh.device_type).full_tensor()
    gathered: Tensor = whole
    return gathered


def entries(tensor: Tensor, places: range) -> Tensor:
    """Entries of a tensor on the CPU, by their places when it is flat; every rank of a sharded one's mesh calls this.

    Each rank gives those of its shard: the whole is not gathered.
    """
    if not is_sharded(tensor):
        return tensor.detach().flatten()[list(places)].cpu()
    from torch.distributed.tensor import DTensor, Partial, Replicate
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = tensor.detach()
    mesh, placements = sharded.device_mesh, sharded.placements
    shape, offsets = compute_local_shape_and_global_offset(sharded.shape, mesh, placements)
    where = torch.unravel_index(torch.tensor(places), sharded.shape)
    local = [at - offset for at, offset in zip(where, offsets, strict=True)]
    is_here = torch.stack([(at >= 0) & (at < size) for at, size in zip(local, shape, strict=True)]).all(0)
    own = sharded.to_local()
    found = torch.zeros(len(places), dtype=own.dtype)
    found[is_here] = own[tuple(at[is_here].to(own.device) for at in local)].cpu()
    summed = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
    whole: Tensor = DTensor.from_local(found.to(mesh.device_type), mesh, summed).full_tensor().cpu()
    return whole


def loading_config(strategy: Strategy | None) -> Any:
    """Config that makes transformers load partitioned weights while it is referenced; ``None`` without ZeRO-3."""
    if not getattr(strategy, "zero_stage_3", False):
        return None
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    return HfDeepSpeedConfig(dict(cast(Any, strategy).config))


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """Context in which parameters are gathered on every rank, for reading only."""
    pieces = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not pieces:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(pieces)
    return context


def gathered_head(head: nn.Module) -> nn.Module | Tensor:
    """The head itself or, under ZeRO-3, its weight.

    A module frees its parameters after each call, so each chunk of targets would gather the head again, and its
    backward pass would find no weight. A weight that another module's forward pass reads stays gathered until that pass
    is over, and is gathered again for its backward pass.

    Raises:
        InputError: Under ZeRO-3, when the head is not a linear layer without bias.
    """
    weight = next(head.parameters())
    if not hasattr(weight, "ds_id"):
        return head
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise InputError(
            f"Under ZeRO-3 the head must be a linear layer without bias; this model has a {type(head).__name__}. "
            "Use trainer.strategy=deepspeed_stage_2 or fsdp2."
        )
    return head.weight
