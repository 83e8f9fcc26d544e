"""Kernels of a model's layers: as transformers writes them, compiled layer by layer, or Liger's.

The choice is made when training starts, since it depends on how long training lasts. A checkpoint keeps it: kernels
differ in rounding, and a resumed run is to be the same bit for bit. Generation and callbacks run compiled layers as
they are written (:func:`lightning_sft.machine.contexts.evaluating`).
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_sft.machine.compiler import compiler_missing
from lightning_sft.machine.contexts import KEEP_LESS, evaluating
from lightning_sft.model.parallel.sharding import layers
from lightning_sft.model.pretrained import backbone_and_head
from lightning_sft.model.probes import is_close, states
from lightning_sft.training.trainer import total_steps
from lightning_sft.types import InputError

if TYPE_CHECKING:
    from lightning_sft.module import SFTModule

KernelName = Literal["auto", "compiled", "liger", "none"]

KERNELS_KEY = "lightning_sft_kernels"
"""Under which key a checkpoint has the kernels of its run."""

COMPILES_FROM = 500
"""Micro-batches from which on ``auto`` compiles: compiling takes about a minute, and a pass some tenths of a second."""

_GRAPHS = 64  # of layers, which share a limit: kinds of layers, times checkpointed or not, training or not, sizes
_TOKENS = 24  # that Liger's kernels are tried with
_MARK = "_lightning_sft_liger"  # attribute of the cosines of a model whose RoPE is Liger's


@dataclass
class Kernels:
    """The kernels of a module's layers.

    Args:
        asked: What the user wants.
    """

    asked: KernelName = "auto"
    restored: str | None = field(default=None, init=False)  # those of the checkpoint
    name: str | None = field(default=None, init=False)  # those in use; None before training
    why: str = field(default="", init=False)

    def begin(self, module: SFTModule) -> None:
        """Choose kernels and put them into the model, once; the same on all ranks.

        Args:
            module: The Lightning module, whose training is about to start.

        Raises:
            InputError: When kernels that were asked for are not available, or do not compute what the model computes.
        """
        if self.name is not None:
            return
        reasons: list[str] = []
        for name, why in self._candidates(module):
            reason = _why_not(name, module)
            if reason is None:
                self.name, self.why = name, "; ".join([why, *reasons])
                break
            if self.asked == name:
                raise InputError(f"model.kernels={name} is not available: {reason}. Set model.kernels=auto, or none.")
            reasons.append(f"not {name}, because {reason}")
        if self.restored not in (None, self.name):
            warnings.warn(
                f"The run had kernels {self.restored} and continues with {self.name} ({self.why}): it is the same but "
                "for rounding, not bit for bit.",
                stacklevel=2,
            )
        if module.device.type != "cpu" or self.name != "none":
            rank_zero_info(f"Kernels {self.name}: {self.why}.")

    def _candidates(self, module: SFTModule) -> list[tuple[str, str]]:
        """Names in the order in which they are tried, each with the reason for it; the last is always available."""
        if self.asked != "auto":
            return [(self.asked, "asked for")]
        none = ("none", "layers run as transformers writes them")
        if self.restored is not None:
            return [(self.restored, "as before the run was resumed"), none]
        if module.device.type != "cuda":
            return [none]
        if getattr(module.trainer.strategy, "zero_stage_3", False):
            return [("none", "ZeRO-3 gathers parameters in hooks, which compiled layers were not tried with")]
        passes = _passes_left(module)
        if passes is not None and passes < COMPILES_FROM:
            return [("liger", f"{passes} micro-batches are too few for compiling to pay back"), none]
        return [("compiled", f"from {COMPILES_FROM} micro-batches on compiling pays back"), ("liger", "fused"), none]


def _passes_left(module: SFTModule) -> int | None:
    """Micro-batches that a rank has still to do; ``None`` where nobody knows."""
    try:
        steps = total_steps(module.trainer) - module.trainer.global_step
    except InputError:
        return None
    return int(steps * module.trainer.accumulate_grad_batches)


def _why_not(name: str, module: SFTModule) -> str | None:
    """Put kernels into the model, and give the reason where that cannot be done: the model is then as before."""
    if name == "none":
        return None
    return _compile(module) if name == "compiled" else _try_liger(module)


def _compile(module: SFTModule) -> str | None:
    on_gpu = module.device.type == "cuda"
    if missing := compiler_missing(on_gpu):
        return missing
    if on_gpu and module.gradient_checkpointing == "offload":  # torch traces neither its hooks nor what is under them
        return "torch does not compile layers whose inputs are offloaded (model.gradient_checkpointing=offload)"
    assert module.model is not None
    try:
        found = layers(module.model)
    except InputError as error:
        return str(error).rstrip(".")
    if on_gpu:  # on a CPU time is dearer than memory
        for setting, value in KEEP_LESS.items():
            setattr(torch._functorch.config, setting, value)
    # else random numbers of layers that are computed again come from a generator of their own, which no seed resets
    torch._functorch.config.graphsafe_rng_functionalization = False
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _GRAPHS)
    dynamo.suppress_errors = True  # a layer that cannot be compiled runs as written, with a warning
    for layer in found:
        layer.compile(dynamic=None if on_gpu else True)  # on GPUs packs have one size; a second one makes it dynamic
    return None


def _try_liger(module: SFTModule) -> str | None:
    """Patch the model, and keep that if its hidden states remain what they were, up to rounding, on all ranks."""
    if not all(map(importlib.util.find_spec, ("liger_kernel", "triton"))):
        return "it needs liger-kernel and triton: pip install 'lightning-sft[gpu]'"
    assert module.model is not None
    assert module.num_embeddings is not None
    ids = torch.randint(module.num_embeddings, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    before = {part: _copied(part.__dict__) for part in module.model.modules()}
    try:
        wanted = _hidden(module, ids.to(module.device))
        reason = apply_liger(module.model)
        if reason is None and not is_close(_hidden(module, ids.to(module.device)), wanted):
            reason = "with it hidden states differ from the model's own by more than rounding"
    except Exception as error:  # whatever a kernel does on a device that it was not written for
        reason = f"it fails on this device ({type(error).__name__}: {error})"
    if module.trainer.strategy.reduce_boolean_decision(reason is None):
        return None
    for part, attributes in before.items():
        part.__dict__.clear()
        part.__dict__.update(attributes)
    return reason or "it fails on another rank"


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a module, with its hooks as they are now."""
    return {name: copy(value) if isinstance(value, dict) else value for name, value in attributes.items()}


def _hidden(module: SFTModule, input_ids: Tensor) -> Tensor:
    """Last hidden states at the precision of training, ``[1, N, H]``."""
    assert module.scorer is not None
    with evaluating(module):
        hidden: Tensor = module.scorer(input_ids, lambda model, ids: states(backbone_and_head(model)[0], ids))
    return hidden


def apply_liger(model: PreTrainedModel) -> str | None:
    """Put Liger's RMSNorm, RoPE and SwiGLU (or GeGLU) into one model; other models of the process stay as they are.

    Liger binds new forward methods to the norms and MLPs of a model, but replaces classes and the RoPE function in the
    architecture's module of transformers, for all models that exist or will. Classes are put back. The RoPE function
    becomes one that calls Liger's for this model alone: it knows its cosines by a mark.

    Args:
        model: Changed in place. Experts are left alone: theirs are not computed in the dtype of autocast.

    Returns:
        Why it cannot be done, or ``None``.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"it has no kernels for {model.config.model_type}"
    modeling = sys.modules[type(model).__module__]
    before = dict(vars(modeling))
    # RoPE, norms and MLPs by Liger's defaults, since architectures lack some of these
    wanted = {"swiglu": False} if model._can_set_experts_implementation() else {}
    try:
        _apply_liger_kernel_to_instance(model, **wanted, cross_entropy=False, fused_linear_cross_entropy=False)
    finally:
        for name, now in list(vars(modeling).items()):
            stock = before.get(name)
            if now is stock:
                continue
            is_second = isinstance(stock, _Rope) or isinstance(now, type)
            setattr(modeling, name, stock if is_second else _Rope(stock, now))
    for part in model.modules():
        if type(part).__name__.endswith("RotaryEmbedding"):
            part.register_forward_hook(_mark)
    return None


class _Rope:
    """RoPE by Liger for models that it was put into, and the stock one for all others."""

    def __init__(self, stock: Any, liger: Any) -> None:
        self.stock, self.liger = stock, liger

    def __call__(self, query: Tensor, key: Tensor, cos: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (self.liger if hasattr(cos, _MARK) else self.stock)(query, key, cos, *args, **kwargs)


def _mark(module: nn.Module, args: Any, output: Any) -> None:
    if isinstance(output, tuple):
        setattr(output[0], _MARK, True)
