"""Distribution of a model over devices, by the strategy in the trainer's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lightning_sft.machine.allocators import KEEPS, is_set
from lightning_sft.types import InputError

_DTYPES = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32, "64": torch.float64}
_BUCKET = 200_000_000  # elements, Lightning's setting for DeepSpeed


@dataclass(frozen=True)
class Model:
    """Sizes of a model, in parameters.

    Args:
        layer: Parameters of the largest layer.
        others: Parameters outside of layers: embeddings, head, last norm.
        trained: Trained parameters.
        trained_layer: Trained parameters of the largest layer.
        packed: Bytes that the largest layer takes less where its matrices are quantized.
    """

    layer: int
    others: int
    trained: int
    trained_layer: int
    packed: float = 0.0


@dataclass(frozen=True)
class Layout:
    """A strategy and a precision.

    Args:
        name: Display name of the strategy.
        dtype: Dtype of the parameters.
        autocast: Dtype of autocast, or ``None``.
        data_parallel: Number of data-parallel ranks.
        tensor_parallel: Number of tensor-parallel ranks.
        context_parallel: Number of ranks, among the data-parallel ones, that share the tokens of each row.
        stage: ZeRO stage: 0 shards nothing, 1 the optimizer state, 2 also gradients, 3 also parameters.
        compute: Dtype of computation if it differs from ``dtype``, or ``None``.
        is_deepspeed: Whether DeepSpeed is used, with its float32 copy of trained parameters and its buckets.
        offloads: What is offloaded to host memory: ``optimizer``, ``all``, or an empty string.
        in_backward: Whether the optimizer steps in the backward pass.
        keeps_memory: Whether the allocator retains freed memory on CPUs.
    """

    name: str
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    data_parallel: int = 1
    tensor_parallel: int = 1
    context_parallel: int = 1
    stage: int = 0
    compute: torch.dtype | None = None
    is_deepspeed: bool = False
    offloads: str = ""
    in_backward: bool = False
    keeps_memory: bool = True

    @classmethod
    def of(cls, settings: Any, num_devices: int) -> Layout:
        """The layout of a trainer's settings.

        Args:
            settings: Arguments of the trainer, as attributes.
            num_devices: Number of devices over all nodes.

        Raises:
            InputError: When the strategy or the precision is not supported.
        """
        dtype, autocast = _precision(settings.precision)
        name, own = _named(settings.strategy)
        plain: dict[str, Any] = {"dtype": dtype, "autocast": autocast, "data_parallel": num_devices}
        callbacks = dict(map(_named, _listed(settings)))
        plain["in_backward"] = "optimizerinbackward" in callbacks
        plain["keeps_memory"] = callbacks.get("keepmemory", {}).get("enabled", True)  # fit adds it
        if "deepspeed" in name:
            stage = int(own.get("stage") or next((c for c in name if c.isdigit()), 2))
            offloads = "all" if own.get("offload_parameters") or (stage == 3 and "offload" in name) else ""
            if not offloads and (own.get("offload_optimizer") or "offload" in name):
                offloads = "optimizer"
            plain |= {"stage": stage, "is_deepspeed": True, "dtype": autocast or dtype, "autocast": None}
            return cls(f"DeepSpeed ZeRO-{stage}", **plain, offloads=offloads)
        if name in ("fsdp2", "fsdp2strategy", "modelparallelstrategy"):
            tensor = int(own.get("tensor_parallel_size") or 1)
            if name == "modelparallelstrategy" and own.get("tensor_parallel_size") in (None, "auto"):
                raise InputError("plan does not support Lightning's ModelParallelStrategy. Set trainer.strategy=fsdp2.")
            data, context = num_devices // tensor, int(own.get("context_parallel_size") or 1)
            if not data or data % context:
                raise InputError(
                    f"{num_devices} devices cannot be divided by tensor_parallel_size={tensor} and "
                    f"context_parallel_size={context} of trainer.strategy. Set trainer.devices to a multiple of "
                    f"{tensor * context}."
                )
            plain |= {"data_parallel": data, "tensor_parallel": tensor, "context_parallel": context, "stage": 3}
            compute = own.get("compute_dtype")
            mixed = autocast if autocast == torch.bfloat16 else None
            plain |= {"compute": getattr(torch, compute) if compute else mixed}
            splits = {"tensor": tensor, "context": context}
            mesh = [f"FSDP2 over {data}", *(f"{kind}-parallel over {n}" for kind, n in splits.items() if n > 1)]
            return cls(", ".join(mesh), **plain, offloads="all" if own.get("cpu_offload") else "")
        if name.startswith("ddp"):
            return cls(f"DDP over {num_devices}", **plain)
        if name in ("auto", "single_device", "singledevicestrategy"):
            return cls(f"DDP over {num_devices}" if num_devices > 1 else "one device", **plain)
        raise InputError(
            f"plan does not support trainer.strategy={name!r}, only auto, ddp, fsdp2 and deepspeed_stage_1, _2 and _3."
        )

    @property
    def computes_in(self) -> torch.dtype:
        """Dtype of parameters during computation."""
        return self.compute or self.dtype

    @property
    def wider(self) -> float:
        """How many times as wide parameters are as during computation."""
        return self.dtype.itemsize / self.computes_in.itemsize

    @property
    def mallopt(self) -> Mapping[int, int]:
        """Arguments of ``mallopt`` that the fit sets."""
        return KEEPS if self.keeps_memory and not is_set() else {}

    @property
    def num_batches(self) -> int:
        """Number of different batches at a time: ranks that share rows, or matrices, get the same."""
        return self.data_parallel // self.context_parallel

    @property
    def shares(self) -> dict[str, float]:
        """Share of each kind of memory that a device keeps, relative to one device in the dtype of computation."""
        return {kind: 0.0 if kind in self.offloaded else share for kind, share in self._of_ranks.items()}

    @property
    def offloaded(self) -> dict[str, float]:
        """Share of each kind of memory that a rank keeps in host memory."""
        kinds = {"": (), "optimizer": ("optimizer",), "all": tuple(self._of_ranks)}[self.offloads]
        return {kind: self._of_ranks[kind] for kind in kinds}

    @property
    def _of_ranks(self) -> dict[str, float]:
        wider = self.wider
        shared = [1, 1 / self.data_parallel]
        return {
            "weights": wider * shared[self.stage >= 3],
            "gradients": wider * shared[self.stage >= 2],
            "optimizer": (4 / self.dtype.itemsize if self.is_deepspeed else wider) * shared[self.stage >= 1],
        }

    def extra(self, model: Model) -> dict[str, float]:
        """Bytes that the strategy itself uses on each device, by purpose."""
        if self.is_deepspeed:
            copy = 0.0 if self.offloads else 4 * model.trained / self.data_parallel
            extra = {"float32 copy of what is trained": copy}
            extra |= {"buckets of gradients": 2.0 * min(_BUCKET, model.trained) * self.dtype.itemsize}
            return extra | (self._gathered(model) if self.stage >= 3 else {})
        if self.stage >= 3:
            reduced = model.trained_layer * (self.computes_in.itemsize + 4)
            return self._gathered(model) | {"gradients of a layer, being reduced": float(reduced)}
        if self.name.startswith("DDP"):
            return {"buckets of gradients": float(model.trained * self.dtype.itemsize)}
        return {}

    def _gathered(self, model: Model) -> dict[str, float]:
        """Gathered parameters: the current layer, the next one, and those outside of layers."""
        counted = (2 * model.layer + model.others) * self.computes_in.itemsize
        return {"gathered parameters": counted - 2 * model.packed}


def _precision(given: Any) -> tuple[torch.dtype, torch.dtype | None]:
    width, _, how = str(given or "32-true").partition("-")
    if width not in _DTYPES or how not in ("", "true", "mixed"):
        raise InputError(f"plan does not support trainer.precision={given!r}, only 32-true, bf16-mixed, bf16-true, ...")
    mixes = how == "mixed" or (how == "" and width in ("16", "bf16"))
    return (torch.float32, _DTYPES[width]) if mixes else (_DTYPES[width], None)


def _listed(settings: Any) -> list[Any]:
    callbacks = getattr(settings, "callbacks", None) or []
    return callbacks if isinstance(callbacks, list) else [callbacks]


def _named(strategy: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(strategy, str):
        return strategy.rpartition(".")[2].lower(), {}
    path, own = strategy["class_path"], strategy.get("init_args") or {}
    return path.rpartition(".")[2].lower(), own if isinstance(own, Mapping) else vars(own)
