"""What an export takes from the pretrained checkpoint as it is: weights that text does not use, and processor files.

Of a model of images and text, the language model is trained. The rest is read again from the pretrained checkpoint, so
that a base in fewer bits, or weights cast by the trainer, round nothing of it.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from lightning_sft.model.pretrained import (
    is_composite,
    load_model,
    outside_language_model,
    passed_over,
    stored_names,
)
from lightning_sft.types import InputError

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_NOT_LOADED = "model-not-loaded.safetensors"


def pretrained_parts(model: PreTrainedModel, pretrained: str) -> dict[str, Tensor]:
    """Pretrained values of the weights that text does not use and that were not trained; none of a model of text alone.

    Args:
        model: Trained model, with or without adapters.
        pretrained: Hub name or path that it was trained from. It is loaded a second time.

    Raises:
        InputError: When the pretrained checkpoint cannot be loaded.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = [name for name in outside_language_model(model) if name not in trained]
    if not names:
        return {}
    try:
        stored = load_model(pretrained, dtype=torch.promote_types(torch.float32, model.dtype)).state_dict()
    except InputError as error:
        raise InputError(
            f"{type(model).__name__} has weights that were not trained, such as {names[0]}, and an export reads them "
            f"from model.pretrained. {error}"
        ) from error
    return {name: stored[name] for name in names}


def put_back(model: PreTrainedModel, parts: dict[str, Tensor]) -> None:
    """Set weights of a model to values of :func:`pretrained_parts`, in place."""
    own = model.state_dict(keep_vars=True)
    for name, values in parts.items():
        own[name].data = values


def keep_files(model: PreTrainedModel, pretrained: str, folder: Path) -> None:
    """Copy the processor's files, and add stored tensors that transformers does not load, to an exported folder.

    Args:
        model: Model that was written into the folder.
        pretrained: Hub name or path that it was trained from; nothing is added if it no longer exists.
        folder: Exported folder.
    """
    for name in PROCESSOR_FILES if is_composite(model) else ():
        try:
            found = cached_file(str(Path(pretrained).expanduser()) if pretrained.startswith("~") else pretrained, name)
        except OSError:  # the model has no such file
            continue
        shutil.copyfile(str(found), folder / name)
    written = stored_names(str(folder))
    of_file = defaultdict(list)
    for name, path in passed_over(model, pretrained).items():
        if name not in written:
            of_file[path].append(name)
    tensors: dict[str, Tensor] = {}
    for path, names in of_file.items():
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in names}
    if tensors:
        _add(tensors, folder)


def unkept(
    model: PreTrainedModel, parts: dict[str, Tensor], pretrained: str, folder: Path, dtype: torch.dtype
) -> list[str]:
    """Names of the pretrained weights that an exported folder lacks or, if they were not trained, has with other bits.

    Every stored tensor is loaded, or passed over, or was refused by :func:`~lightning_sft.model.pretrained.load_model`.
    Names in the files need not be the same: transformers writes those of an architecture's first checkpoints.

    Args:
        model: Model loaded from the folder.
        parts: Weights that were not trained, see :func:`pretrained_parts`.
        pretrained: Hub name or path that the model was trained from.
        folder: Exported folder.
        dtype: Dtype that the weights were written in.
    """
    found = model.state_dict()
    wrong = [name for name, values in parts.items() if not torch.equal(found[name].to(dtype), values.to(dtype))]
    written = stored_names(str(folder))
    for name, path in passed_over(model, pretrained).items():
        with safe_open(path, framework="pt") as before, safe_open(written.get(name, path), framework="pt") as after:
            if name not in written or not torch.equal(before.get_tensor(name), after.get_tensor(name)):
                wrong.append(name)
    return sorted(set(wrong))


def _add(tensors: dict[str, Tensor], folder: Path) -> None:
    """Add a file of tensors to the weights of a folder, and an index of all of them."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (whole := folder / SAFE_WEIGHTS_NAME).exists():
        whole = whole.rename(folder / "model-00001-of-00001.safetensors")
        with safe_open(whole, framework="pt") as file:
            sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118, not a mapping
        listed = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict.fromkeys(sizes, whole.name)}
    else:
        listed = json.loads(index.read_text(encoding="utf-8"))
    save_file(tensors, folder / _NOT_LOADED, metadata={"format": "pt"})
    listed["metadata"]["total_size"] += sum(tensor.nbytes for tensor in tensors.values())
    listed["weight_map"] |= dict.fromkeys(tensors, _NOT_LOADED)
    index.write_text(json.dumps(listed, indent=2, sort_keys=True) + "\n", encoding="utf-8")
