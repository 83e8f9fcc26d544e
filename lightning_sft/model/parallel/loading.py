"""Loading in shards: a model is made without memory, sharded, and each rank then reads its slices of the files.

Adapters are made while the model is empty, since peft looks at shapes alone; probes run on :func:`cut_down`, a small
copy with random weights. transformers reads: it converts names and layouts of checkpoints, and slices as DTensors say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as progress

from lightning_sft.machine.contexts import default_dtype
from lightning_sft.model.backbone import backbone_and_head, hidden_states
from lightning_sft.model.parallel.sharding import layers
from lightning_sft.model.parallel.stored import stored_tensors
from lightning_sft.model.pretrained import (
    check_whole,
    load_architecture,
    load_generation_config,
    model_from_config,
    stored_names,
)
from lightning_sft.model.tuning.base_dtype import weight_files
from lightning_sft.model.tuning.quantization import plain_layers, quantize_empty
from lightning_sft.types import InputError

_NO_MORE: dict[str, list[str]] = {"unexpected_keys": []}
_VOCABULARY = 512  # rows that embeddings and head of a small copy have at most


def empty_model(pretrained: str, attention: str | None, dtype: torch.dtype, quantized: Any = None) -> PreTrainedModel:
    """A pretrained model on the meta device, in training mode; :func:`fill` reads its weights.

    Args:
        pretrained: A hub name or a folder.
        attention: Attention implementation of transformers; ``None`` lets transformers choose.
        dtype: Dtype of the parameters, but for those that transformers keeps in float32.
        quantized: Quantization config, see :mod:`lightning_sft.model.tuning.quantization`.

    Raises:
        InputError: When it cannot be filled, or not be probed by a small copy.
    """
    names = stored_names(pretrained)
    if not names:
        raise InputError("it has no safetensors files")
    with torch.device("meta"), default_dtype(dtype):
        model = model_from_config(load_architecture(pretrained), attention)
        if quantized is not None:
            quantize_empty(model, quantized)
    if model.config.is_encoder_decoder:
        raise InputError("it is an encoder-decoder")
    if any(target in names and source in names for target, source in model.all_tied_weights_keys.items()):
        raise InputError("its embeddings and head are tied, but both are in its files")
    if found := load_generation_config(pretrained):
        model.generation_config = found
    if operation := _across_shards(model):
        raise InputError(f"its parts are put together by {operation} along the dimension that is sharded")
    for parameter in model.parameters():  # as from_pretrained leaves them, whatever the architecture has frozen
        parameter.requires_grad_(parameter.is_floating_point())
    for pattern, kept in model._get_dtype_plan(dtype).items():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if re.search(pattern.replace("*", ".*"), name) and tensor.is_floating_point():
                tensor.data = tensor.data.to(kept)
    check_copy(model)
    return model


def _across_shards(model: PreTrainedModel) -> str | None:
    """A conversion that transformers would apply to slices, though it needs whole tensors: [q; k], cut in two.

    Experts that are stored one by one are stacked, and their projections put side by side, within a rank's slice.
    """
    conversions: Any = get_model_conversion_mapping(model)
    for conversion in conversions:
        for operation in getattr(conversion, "operations", ()):
            is_within = isinstance(operation, MergeModulelist) or (
                isinstance(operation, Concatenate) and operation.dim != 0
            )
            if not is_within:
                return type(operation).__name__
    return None


def is_empty(model: nn.Module) -> bool:
    """Whether a model has weights without memory."""
    return any(parameter.is_meta for parameter in model.parameters())


def cut_down(model: PreTrainedModel) -> PreTrainedModel:
    """A small copy of an empty model on the CPU with random weights, a layer of each kind, and part of the vocabulary.

    Layers are of one kind if their classes, shapes and settings are the same. The first ones are kept up to the last
    that is of a new kind, so that each has the place among the others that it is made for.
    """
    small = deepcopy(model, cast(Any, plain_layers(model)))
    stacks = [part for part in small.modules() if isinstance(part, nn.ModuleList)]
    known = set(layers(small))
    for stack in stacks:
        if known & set(stack):
            kinds = [_kind(layer) for layer in stack]
            del stack[max(kinds.index(kind) for kind in kinds) + 1 :]
    config = small.config.get_text_config()
    config.num_hidden_layers = max(len(stack) for stack in stacks if known & set(stack))
    if config.vocab_size > _VOCABULARY:
        small.resize_token_embeddings(_VOCABULARY, mean_resizing=False)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        small._apply(lambda tensor: torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor)
        for parameter in small.parameters():
            parameter.normal_(std=0.02)
        small.initialize_weights()  # and buffers that are no weights, such as the frequencies of RoPE
        small.tie_weights()
    return small


def check_copy(model: PreTrainedModel) -> None:
    """Refuse an empty model whose small copy does not run.

    Raises:
        InputError: When it does not.
    """
    try:
        hidden_states(backbone_and_head(cut_down(model))[0], torch.arange(2)[None])
    except Exception as error:  # an architecture may do anything with its number of layers
        raise InputError(f"a copy with fewer layers does not run ({type(error).__name__}: {error})") from error


def _kind(layer: nn.Module) -> Any:
    shapes = tuple((name, tensor.shape) for name, tensor in layer.state_dict().items())
    settings = tuple(
        (name, key, value)
        for name, part in layer.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, bool | int | float | str | None) and not key.startswith("_") and key != "layer_idx"
    )
    return type(layer), shapes, settings


@contextmanager
def on_host(model: nn.Module) -> Iterator[None]:
    """Empty parameters have a value on the CPU, zero, that takes no memory: peft makes adapters where they are."""
    held: list[tuple[nn.Module, str, nn.Parameter]] = []
    standing: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        own = module.named_parameters(recurse=False, remove_duplicate=False)
        for name, parameter in list(own):
            if parameter.is_meta:
                if parameter not in standing:
                    zeros = torch.zeros((), dtype=parameter.dtype, device="cpu").expand(parameter.shape)
                    standing[parameter] = nn.Parameter(zeros, parameter.requires_grad)
                    vars(standing[parameter]).update(vars(parameter))  # settings of a quantization, if there is one
                held.append((module, name, parameter))
                module._parameters[name] = standing[parameter]
    try:
        yield
    finally:
        for module, name, parameter in held:
            parameter.requires_grad_(standing[parameter].requires_grad)
            module._parameters[name] = parameter


@contextmanager
def buffers_alone(model: PreTrainedModel) -> Iterator[None]:
    """Context in which modules with buffers are initialized; others have parameters alone, read or refused."""
    models: list[Any] = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    for part in models:
        part._init_weights = partial(_init_if_buffers, part._init_weights)
    try:
        yield
    finally:
        for part in models:
            del part._init_weights


def _init_if_buffers(own: Callable[[nn.Module], None], module: nn.Module) -> None:
    if any(True for _ in module.buffers()):
        own(module)


class Packer:
    """Reads and quantizes weights of an empty model, one after the other.

    Args:
        model: Model whose weights are to be quantized, without adapters.
        pretrained: A hub name or a folder with safetensors files.
        device: Device to quantize on.
    """

    def __init__(self, model: PreTrainedModel, pretrained: str, device: torch.device) -> None:
        self._model, self._pretrained = model, pretrained
        self._settings = replace(_settings(model, pretrained, device), hf_quantizer=cast(Any, model).hf_quantizer)
        self._stored, empty = stored_tensors(weight_files(pretrained)), model.state_dict()
        mapping = self._settings.weight_mapping or []
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        names = {
            rename_source_key(name, renamings, converters, model.base_model_prefix, empty)[0]: name
            for name in self._stored
        }
        self.sources = {name: names.get(name) for name in self._unread(model)}
        """For each weight that is quantized, its name in the files."""

    def read(self, part: nn.Module) -> None:
        """Read and quantize the weights of a part of the model that are still empty.

        Raises:
            InputError: When the files lack one, or it cannot be read.
        """
        names = self._unread(part)
        check_whole(
            self._model, self._pretrained, {"missing_keys": [n for n in names if not self.sources[n]], **_NO_MORE}
        )
        given: dict[str, Any] = {source: self._stored[source] for name in names if (source := self.sources[name])}
        with _without_progress():
            info, _ = convert_and_load_state_dict_in_model(self._model, given, self._settings)
        if wrong := info.mismatched_keys or info.conversion_errors:
            raise InputError(f"The weights of {self._pretrained!r} cannot be quantized: {wrong}")

    def _unread(self, part: nn.Module) -> list[str]:
        within, quantizer = set(part.modules()), cast(Any, self._settings.hf_quantizer)
        empty = (
            f"{owner}.{name}".lstrip(".")
            for owner, module in self._model.named_modules()
            if module in within
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.is_meta
        )
        return [name for name in empty if quantizer.param_needs_quantization(self._model, name)]


def fill(
    model: PreTrainedModel, pretrained: str, device: torch.device, offloaded: bool, done: Container[str | None] = ()
) -> None:
    """Read this rank's slices of the weights of a sharded, empty model, in place, and compute its other buffers.

    Args:
        model: Model whose parameters are DTensors, without adapters.
        pretrained: A hub name or a folder with safetensors files.
        device: Device of the rank.
        offloaded: Whether shards stay in host memory.
        done: Names in the files of weights that have been read.

    Raises:
        InputError: When the files lack weights of the model, or have parts that it does not load.
    """
    tied = dict(model.all_tied_weights_keys)
    settings = _settings(model, pretrained, torch.device("cpu") if offloaded else device)
    tensors = stored_tensors(weight_files(pretrained))
    stored: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if name not in done}
    try:
        info, _ = convert_and_load_state_dict_in_model(model, stored, settings)
        with buffers_alone(model):
            info = PreTrainedModel._finalize_model_loading(model, settings, info)
    except RuntimeError as error:
        raise InputError(f"The weights of {pretrained!r} cannot be read in shards: {error}") from error
    check_whole(model, pretrained, info.to_dict())
    if model.all_tied_weights_keys != tied:
        raise InputError(
            f"Embeddings and head of {pretrained!r} are tied according to its config, but differ in its files. Set "
            "tie_word_embeddings to false in its config.json."
        )
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def reader(model: PreTrainedModel, folder: str) -> Callable[[Iterable[str]], dict[str, Tensor]]:
    """A function that reads some tensors of a folder, by their names in its files, as the weights of an empty model.

    It returns them on the CPU by their names in the model, in its dtypes.

    Args:
        model: Model on the meta device, which stays empty.
        folder: Folder with safetensors files.
    """
    target, stored = deepcopy(model), stored_tensors(weight_files(folder))
    settings = _settings(model, folder, torch.device("cpu"))

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        try:
            with _without_progress():
                info, _ = convert_and_load_state_dict_in_model(target, {n: stored[n] for n in names}, settings)
        except (KeyError, RuntimeError) as error:
            raise InputError(f"The weights of {folder} cannot be read: {error}") from error
        if info.mismatched_keys or info.conversion_errors:
            raise InputError(
                f"The weights of {folder} cannot be read: {info.mismatched_keys or info.conversion_errors}"
            )
        found = {name: value for name, value in target.state_dict().items() if not value.is_meta}
        for name, value in found.items():
            set_tensor(target, name, torch.empty_like(value, device="meta"))
        return found

    return read


def set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or a buffer by one with a value, without a gradient."""
    owner, _, own = name.rpartition(".")
    module = model.get_submodule(owner)
    if own in module._parameters:
        module._parameters[own] = nn.Parameter(value.detach(), requires_grad=False)
    else:
        module._buffers[own] = value


def _settings(model: PreTrainedModel, pretrained: str, device: torch.device) -> LoadStateDictConfig:
    dtype = model.dtype
    conversions: Any = get_model_conversion_mapping(model)
    return LoadStateDictConfig(
        pretrained_model_name_or_path=pretrained,
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=conversions,
    )


@contextmanager
def _without_progress() -> Iterator[None]:
    """Transformers shows no progress, as it would of each layer."""
    is_shown = progress.is_progress_bar_enabled()
    progress.disable_progress_bar()
    try:
        yield
    finally:
        if is_shown:
            progress.enable_progress_bar()
