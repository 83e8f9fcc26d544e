"""Predicted memory of a fit on each device, by phase."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lightning_sft.commands.plan.allocator import footprint
from lightning_sft.commands.plan.device import Device
from lightning_sft.commands.plan.layout import Layout
from lightning_sft.commands.plan.meter import KINDS
from lightning_sft.commands.plan.rehearsal import FORWARD, Rehearsal, rehearse
from lightning_sft.model.pretrained import load_architecture
from lightning_sft.module import SFTModule
from lightning_sft.types import Batch

LOADING = "loading"


@dataclass(frozen=True)
class Prediction:
    """Predicted memory of each device, in bytes.

    Args:
        layout: Strategy and precision.
        device: Device that the fit runs on.
        moments: Bytes by kind at the peak of each phase.
        holes: Bytes that the allocator holds beyond those in use.
        rehearsal: Counts of the rehearsed steps.
    """

    layout: Layout
    device: Device
    moments: dict[str, dict[str, float]]
    holes: float
    rehearsal: Rehearsal

    @property
    def peak(self) -> float:
        """Peak bytes over all phases, including what is used before the model is loaded."""
        trained = max(sum(parts.values()) for name, parts in self.moments.items() if name != LOADING)
        return self.device.base + max(trained + self.holes, sum(self.moments[LOADING].values()))

    @property
    def host(self) -> float:
        """Bytes of host memory that a process uses for its GPU: shards that are offloaded, and inputs of layers."""
        if self.device.name == "CPU":
            return 0.0
        shares = self.layout.offloaded | {"host": 1.0}
        peaks = self.rehearsal.meter.peaks.values()
        held = map(self.rehearsal.held, peaks)
        return max(sum(shares.get(kind, 0.0) * size for kind, size in live.items()) for live in held)

    @property
    def fits(self) -> bool:
        """Whether the peak fits the device; true if its capacity is unknown."""
        return self.device.capacity is None or self.peak <= self.device.capacity

    def as_dict(self) -> dict[str, Any]:
        """The prediction as plain values, for JSON."""
        rehearsal = self.rehearsal
        return {
            "strategy": self.layout.name,
            "device": self.device.name,
            "parameters": rehearsal.num_parameters,
            "trained_parameters": rehearsal.sizes.trained,
            "adapter_parameters": rehearsal.num_adapters,
            "quantized_parameters": rehearsal.num_quantized,
            "bytes": {
                "base": self.device.base,
                "moments": self.moments,
                "holes": self.holes,
                "logits": rehearsal.logits,
                "peak": self.peak,
                "host": self.host,
                "capacity": self.device.capacity,
            },
            "fits": self.fits,
        }


def predict(
    module: SFTModule, batch: Batch, layout: Layout, device: Device, accumulate: int = 1, compiles: bool = False
) -> Prediction:
    """Rehearse two steps and predict their memory.

    Args:
        module: The configured :class:`~lightning_sft.module.SFTModule`.
        batch: Largest micro-batch of the epoch.
        layout: Strategy and precision.
        device: Device that the fit runs on.
        accumulate: Number of micro-batches per step.
        compiles: Whether layers are compiled.
    """
    memory = (device.capacity or 0.0) if device.name == "GPU" else None
    done = rehearse(module, batch, layout, accumulate, memory, compiles)
    meter, extra = done.meter, layout.extra(done.sizes)
    moments = {LOADING: _loading(module, done, layout, device)}
    for name, live in meter.peaks.items():
        parts = {kind: meter.shares[kind] * size for kind, size in done.held(live).items() if kind in KINDS}
        moments[name] = parts | extra | ({"an unpacked matrix": float(done.unpacked)} if done.unpacked else {})
    holes = 0.0
    if device.name == "CPU":
        in_use = max(meter.total(live) for live in meter.peaks.values())
        holes = max(0.0, (footprint(meter.events(), layout.mallopt) or in_use) - in_use)
    return Prediction(layout, device, moments, holes, done)


def _loading(module: SFTModule, done: Rehearsal, layout: Layout, device: Device) -> dict[str, float]:
    """Memory while loading: every process loads all weights; on CPUs, with the mapped file if its dtype differs.

    With GPUs, weights that will be sharded are whole only in host memory.
    """
    counted = done.held(done.meter.peaks[FORWARD])["weights"]
    if device.name == "GPU":
        return {"weights": layout.shares["weights"] * counted}
    whole = counted * layout.wider
    stored = getattr(torch, str((module.hf_config or load_architecture(module.pretrained)).get("dtype")), None)
    if module.hf_config is not None or stored in (None, layout.dtype):
        return {"weights": whole}
    return {"weights": whole, "file of the weights": float(done.num_parameters * stored.itemsize)}
