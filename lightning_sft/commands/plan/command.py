"""``lightning-sft plan``: predict the memory and the steps of a fit, without reading the weights."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from lightning_sft.commands.base import ConfigCLI
from lightning_sft.commands.plan.device import Device
from lightning_sft.commands.plan.layout import Layout
from lightning_sft.commands.plan.prediction import Prediction, predict
from lightning_sft.commands.plan.remedies import Remedy, remedies
from lightning_sft.commands.plan.table import show_prediction, show_remedies
from lightning_sft.data.batches.collate import collate
from lightning_sft.data.batches.plan import Division
from lightning_sft.data.batches.split_plan import SplitPlan
from lightning_sft.datamodule import SFTDataModule
from lightning_sft.io.arguments import NonNegative, check_arguments
from lightning_sft.machine.terminal import Console
from lightning_sft.model.kernels import COMPILES_FROM
from lightning_sft.module import SFTModule
from lightning_sft.training.trainer import division_of, num_devices, total_steps
from lightning_sft.types import Batch, InputError

_DESCRIPTION = (
    "Predict the memory that fit needs on each device, count its steps, and suggest changes if it does not fit. "
    "Exits with 1 if it does not fit. The weights are not read."
)


def plan(
    data: LightningDataModule,
    module: LightningModule,
    trainer: Any,
    memory: NonNegative | None = None,
    json: bool = False,
) -> Prediction:
    """Predict the memory that fit needs on each device, count its steps, and suggest changes if it does not fit.

    The weights are not read: two steps run on shapes only.

    Args:
        data: Data module that provides the micro-batches.
        module: Module, configured as for ``fit``.
        trainer: Settings of the trainer: devices, strategy and precision. The devices need not be available.
        memory: GiB of memory per device, or of the machine for CPUs; by default that of this machine.
        json: Whether to print JSON.

    Returns:
        The prediction.

    Raises:
        InputError: When module or data are not those of lightning_sft, or the strategy is not supported.
    """
    if not isinstance(data, SFTDataModule) or not isinstance(module, SFTModule):
        given = f"{type(module).__name__} and {type(data).__name__}"
        raise InputError(f"plan needs an SFTModule and an SFTDataModule, or subclasses of them, got {given}.")
    check_arguments(plan, locals())
    layout = Layout.of(trainer, num_devices(trainer))
    is_stream, data = data.streaming, data.preview(module, trainer, num_ranks=layout.num_batches)
    work = division_of(data.trainer)
    steps = steps_of(data, module, trainer, is_stream)
    device = Device.of(str(trainer.accelerator), work.num_local, memory)

    compiles = device.name == "GPU" and _compiles(module, steps["steps in all"] * work.accumulate)

    def try_out(module: SFTModule, batch: Batch, layout: Layout) -> Prediction:
        return predict(module, batch, layout, device, work.accumulate, compiles)

    planned = data.planned("train")
    batch = largest(planned, data)
    prediction = try_out(module, batch, layout)
    found: list[Remedy] = []
    if not prediction.fits:
        least = int(planned.split.lengths.max())
        found = list(remedies(module, batch, prediction, lambda n: largest(_replanned(data, n), data), least, try_out))
    if json:
        print(_json(prediction, steps, found))
    else:
        console = Console(soft_wrap=True)
        show_prediction(prediction, steps, console)
        if planned.outliers:
            console.print(planned.outliers, highlight=False)
        if not prediction.fits:
            show_remedies(found, console)
    return prediction


class PlanCLI(ConfigCLI):
    """The command line of ``fit`` with the arguments of :func:`plan`; its ``result`` is the prediction."""

    verb = staticmethod(plan)

    @property
    def passes(self) -> bool:
        """Whether the fit needs no more memory than a device has."""
        return bool(self.result.fits)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Create the parser with a description of the verb."""
        return super().init_parser(**kwargs | {"description": _DESCRIPTION})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Accept ``--json`` as a flag without a value."""
        assert isinstance(args, list)
        super().parse_arguments(parser, ["--json=true" if argument == "--json" else argument for argument in args])


def largest(planned: SplitPlan, data: SFTDataModule) -> Batch:
    """The micro-batch of an epoch with the most positions and, among equals, the most targets."""
    assert data.tokenizer is not None
    examples, packed = planned.split.examples, planned.packing == "packed"
    ranks = range(planned.plan.num_ranks)
    micro_batches = [micro for rank in ranks for micro in planned.plan.micro_batches(0, rank) if micro.examples]

    def size(indices: Sequence[int]) -> tuple[int, int]:
        lengths = planned.split.lengths[list(indices)]
        positions = lengths.sum() if packed else lengths.max() * len(lengths)
        return int(positions), int(examples.num_targets[list(indices)].sum())

    chosen = max((micro.examples for micro in micro_batches), key=size)
    return collate([examples[i] for i in chosen], 1.0, packed=packed, pad_id=data.pad_id)


def steps_of(data: SFTDataModule, module: SFTModule, trainer: Any, is_stream: bool) -> dict[str, Any]:
    """Numbers of optimizer steps, micro-batches and tokens, per epoch and in total."""
    endless = module.schedule == "constant"
    epoch = SimpleNamespace(steps_per_epoch=math.inf if is_stream else data.steps_per_epoch)
    ends: Any = SimpleNamespace(max_steps=trainer.max_steps, max_epochs=trainer.max_epochs, datamodule=epoch)
    total = total_steps(ends, may_be_endless=endless)
    of_all = {"steps in all": total, "of warm-up": math.ceil(module.warmup * total)}
    if is_stream:
        return {"steps an epoch": "not known of a stream"} | of_all
    planned = data.planned("train")
    plan, split = planned.plan, planned.split
    tokens = int(plan.draw.bounds.sum())
    targets = round(float(split.examples.num_targets @ plan.draw.rates))
    used = plan.num_ranks * plan.accumulate
    return {
        "rows": split.account.num_rows,
        "sequences an epoch": len(plan.draw.bounds),
        "tokens an epoch": tokens,
        "targets an epoch": targets,
        f"{planned.packing} micro-batches an epoch": len(plan.packs),
        "positions of a micro-batch": planned.capacity,
        "filled": f"{planned.fill:.1%}",
        "micro-batches a step": used,
        "tokens a step": round(tokens / plan.num_full_steps),
        "steps an epoch": plan.num_steps,
    } | of_all


def _compiles(module: SFTModule, passes: int) -> bool:
    """Whether a run of ``passes`` micro-batches, or an endless one, compiles its layers on a GPU."""
    is_long = passes >= COMPILES_FROM or module.schedule == "constant"
    return module.kernels.asked == "compiled" or (module.kernels.asked == "auto" and is_long)


def _replanned(data: SFTDataModule, capacity: int) -> SplitPlan:
    return SplitPlan.of(data.splits["train"], Division(), data.packing, capacity, seed=data.seed)


def _json(prediction: Prediction, steps: dict[str, Any], found: Sequence[Remedy]) -> str:
    changes = [
        {"settings": remedy.settings, "peak": remedy.prediction.peak, "fits": remedy.prediction.fits}
        for remedy in found
    ]
    return json.dumps(prediction.as_dict() | {"steps": steps, "remedies": changes}, indent=2)
