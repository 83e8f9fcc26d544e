"""Weights to export, a part of them at a time: those of a layer, or one that is in none.

They are written a file at a time, and a model without memory runs on them: each part reads its weights when it runs,
and frees them afterwards. So a folder is written and compared without a whole model in memory.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from lightning_sft.checkpoints.reading import WEIGHTS, Checkpoint
from lightning_sft.export import parity
from lightning_sft.export.kept import keep_files, unkept
from lightning_sft.export.restore import announce_left_out, of_the_model, settings_of
from lightning_sft.machine.contexts import default_dtype
from lightning_sft.model.backbone import language_model
from lightning_sft.model.parallel import loading
from lightning_sft.model.pretrained import is_composite, model_from_config
from lightning_sft.types import Example, InputError

Read = Callable[[Sequence[str]], dict[str, Tensor]]


class Weights(ABC):
    """Weights as they are exported: whole, merged and in one dtype.

    Args:
        plain: The exported model, without memory.
        widest: Dtype that holds all trained weights.
        dtype: Dtype of the exported weights.
        keep: Whether this process gets the weights.
    """

    def __init__(self, plain: PreTrainedModel, widest: torch.dtype, dtype: torch.dtype, keep: bool = True) -> None:
        self.plain, self.widest, self.dtype, self.keep = plain, widest, dtype, keep
        self._digests: dict[str, bytes] = {}

    @abstractmethod
    def part(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Weights on the CPU by name, in the dtype of the export; empty where they are not kept."""

    @property
    def parts(self) -> dict[str, list[str]]:
        """Names of the weights that are read together: those of a layer, or a single one."""
        return parts_of(self.plain)

    def files(self, max_size: str) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Any] | None]]:
        """Each weight file: its name, its tensors as transformers names them, and the index if there are several.

        Args:
            max_size: Maximum size of a file, such as ``5GB``.
        """
        source = {name: part for part, names in self.file_names().items() for name in names}
        split = split_state_dict_into_shards_factory(
            self._written(self.plain.state_dict()),
            get_storage_size=lambda tensor: tensor.untyped_storage().nbytes(),
            get_storage_id=lambda tensor: tensor.untyped_storage()._cdata,  # experts that are parts of one tensor
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_size,
        )
        facts = {"total_parameters": self.plain.num_parameters(), **split.metadata}
        index = {"metadata": facts, "weight_map": split.tensor_to_filename}
        read, left = set[str](), dict[str, Tensor]()
        for file, names in split.filename_to_tensors.items():
            for part in dict.fromkeys(source[name] for name in names):
                if part not in read:
                    read.add(part)
                    found = self.part(self.parts[part])
                    self._digests |= {name: _digest(value) for name, value in found.items()}
                    left |= self._written(found)
            tensors = {name: left.pop(name).contiguous() for name in names if self.keep}
            yield file, tensors, index if split.is_sharded else None
            tensors.clear()

    def file_names(self) -> dict[str, list[str]]:
        """For each part, the names that its tensors have in files."""
        empty = self.plain.state_dict()
        return {part: list(self._written({name: empty[name] for name in own})) for part, own in self.parts.items()}

    def unequal(self, model: PreTrainedModel, read: Read) -> list[str]:
        """Names of the weights that differ in any bit from those that :meth:`files` has given.

        Args:
            model: Empty model of the folder.
            read: Function that reads its weights.
        """
        differ = sorted(self.plain.state_dict().keys() ^ model.state_dict().keys())
        for names in self.parts.values():
            values = read(names)
            differ += [
                name for name in names if _digest(cast_floating(values[name], self.dtype)) != self._digests[name]
            ]
        return differ

    def _written(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors in the names and layouts of files, tied ones once."""
        left_out = {*self.plain.all_tied_weights_keys, *(self.plain._keys_to_ignore_on_save or ())}
        given = {name: tensor for name, tensor in tensors.items() if name not in left_out}
        found: dict[str, Tensor] = revert_weight_conversion(self.plain, given)
        return found


class StoredWeights(Weights):
    """The weights of a distributed checkpoint, of which only what is asked for is read.

    Args:
        checkpoint: The checkpoint.
        dtype: Name of the dtype of the exported weights; by default that of the stored ones.

    Raises:
        InputError: When the whole model has to be read, as with adapters, which are merged with their base.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: str | None) -> None:
        own = settings_of(checkpoint.metadata)
        if own.get("lora") is not None:
            raise InputError("adapters are merged with their base")
        stored = checkpoint.stored_dtypes()
        dtypes = {name.removeprefix(WEIGHTS): found for name, found in of_the_model(stored).items()}
        widest = torch.bool
        for found in dtypes.values():
            widest = torch.promote_types(widest, found) if found.is_floating_point else widest
        self.hf_config: dict[str, Any] = own["hf_config"]
        target = widest if dtype is None else getattr(torch, dtype)
        super().__init__(architecture(self.hf_config, target), widest, target)
        announce_left_out(stored)
        self._checkpoint, tied = checkpoint, self.plain.all_tied_weights_keys
        if dtypes.keys() - tied.keys() != self.plain.state_dict().keys() - tied.keys():
            raise InputError("the names of its weights are not those of its architecture")

    def part(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Weights on the CPU by name, in the dtype of the export."""
        return {name: cast_floating(value, self.dtype) for name, value in self.trained(names).items()}

    def trained(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The weights as they are stored."""
        found = self._checkpoint.weights([WEIGHTS + name for name in names])
        return {name.removeprefix(WEIGHTS): value for name, value in found.items()}


def architecture(hf_config: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """An exported model without memory.

    Args:
        hf_config: Configuration of the model, as plain values.
        dtype: Dtype of the weights.

    Raises:
        InputError: When its parts cannot be read while it runs.
    """
    with torch.device("meta"), default_dtype(dtype):
        plain = model_from_config(hf_config)
    if is_composite(plain):
        raise InputError("what text does not use is read again from model.pretrained")
    vars(plain.config).pop("quantization_config", None)  # weights are exported as plain ones
    check_parts(plain)
    return plain


def parts_of(model: PreTrainedModel) -> dict[str, list[str]]:
    """Names of the weights of each part: of a layer by its name, or a single one by its own. Tied ones are left out."""
    found: dict[str, list[str]] = {}
    for name in model.state_dict():
        if name not in model.all_tied_weights_keys:
            found.setdefault(_part_of(name), []).append(name)
    return found


def _part_of(name: str) -> str:
    layer = re.match(r".*?\.\d+(?=\.)", name)
    return layer[0] if layer else name


@contextmanager
def read_while_running(model: PreTrainedModel, read: Read, device: torch.device) -> Iterator[None]:
    """Context in which an empty model runs: each part reads its weights before it runs, and frees them afterwards.

    Args:
        model: Model on the meta device.
        read: Function that reads weights by name.
        device: Device to run on.
    """
    _compute_buffers(model, device)
    tied, empty = model.all_tied_weights_keys, model.state_dict(keep_vars=True)
    units: dict[str, list[str]] = {}
    for name in empty:
        part = _part_of(name)
        units.setdefault(name.rpartition(".")[0] if part == name else part, []).append(name)

    def hold(names: list[str]) -> None:
        values = read([tied.get(name, name) for name in names])
        for name in names:
            loading.set_tensor(model, name, values[tied.get(name, name)].to(device))

    def free(names: list[str]) -> None:
        for name in names:
            loading.set_tensor(model, name, empty[name])

    hooks = []
    for unit, names in units.items():
        module = model.get_submodule(unit)
        hooks.append(module.register_forward_pre_hook(lambda *_, names=names: hold(names)))
        hooks.append(module.register_forward_hook(lambda *_, names=names: free(names), always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the buffers that are no weights, such as the frequencies of RoPE."""
    stored = model.state_dict().keys()
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and f"{prefix}.{name}".lstrip(".") not in stored:
                module._buffers[name] = torch.zeros_like(buffer, device=device)
                cast(Any, module)._is_hf_initialized = False
    with loading.buffers_alone(model), torch.random.fork_rng(devices=[]):
        model.initialize_weights()


def check_parts(model: PreTrainedModel) -> None:
    """Refuse an empty model whose parts do not run by themselves, tried on a small copy.

    Raises:
        InputError: When the copy does not run, or does not give the same with its weights read part by part.
    """
    try:
        small = loading.cut_down(model).eval()
        values = {name: value.clone() for name, value in small.state_dict().items()}
        ids = torch.arange(2)[None]
        with torch.no_grad():
            wanted = language_model(small)(input_ids=ids, use_cache=False).logits
            for name, value in values.items():
                loading.set_tensor(small, name, torch.empty_like(value, device="meta"))
            with read_while_running(small, lambda names: {name: values[name] for name in names}, ids.device):
                found = language_model(small)(input_ids=ids, use_cache=False).logits
    except Exception as error:  # an architecture may do anything with its number of layers
        raise InputError(f"a copy with fewer layers does not run ({type(error).__name__}: {error})") from error
    if not torch.equal(wanted, found):
        raise InputError("a copy with fewer layers, whose weights are read layer by layer, gives something else")


def log_probs(
    model: PreTrainedModel, read: Read, examples: Sequence[Example], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Log-probabilities of all tokens at the targets, ``[T, V]``, under an empty model whose parts are read as it runs.

    Args:
        model: Model on the meta device.
        read: Function that reads weights by name.
        examples: Sequences of the targets.
        dtype: Dtype to compute in.
        device: Device to run on.
    """

    def in_dtype(names: Sequence[str]) -> dict[str, Tensor]:
        return {name: cast_floating(value, dtype) for name, value in read(names).items()}

    with read_while_running(model, in_dtype, device):
        return parity.log_probs(model, examples, device)


def write_file(folder: Path, file: str, tensors: dict[str, Tensor], index: dict[str, Any] | None) -> None:
    """Write one of the files of :meth:`Weights.files`, and the index if there is one."""
    save_file(tensors, folder / file, metadata={"format": "pt"})
    if index is not None:
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


def compare_folder(
    weights: Weights,
    folder: Path,
    pretrained: str,
    report: parity.Report,
    trained: Tensor,
    examples: Sequence[Example],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Add what the pretrained folder has besides, and compare the exported folder with the trained model.

    Args:
        weights: Weights that were written.
        folder: Exported folder.
        pretrained: Hub name or path that the model was trained from.
        report: Report that gets the results.
        trained: Log-probabilities of all tokens at the targets under the trained model, ``[T, V]``.
        examples: Sequences of the targets.
        dtype: Dtype to compute in.
        device: Device to compute on.
    """
    keep_files(weights.plain, pretrained, folder)
    model = loading.empty_model(str(folder), None, weights.widest)
    read_files, names = loading.reader(model, str(folder)), weights.file_names()

    def read(wanted: Sequence[str]) -> dict[str, Tensor]:
        parts = dict.fromkeys(_part_of(name) for name in wanted)
        found = read_files([name for part in parts for name in names[part]])
        return {name: found[name] for name in wanted}

    report.unequal_weights = weights.unequal(model, read)
    found = log_probs(model, read, examples, dtype, device)
    report.models.append(parity.agreement("reloaded", trained, found))
    report.unkept = unkept(weights.plain, {}, pretrained, folder, weights.dtype)


def cast_floating(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype, if it is one of floating-point numbers."""
    return value.to(dtype) if value.is_floating_point() else value


def _digest(value: Tensor) -> bytes:
    data: Any = value.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data).digest()
