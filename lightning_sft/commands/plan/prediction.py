"""What a fit takes of each device, moment by moment."""

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
    """What each device needs, in bytes.

    Args:
        layout: Strategy and precision.
        device: What it runs on.
        moments: At the peak of each moment, how much of what is there.
        holes: What the allocator holds beyond what is in use.
        rehearsal: What has been counted.
    """

    layout: Layout
    device: Device
    moments: dict[str, dict[str, float]]
    holes: float
    rehearsal: Rehearsal

    @property
    def peak(self) -> float:
        """The most at any moment, with what is taken before."""
        trained = max(sum(parts.values()) for name, parts in self.moments.items() if name != LOADING)
        return self.device.base + max(trained + self.holes, sum(self.moments[LOADING].values()))

    @property
    def fits(self) -> bool:
        """Whether a device has as much; also where nobody knows what it has."""
        return self.device.capacity is None or self.peak <= self.device.capacity

    def as_dict(self) -> dict[str, Any]:
        """For machines to read."""
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
                "capacity": self.device.capacity,
            },
            "fits": self.fits,
        }


def predict(
    module: SFTModule, batch: Batch, layout: Layout, device: Device, accumulate: int = 1, compiles: bool = False
) -> Prediction:
    """Rehearse two steps, and say what they take.

    Args:
        module: The :class:`~lightning_sft.module.SFTModule`, as configured.
        batch: The largest micro-batch.
        layout: Strategy and precision.
        device: What it runs on.
        accumulate: Micro-batches in a step.
        compiles: Whether layers are compiled.
    """
    memory = (device.capacity or 0.0) if device.name == "GPU" else None
    done = rehearse(module, batch, layout, accumulate, memory, compiles)
    meter, extra = done.meter, layout.extra(done.sizes)
    moments = {LOADING: _loading(module, done, layout, device)}
    for name, live in meter.peaks.items():
        parts = {kind: meter.shares[kind] * live[kind] for kind in KINDS}
        parts["weights"] -= done.saved
        moments[name] = parts | extra | ({"an unpacked matrix": float(done.unpacked)} if done.unpacked else {})
    holes = 0.0
    if device.name == "CPU":
        in_use = max(meter.total(live) for live in meter.peaks.values())
        holes = max(0.0, (footprint(meter.events(), layout.mallopt) or in_use) - in_use)
    return Prediction(layout, device, moments, holes, done)


def _loading(module: SFTModule, done: Rehearsal, layout: Layout, device: Device) -> dict[str, float]:
    """Every process loads all weights; on a CPU, with the file of another dtype mapped beside them.

    With GPUs, sharded weights are whole in the host's memory only.
    """
    counted = done.meter.peaks[FORWARD]["weights"]  # a frozen base may be in another dtype than what is trained
    if device.name == "GPU":
        return {"weights": layout.shares["weights"] * counted - done.saved}
    whole = counted * layout.dtype.itemsize / layout.computes_in.itemsize - done.saved
    stored = getattr(torch, str((module.hf_config or load_architecture(module.pretrained)).get("dtype")), None)
    if module.hf_config is not None or stored in (None, layout.dtype):
        return {"weights": whole}
    return {"weights": whole, "file of the weights": float(done.num_parameters * stored.itemsize)}
