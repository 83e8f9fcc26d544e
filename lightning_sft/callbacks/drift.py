"""Distance of the model from the pretrained model."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_sft.data.batches.collate import collate
from lightning_sft.evaluation.divergence import divergence, likeliest
from lightning_sft.io.arguments import Count, Index, check_arguments
from lightning_sft.io.named import OurNames
from lightning_sft.machine.contexts import evaluating
from lightning_sft.model.tuning.adapters import ADAPTER_NAME
from lightning_sft.model.weights import PretrainedWeights
from lightning_sft.training.checks import check_module
from lightning_sft.training.optimizers import whole
from lightning_sft.training.trainer import datamodule_of
from lightning_sft.types import Batch, InputError, widest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_sft.module import SFTModule

_LAYER = re.compile(r"\.(?:layers|h|blocks|block)\.(\d+)\.")
_ELEMENTS = 1 << 24  # of a parameter, compared at a time


class DriftMonitor(Callback, OurNames):
    """Logs the distance of θ from the pretrained θ̂ at each validation, or after each epoch if there is no validation.

    ``drift/layer_07`` is ‖θ − θ̂‖ / ‖θ̂‖ over the trained parameters of the layer, with L2 norms in float64; likewise
    ``drift/embeddings``, ``drift/head`` (if not tied to the embeddings), ``drift/other`` (such as the last norm) and
    ``drift/all``. For a matrix with an adapter, θ − θ̂ is the adapter's contribution: ``‖scale · B A‖ / ‖W‖``. θ̂ is read
    from its files a few rows at a time.

    ``drift/kl`` is the mean over target tokens of KL(p_θ̂ ‖ p_θ) in nats on the first sequences of the validation data.
    All but the ``likeliest`` tokens of p_θ̂ are merged into one outcome, which gives a lower bound, see
    :func:`~lightning_sft.evaluation.divergence.divergence`. Log-probabilities of θ̂ are computed once, before the first
    step, and stored in checkpoints; with adapters, by disabling them. Every rank computes them on the same sequences.

    Args:
        sequences: Number of sequences on which the divergence is measured; 0 for none.
        likeliest: Number of most likely tokens of p_θ̂ stored per target, at 8 bytes each.
    """

    def __init__(self, sequences: Index = 8, likeliest: Count = 128) -> None:
        check_arguments(DriftMonitor, locals())
        self.sequences, self.likeliest = sequences, likeliest
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._squares: dict[str, float] = {}  # ‖W‖² of matrices with adapters

    def state_dict(self) -> dict[str, Any]:
        """Log-probabilities of the pretrained model, kept so that a resumed run reuses them."""
        return {"kept": [list(pair) for pair in self._kept]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the log-probabilities of the pretrained model."""
        self._kept = [(ids, log_probs) for ids, log_probs in state_dict["kept"]]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the log-probabilities of the pretrained model.

        Raises:
            InputError: Under ZeRO-3, where weights are partitioned, or with a module other than SFTModule.
        """
        check_module(self, pl_module)
        if getattr(trainer.strategy, "zero_stage_3", False):
            raise InputError("DriftMonitor cannot read weights partitioned by ZeRO-3. Use deepspeed_stage_2 or fsdp2.")
        module = cast("SFTModule", pl_module)
        model = module.model
        assert model is not None
        assert module.scorer is not None
        self._squares, self._weights = {}, None
        if trainer.is_global_zero:
            names = [_plain(n) for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n]
            names += [f"{_plain(n)}.weight" for n, _ in _adapted(model)]
            self._weights = PretrainedWeights(module.pretrained, names)
        self._batches = self._held_out(trainer, pl_module)
        adapted = next(_adapted(model), None) is not None
        if len(self._kept) != len(self._batches):
            self._kept = []
            if trainer.global_step and not adapted:
                self._batches = []
                rank_zero_warn(
                    "DriftMonitor was added mid-run, so the pretrained model's log-probabilities are unknown; drift/kl "
                    "is not logged."
                )
        if self._batches and not self._kept:
            with evaluating(pl_module), _without_adapters(model):
                self._kept = [likeliest(module.scorer, batch, self.likeliest) for batch in self._batches]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the drift after a validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._measure(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the drift after an epoch if there is no validation."""
        if not sum(trainer.num_val_batches):
            with cast("SFTModule", pl_module).evaluated():
                self._measure(trainer, pl_module)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast("SFTModule", pl_module)
        assert module.model is not None
        assert module.scorer is not None
        found = trainer.strategy.broadcast(self._norms(module.model))
        if self._batches:
            pairs = zip(self._batches, self._kept, strict=True)
            with evaluating(pl_module):
                found["kl"] = torch.cat([divergence(module.scorer, b, *kept) for b, kept in pairs]).mean().item()
        pl_module.log_dict({f"drift/{name}": value for name, value in found.items()}, batch_size=1, sync_dist=True)

    def _held_out(self, trainer: Trainer, module: LightningModule) -> list[Batch]:
        splits = getattr(datamodule_of(trainer), "splits", {})
        if self.sequences and "val" not in splits:
            rank_zero_info("DriftMonitor: there is no validation data of SFTDataModule, so drift/kl is not logged.")
            return []
        examples = splits["val"].examples[: self.sequences] if self.sequences else []
        return [collate([example], packed=False).to(module.device) for example in examples]

    def _norms(self, model: PreTrainedModel) -> dict[str, float]:
        """Relative norms by group; complete on rank 0 only, but every rank must call this."""
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for name, moved, was in self._squared(model):
            for group in (_group(name, model), "all"):
                sums[group][0] += moved
                sums[group][1] += was
        in_order = sorted(sums, key=lambda group: (group == "all", group))
        return {group: math.sqrt(sums[group][0] / sums[group][1]) for group in in_order if sums[group][1]}

    def _squared(self, model: PreTrainedModel) -> Iterator[tuple[str, float, float]]:
        """Name, ‖θ − θ̂‖² and ‖θ̂‖² of each trained matrix."""
        for given, parameter in model.named_parameters():
            name = _plain(given)
            if parameter.requires_grad and ".lora_" not in name:
                now = whole(parameter.detach())
                if self._weights is not None and name in self._weights:
                    yield name, *self._difference(name, now)
        for given, layer in _adapted(model):
            name = f"{_plain(given)}.weight"
            factors = (layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight)
            a, b = (whole(weight.detach()) for weight in factors)
            a, b = (factor.to(widest(factor.device)) for factor in (a, b))
            if self._weights is not None and name in self._weights:
                if name not in self._squares:
                    self._squares[name] = self._difference(name, None)[1]
                added = layer.scaling[ADAPTER_NAME] ** 2 * ((b.T @ b) * (a @ a.T)).sum().item()  # ‖BA‖² = tr(BᵀB AAᵀ)
                yield name, added, self._squares[name]

    def _difference(self, name: str, now: Tensor | None) -> tuple[float, float]:
        """‖θ − θ̂‖² and ‖θ̂‖², some rows at a time; added rows of new tokens have no θ̂."""
        assert self._weights is not None
        shape = self._weights.shape(name)
        step = max(1, _ELEMENTS // max(1, math.prod(shape[1:])))
        moved = was = 0.0
        for begin in range(0, shape[0], step):
            before = self._weights.rows(name, begin, begin + step).double()
            was += before.square().sum().item()
            if now is not None:
                own = now[begin : begin + len(before)]
                dtype = widest(own.device)
                moved += (own.to(dtype) - before.to(own.device, dtype)).square().sum().item()
        return moved, was


def _plain(name: str) -> str:
    """The name of a parameter before adapters were added."""
    return name.replace(".base_layer", "")


def _group(name: str, model: PreTrainedModel) -> str:
    if layer := _LAYER.search(f".{name}"):
        return f"layer_{int(layer[1]):02d}"
    ends = {"embeddings": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    module = name.rpartition(".")[0]
    return next((group for group, end in ends.items() if _plain(_name_of(model, end)) == module), "other")


def _name_of(model: PreTrainedModel, wanted: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "")


def _adapted(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """Linear layers with an adapter, except DoRA, whose change is not B A alone."""
    return (
        (name, module)
        for name, module in model.named_modules()
        if ADAPTER_NAME in getattr(module, "lora_A", ()) and not getattr(module, "use_dora", {}).get(ADAPTER_NAME)
    )


@contextmanager
def _without_adapters(model: PreTrainedModel) -> Iterator[None]:
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    for layer in layers:
        layer._disable_adapters = True  # peft's enable_adapters would also change requires_grad
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
