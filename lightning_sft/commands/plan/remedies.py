"""Changes of settings that reduce memory if a fit does not fit, cheapest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_sft.commands.plan.layout import Layout
from lightning_sft.commands.plan.prediction import LOADING, Prediction
from lightning_sft.commands.plan.rehearsal import LOSS
from lightning_sft.model.tuning.adapters import Lora
from lightning_sft.module import SFTModule
from lightning_sft.types import Batch

_MOST_DEVICES = 64
_LARGE = 0.1  # share of the peak
_TILE = 4096  # tokens


@dataclass(frozen=True)
class Remedy:
    """A change of settings, together with all earlier ones.

    Args:
        settings: All changed settings, as written in a config.
        prediction: Prediction with these settings.
    """

    settings: tuple[str, ...]
    prediction: Prediction


@dataclass
class _Draft:
    """Settings under trial."""

    module: SFTModule
    batch: Batch
    layout: Layout
    settings: tuple[str, ...] = ()

    def changed(self, setting: str, **attributes: Any) -> _Draft:
        module = copy(self.module)
        vars(module).update(attributes)
        return replace(self, module=module, settings=(*self.settings, setting))


def remedies(
    module: SFTModule,
    batch: Batch,
    prediction: Prediction,
    smaller: Callable[[int], Batch],
    least: int,
    try_out: Callable[[SFTModule, Batch, Layout], Prediction],
) -> Iterator[Remedy]:
    """Accumulate changes one by one until the fit fits or none is left.

    Args:
        module: Module, as configured.
        batch: Largest micro-batch of the epoch.
        prediction: Prediction that does not fit.
        smaller: Function from a maximum number of positions to the largest micro-batch within it.
        least: Number of positions of the longest sequence, the minimum for a micro-batch.
        try_out: Function that predicts the memory with other settings.
    """
    draft = _Draft(module, batch, prediction.layout)
    while not prediction.fits:
        for following in _changes(draft, prediction, smaller, least):
            found = try_out(following.module, following.batch, following.layout)
            if found.peak < prediction.peak:
                break
        else:
            return
        draft, prediction = following, found
        yield Remedy(draft.settings, prediction)


def _changes(draft: _Draft, prediction: Prediction, smaller: Callable[[int], Batch], least: int) -> Iterator[_Draft]:
    """The remaining changes, cheapest first."""
    module, layout = draft.module, draft.layout
    activations = max(parts.get("activations", 0.0) for parts in prediction.moments.values())
    if module.gradient_checkpointing not in (True, "offload") and activations > _LARGE * prediction.peak:
        yield draft.changed("model.gradient_checkpointing=true", gradient_checkpointing=True)
    positions = -(-draft.batch.input_ids.numel() // layout.context_parallel)  # of a rank
    if module.mlp_tile_size is None and positions > 2 * _TILE and activations > _LARGE * prediction.peak:
        yield draft.changed(f"model.mlp_tile_size={_TILE}", mlp_tile_size=_TILE)
    in_loss = prediction.moments[LOSS].get("activations", 0.0)
    sums = {name: sum(parts.values()) for name, parts in prediction.moments.items() if name != LOADING}
    done = prediction.rehearsal
    if done.chunk_size > 64 and sums[LOSS] == max(sums.values()) and done.logits > _LARGE * in_loss:
        yield draft.changed("model.chunk_size=64", chunk_size=64)
    capacity = max(least, draft.batch.input_ids.numel() // 2)
    if capacity < draft.batch.input_ids.numel() and in_loss > _LARGE * prediction.peak:
        yield replace(
            draft.changed(f"data.tokens_per_batch={capacity}, trainer.accumulate_grad_batches times 2"),
            batch=smaller(capacity),
        )
    if layout.stage < 3 and layout.data_parallel > 1:
        yield replace(draft.changed("trainer.strategy=fsdp2"), layout=_sharded(layout, layout.data_parallel))
    is_on_gpu = prediction.device.name == "GPU"
    if module.gradient_checkpointing is True and is_on_gpu and activations > _LARGE * prediction.peak:
        yield draft.changed("model.gradient_checkpointing=offload", gradient_checkpointing="offload")
    if module.tuning.lora is None:
        yield draft.changed("model.lora.r=16", tuning=replace(module.tuning, lora=Lora()))
    if module.tuning.quantize is None and layout.stage == 0:
        yield draft.changed("model.quantize=4bit", tuning=replace(module.tuning, quantize="4bit"))
    if layout.data_parallel == 1 and layout.stage == 0 and is_on_gpu:
        number = _enough(prediction, activations)
        while number <= _MOST_DEVICES:  # over too few, what is gathered outweighs what is spared
            settings = f"trainer.strategy=fsdp2, trainer.devices={number}"
            yield replace(draft.changed(settings), layout=_sharded(layout, number))
            number *= 2
    if layout.stage == 3 and prediction.moments[LOADING] and layout.data_parallel * 2 <= _MOST_DEVICES:
        number = layout.data_parallel * 2
        wider = replace(layout, name=f"FSDP2 over {number}", data_parallel=number)
        yield replace(draft.changed(f"{number} devices"), layout=wider)


def _sharded(layout: Layout, number: int) -> Layout:
    """The same over a number of devices with FSDP2, which computes in the dtype of autocast."""
    mixed = layout.autocast if layout.autocast == torch.bfloat16 else layout.compute
    name = f"FSDP2 over {number}"
    return replace(layout, name=name, data_parallel=number, stage=3, compute=mixed, is_deepspeed=False, offloads="")


def _enough(prediction: Prediction, activations: float) -> int:
    """The least power of two of devices that may suffice: each has all activations, and shards of the rest."""
    shared, number = prediction.peak - prediction.device.base - activations, 2
    left = (prediction.device.capacity or 0.0) - prediction.device.base - activations
    while number < _MOST_DEVICES and shared / number > left:
        number *= 2
    return number
