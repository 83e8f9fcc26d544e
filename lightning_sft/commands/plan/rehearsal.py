"""The first two optimizer steps of a fit, run on shapes to count their allocations."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from lightning_sft.commands.plan import gpu_kernels
from lightning_sft.commands.plan.compiled import compile_on_paper
from lightning_sft.commands.plan.exchanges import PaperContext
from lightning_sft.commands.plan.layout import Layout, Model
from lightning_sft.commands.plan.meter import KINDS, Kind, Meter
from lightning_sft.head.chunks import ON_CPU, fitting_chunk_size
from lightning_sft.machine.contexts import default_dtype
from lightning_sft.model import recurrence
from lightning_sft.model.attention import cpu
from lightning_sft.model.attention.per_document import NAMES
from lightning_sft.model.backbone import backbone_and_head, takes_positions
from lightning_sft.model.likelihood import LikelihoodModel
from lightning_sft.model.parallel.sharding import layers
from lightning_sft.model.precision import follow_autocast
from lightning_sft.model.pretrained import load_architecture, model_from_config, new_token_ids
from lightning_sft.model.probes import ProbeResult
from lightning_sft.model.recompute import checkpoint_layers
from lightning_sft.model.tuning.adapters import inject, is_adapter, widen
from lightning_sft.model.tuning.freezing import choose
from lightning_sft.model.tuning.neftune import add_noise
from lightning_sft.module import SFTModule
from lightning_sft.training.optimizers import make_optimizer
from lightning_sft.types import Batch

FORWARD, LOSS, BACKWARD, STEP = "layers, forward", "loss", "backward", "optimizer step"

_BYTES = {"4bit": 0.516, "8bit": 1.0}  # of a quantized parameter, with its scales


@dataclass(frozen=True)
class Rehearsal:
    """Counts of the rehearsed steps.

    Args:
        meter: Meter with the allocations.
        sizes: Sizes of the parts of the model.
        num_parameters: Number of all parameters.
        num_adapters: Number of adapter parameters.
        num_quantized: Number of quantized parameters.
        chunk_size: Number of targets whose logits are in memory at a time.
        logits: Bytes of the float32 logits of one chunk of targets.
        saved: Bytes that weights take less than counted: quantized ones, and a base that is narrower than what is
            trained. Like the count they are those of all ranks together, in the dtype of computation.
        unpacked: Bytes of the largest quantized matrix when dequantized.
    """

    meter: Meter
    sizes: Model
    num_parameters: int
    num_adapters: int
    num_quantized: int
    chunk_size: int
    logits: int
    saved: float
    unpacked: float

    def held(self, live: Mapping[Kind, int]) -> dict[Kind, float]:
        """Bytes by kind that were counted, less what weights take less than counted."""
        return {kind: float(live.get(kind, 0)) for kind in (*KINDS, "host")} | {"weights": live["weights"] - self.saved}


def rehearse(
    module: SFTModule,
    batch: Batch,
    layout: Layout,
    accumulate: int = 1,
    memory: float | None = None,
    compiles: bool = False,
) -> Rehearsal:
    """Run two optimizer steps in Lightning's order, the second with two micro-batches if gradients are accumulated.

    Args:
        module: The configured :class:`~lightning_sft.module.SFTModule`, whose model is not loaded.
        batch: Largest micro-batch of the epoch.
        layout: Strategy and precision.
        accumulate: Number of micro-batches per step.
        memory: Total bytes of a GPU; ``None`` on CPUs.
        compiles: Whether layers are compiled.

    Raises:
        InputError: When the architecture cannot be run on shapes.
    """
    cpu.works()  # cached here, since its check needs real values
    meter = Meter(layout.shares)
    with torch.device("meta"), default_dtype(layout.computes_in):
        model = _blank(module, layout)
    meter.made("weights", lambda: _materialize(model))
    chunk_size = _chunk_size(module, model, layout, memory)
    scorer = _scorer(module, model, layout, chunk_size, memory is not None, compiles)
    optimizer = make_optimizer(module.optimizer, model.named_parameters())
    meter.follow_gradients(model)
    if layout.in_backward:
        _step_in_backward(model, optimizer, meter)
    backbone, head = backbone_and_head(model)
    backbone.register_forward_hook(lambda *_: meter.moment(LOSS))
    kernels = nullcontext() if memory is None else gpu_kernels.on_paper(meter, scorer.context)
    with meter, default_dtype(layout.computes_in), kernels:
        for micro_batches in (1, min(accumulate, 2)):
            for _ in range(micro_batches):
                meter.moment(FORWARD)
                with _autocast(layout):
                    loss = -scorer(batch)[0]
                meter.moment(BACKWARD)
                loss.backward()
                del loss
            meter.moment(STEP, "optimizer")  # its state is created here
            optimizer.step()
            optimizer.zero_grad()
    meter.moment("")
    return _facts(meter, module, model, head, chunk_size, layout)


def _blank(module: SFTModule, layout: Layout) -> PreTrainedModel:
    """The model that ``configure_model`` would make, with arbitrary values."""
    tuning = module.tuning
    config = module.hf_config or load_architecture(module.pretrained)
    with default_dtype(_base_dtype(module, layout, config)):
        model = model_from_config(config, module.attn_implementation)
    if tuning.new_tokens:
        ids, _ = new_token_ids(module.pretrained, tuning.new_tokens)
        embeddings: Any = model.get_input_embeddings()
        if max(ids) >= embeddings.num_embeddings:
            model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    if layout.tensor_parallel > 1:
        _split(model, layout.tensor_parallel)
    if tuning.lora is not None:
        inject(model, tuning.lora)
    choose(model, tuning.frozen, tuning.trained)
    if tuning.lora is not None:
        widen(parameter for parameter in model.parameters() if parameter.requires_grad)
    return model


def _base_dtype(module: SFTModule, layout: Layout, config: dict[str, Any]) -> torch.dtype:
    """Dtype that weights are loaded in; neither they nor their headers are read, but what the config says of them."""
    return module.tuning.base_dtype(layout.autocast, lambda: config.get("dtype") == "bfloat16")


def _materialize(model: nn.Module) -> None:
    """Replace the meta tensors of a model by CPU tensors; tied ones stay tied."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for owned in (module._parameters, module._buffers):
            for name, tensor in owned.items():
                if tensor is not None and id(tensor) not in made:
                    blank = torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(blank, tensor.requires_grad) if is_parameter else blank
                if tensor is not None:
                    cast(dict[str, Any], owned)[name] = made[id(tensor)]


def _chunk_size(module: SFTModule, model: PreTrainedModel, layout: Layout, memory: float | None) -> int:
    """The module's chunk size, or the one that the likelihood would choose for the device."""
    if module.chunk_size is not None or memory is None:
        return module.chunk_size or ON_CPU
    itemsize = (layout.autocast or layout.computes_in).itemsize
    return fitting_chunk_size(memory, model.get_output_embeddings().weight.shape[0], itemsize)


def _scorer(
    module: SFTModule, model: PreTrainedModel, layout: Layout, chunk_size: int, on_gpu: bool, compiles: bool
) -> LikelihoodModel:
    config = model.config.get_text_config()
    backbone, _ = backbone_and_head(model)
    recurrence.separate(backbone)
    asked, stock = module.attn_implementation, model.get_correct_attn_implementation(None)
    if asked in (None, *NAMES.values()) and takes_positions(backbone) and model._can_set_attn_implementation():
        # the module's choice if it is exact
        model.set_attn_implementation(gpu_kernels.ATTENTION if on_gpu else NAMES[stock])
    findings = ProbeResult(1.0, getattr(config, "final_logit_softcapping", None), True)
    own = module.gradient_checkpointing
    offloads = own == "offload" and on_gpu
    checkpoint_layers(model, True if own == "offload" and not on_gpu else own, "meta", module.mlp_tile_size)
    if compiles and not offloads:
        compile_on_paper(model)
    context = PaperContext(0, layout.context_parallel, None) if layout.context_parallel > 1 else None
    scorer = LikelihoodModel(model, findings, chunk_size, context)
    if module.neftune_alpha:
        add_noise(scorer, model, module.neftune_alpha)
    follow_autocast(model)
    return scorer


def _step_in_backward(model: nn.Module, optimizer: torch.optim.Optimizer, meter: Meter) -> None:
    """Step like :class:`~lightning_sft.callbacks.optimizer_in_backward.OptimizerInBackward`."""

    def step(parameter: torch.Tensor) -> None:
        optimizer.step()
        meter.call((t for t in optimizer.state[parameter].values() if isinstance(t, torch.Tensor)), "optimizer")
        optimizer.zero_grad()

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(step)


def _split(model: PreTrainedModel, num_ranks: int) -> None:
    """Reduce each matrix to the slice of one tensor-parallel rank, by rows or by columns."""
    plan: dict[str, str] = getattr(model.config.get_text_config(), "base_model_tp_plan", None) or {}
    for name, module in backbone_and_head(model)[0].named_modules():
        style = next((how for pattern, how in plan.items() if _fits(name, pattern)), None)
        if style is not None and isinstance(module, nn.Linear):
            dimension = 0 if style == "colwise" else 1
            module.weight = nn.Parameter(module.weight.detach().chunk(num_ranks, dimension)[0].clone())
            if module.bias is not None and dimension == 0:
                module.bias = nn.Parameter(module.bias.detach().chunk(num_ranks)[0].clone())


def _fits(name: str, pattern: str) -> bool:
    ours, theirs = name.split("."), pattern.split(".")
    return len(ours) == len(theirs) and all(b in ("*", a) for a, b in zip(ours, theirs, strict=True))


def _autocast(layout: Layout) -> AbstractContextManager[Any]:
    if layout.autocast is None:
        return nullcontext()
    return torch.autocast("cpu", dtype=layout.autocast, cache_enabled=False)


def _facts(
    meter: Meter, module: SFTModule, model: PreTrainedModel, head: nn.Module, chunk_size: int, layout: Layout
) -> Rehearsal:
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    of_layers = [(_count(layer), _count(layer, only_trained=True)) for layer in layers(model)]
    bits = module.tuning.quantize
    matrices = [m.weight for m in model.modules() if bits and isinstance(m, nn.Linear) and m is not head]
    matrices = [weight for weight in matrices if not weight.requires_grad]
    width = torch.get_default_dtype().itemsize if not matrices else matrices[0].itemsize
    quantized, packed = sum(weight.numel() for weight in matrices), 0.0
    if bits:
        saved = quantized * (width - _BYTES[bits] / layout.wider)
        largest = {id(weight) for weight in max(layers(model), key=_count).parameters()}
        in_largest = sum(weight.numel() for weight in matrices if id(weight) in largest)
        packed = in_largest * (layout.computes_in.itemsize - _BYTES[bits])
    else:
        frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
        saved = frozen * (1 - 1 / layout.wider) if _keeps_base(module, layout) else 0.0
    sizes = Model(
        layer=max(of_layers)[0],
        others=_count(model) - sum(count for count, _ in of_layers),
        trained=_count(model, only_trained=True),
        trained_layer=max(of_layers)[1],
        packed=packed,
    )
    return Rehearsal(
        meter=meter,
        sizes=sizes,
        num_parameters=sum(counts.values()),
        num_adapters=sum(count for name, count in counts.items() if is_adapter(name)),
        num_quantized=quantized,
        chunk_size=chunk_size,
        logits=4 * chunk_size * next(head.parameters()).shape[0],
        saved=saved,
        unpacked=max((weight.numel() * width for weight in matrices), default=0),
    )


def _keeps_base(module: SFTModule, layout: Layout) -> bool:
    """Whether shards of a frozen base stay in the dtype of computation, while those of what is trained are wider."""
    if module.tuning.lora is None or layout.autocast is None:
        return False
    with default_dtype(layout.dtype):
        dtype = _base_dtype(module, layout, module.hf_config or load_architecture(module.pretrained))
    return dtype.itemsize < layout.dtype.itemsize


def _count(module: nn.Module, only_trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not only_trained)
