"""Kernels of the decoder layers: transformers' own, compiled layer by layer, or Liger's.

The choice is made when training starts, since it depends on the length of training. Checkpoints record it: kernels
round differently, and a resumed run must be the same bit for bit. Generation and callbacks run compiled layers
eagerly (:func:`lightning_sft.machine.contexts.evaluating`).
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_sft.machine.compiler import KEEP_LESS, compiler_missing
from lightning_sft.machine.contexts import evaluating
from lightning_sft.model.backbone import backbone_and_head, hidden_states
from lightning_sft.model.parallel.sharding import layers
from lightning_sft.model.probes import is_close
from lightning_sft.model.tiles import compiled_parts
from lightning_sft.training.trainer import announce, total_steps
from lightning_sft.types import InputError

if TYPE_CHECKING:
    from lightning_sft.module import SFTModule

KernelName = Literal["auto", "compiled", "liger", "none"]

KERNELS_KEY = "lightning_sft_kernels"
"""Checkpoint key of the kernels of the run."""

COMPILES_FROM = 500
"""Micro-batches from which ``auto`` compiles: compiling takes about a minute, a micro-batch some tenths of a second."""

_GRAPHS = 64  # recompilation limit, shared by all layers: layer types x checkpointed or not x training or not x sizes
_TOKENS = 24  # in the input that checks Liger's kernels
_MARK = "_lightning_sft_liger"  # attribute that marks the cosines of a model with Liger's RoPE


@dataclass
class Kernels:
    """Choice of kernels for a module's layers.

    Args:
        asked: Kernels requested by the user.
    """

    asked: KernelName = "auto"
    restored: str | None = field(default=None, init=False)  # the checkpoint's kernels
    name: str | None = field(default=None, init=False)  # kernels in use; None before training
    why: str = field(default="", init=False)

    def begin(self, module: SFTModule) -> None:
        """Choose kernels and install them in the model, once; the choice is the same on all ranks.

        Args:
            module: The Lightning module, whose training is about to start.

        Raises:
            InputError: When requested kernels are not available, or change the model's hidden states.
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
                raise _unavailable(name, reason)
            reasons.append(f"not {name}, because {reason}")
        if self.restored not in (None, self.name):
            warnings.warn(
                f"The run used kernels={self.restored} and resumes with {self.name} ({self.why}): results agree up to "
                "rounding, not bit for bit.",
                stacklevel=2,
            )
        if module.device.type != "cpu" or self.name != "none":
            announce(module.trainer, f"Kernels {self.name}: {self.why}.")

    def check_packages(self) -> None:
        """Refuse requested kernels whose packages are not installed.

        Raises:
            InputError: When one is missing.
        """
        if self.asked == "liger" and (missing := _liger_missing()):
            raise _unavailable("liger", missing)

    def _candidates(self, module: SFTModule) -> list[tuple[str, str]]:
        """Candidates in the order they are tried, each with its reason; the last is always available."""
        if self.asked != "auto":
            return [(self.asked, "asked for")]
        none = ("none", "layers run as transformers writes them")
        if self.restored is not None:
            return [(self.restored, "as before the run was resumed"), none]
        if module.device.type != "cuda":
            return [none]
        if getattr(module.trainer.strategy, "zero_stage_3", False):
            return [("none", "ZeRO-3 gathers parameters in hooks, which is untested with compiled layers")]
        passes = _passes_left(module)
        if passes is not None and passes < COMPILES_FROM:
            return [("liger", f"{passes} micro-batches are too few for compilation to pay off"), none]
        return [("compiled", f"from {COMPILES_FROM} micro-batches on, compilation pays off"), ("liger", "fused"), none]


def _unavailable(name: str, reason: str) -> InputError:
    return InputError(f"model.kernels={name} is not available: {reason}. Set model.kernels=auto or none.")


def _passes_left(module: SFTModule) -> int | None:
    """Micro-batches left on this rank, or ``None`` if the number of steps is unknown."""
    try:
        steps = total_steps(module.trainer) - module.trainer.global_step
    except InputError:
        return None
    return int(steps * module.trainer.accumulate_grad_batches)


def _why_not(name: str, module: SFTModule) -> str | None:
    """Install kernels; on failure the model is left unchanged and the reason is returned."""
    if name == "none":
        return None
    return _compile(module) if name == "compiled" else _try_liger(module)


def _compile(module: SFTModule) -> str | None:
    on_gpu = module.device.type == "cuda"
    if missing := compiler_missing(on_gpu):
        return missing
    if on_gpu and module.gradient_checkpointing == "offload":  # torch does not trace saved-tensor hooks
        return "torch does not compile layers whose inputs are offloaded (model.gradient_checkpointing=offload)"
    assert module.model is not None
    try:
        found = layers(module.model)
    except InputError as error:
        return str(error).rstrip(".")
    if on_gpu:  # on CPUs time matters more than memory
        for setting, value in KEEP_LESS.items():
            setattr(torch._functorch.config, setting, value)
    # otherwise recomputed layers draw random numbers from a separate generator that no seed resets
    torch._functorch.config.graphsafe_rng_functionalization = False
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _GRAPHS)
    dynamo.skip_fwd_side_effects_in_bwd_under_checkpoint = True  # routers are recorded in the forward pass alone
    dynamo.suppress_errors = True  # a layer that cannot be compiled runs as written, with a warning
    for part in (part for layer in found for part in compiled_parts(layer)):
        part.compile(dynamic=None if on_gpu else True)  # on GPUs packs have one size; a second size makes it dynamic
    return None


def _liger_missing() -> str | None:
    is_there = all(map(importlib.util.find_spec, ("liger_kernel", "triton")))
    return None if is_there else "it needs liger-kernel and triton: pip install 'lightning-sft[gpu]'"


def _try_liger(module: SFTModule) -> str | None:
    """Patch the model; keep the patch only if hidden states are unchanged up to rounding on all ranks."""
    if missing := _liger_missing():
        return missing
    assert module.model is not None
    assert module.num_embeddings is not None
    ids = torch.randint(module.num_embeddings, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    before = {part: _copied(part.__dict__) for part in module.model.modules()}
    try:
        wanted = _hidden(module, ids.to(module.device))
        reason = apply_liger(module.model)
        if reason is None and not is_close(_hidden(module, ids.to(module.device)), wanted):
            reason = "hidden states differ from the model's own by more than rounding"
    except Exception as error:  # a kernel may raise anything on a device it was not written for
        reason = f"it fails on this device ({type(error).__name__}: {error})"
    if module.trainer.strategy.reduce_boolean_decision(reason is None):
        return None
    for part, attributes in before.items():
        part.__dict__.clear()
        part.__dict__.update(attributes)
    return reason or "it fails on another rank"


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """A copy of a module's attributes that later hooks do not change."""
    return {name: copy(value) if isinstance(value, dict) else value for name, value in attributes.items()}


def _hidden(module: SFTModule, input_ids: Tensor) -> Tensor:
    """Last hidden states ``[1, N, H]``, at the precision of training."""
    assert module.scorer is not None
    with evaluating(module):
        hidden: Tensor = module.scorer(input_ids, lambda model, ids: hidden_states(backbone_and_head(model)[0], ids))
    return hidden


def apply_liger(model: PreTrainedModel) -> str | None:
    """Install Liger's RMSNorm, RoPE and SwiGLU (or GeGLU) in one model, without affecting others in the process.

    Liger binds new forward methods to the norms and MLPs of the model, but it also replaces classes and the RoPE
    function in the architecture's module of transformers, which affects every model. Here the classes are restored, and
    the RoPE function becomes a dispatcher that calls Liger's for this model only, recognized by a mark on its cosines.

    Args:
        model: Model to patch in place. Experts are not patched: Liger's ignore the autocast dtype.

    Returns:
        The reason why the model cannot be patched, or ``None`` on success.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"it has no kernels for {model.config.model_type}"
    modeling = sys.modules[type(model).__module__]
    before = dict(vars(modeling))
    # Liger's defaults patch RoPE, norms and MLPs; naming them would fail on architectures that lack one
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
    """Dispatches to Liger's RoPE for patched models and to the stock function for all others."""

    def __init__(self, stock: Any, liger: Any) -> None:
        self.stock, self.liger = stock, liger

    def __call__(self, query: Tensor, key: Tensor, cos: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (self.liger if hasattr(cos, _MARK) else self.stock)(query, key, cos, *args, **kwargs)


def _mark(module: nn.Module, args: Any, output: Any) -> None:
    if isinstance(output, tuple):
        setattr(output[0], _MARK, True)
