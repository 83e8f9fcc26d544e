"""Export of a model in training from its shards: no rank ever has the whole model in memory.

Weights are gathered layer by layer, merged with their adapters, and written a file at a time; each rank then reads its
shards of the folder, which is compared with the model in training on held-out rows.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from lightning_sft.export import parity
from lightning_sft.export.convert import Dtype, Live, Settings, begun, finish, mean_difference
from lightning_sft.export.folder import widest_dtype, write_settings
from lightning_sft.export.kept import keep_files, unkept
from lightning_sft.io.disk import whole_folder
from lightning_sft.machine.contexts import default_dtype, eval_mode, evaluating
from lightning_sft.model.likelihood import LikelihoodModel
from lightning_sft.model.parallel import loading
from lightning_sft.model.parallel.rank_zero import FirstRank
from lightning_sft.model.parallel.sharding import Sharding, full
from lightning_sft.model.pretrained import is_composite, load_generation_config, model_from_config
from lightning_sft.model.tuning import new_tokens
from lightning_sft.model.tuning.adapters import ADAPTER_NAME, merged, merged_into, outer_adapters, without_adapters
from lightning_sft.model.tuning.packed import unpacked
from lightning_sft.strategies import layout
from lightning_sft.types import Conversation, Example, InputError

if TYPE_CHECKING:
    from lightning_sft.module import SFTModule


class ShardedWeights:
    """The weights of a sharded model as they are exported: whole, merged, in one dtype; a part of them at a time.

    Every rank calls :meth:`part` with the same names in the same order.

    Args:
        module: Module whose model is sharded.
        dtype: Dtype of the exported weights; by default that of the trained ones.
        keep: Whether this rank gets the weights.

    Raises:
        InputError: When ranks could not read their shards of the exported folder.
    """

    def __init__(self, module: SFTModule, dtype: Dtype | None, keep: bool) -> None:
        assert module.model is not None
        self.widest = widest_dtype(module.model)
        self.dtype: torch.dtype = getattr(torch, dtype) if dtype else self.widest
        self.plain, self.keep = _architecture(module, self.dtype), keep
        with without_adapters(module.model):
            stored: dict[str, Tensor] = module.model.state_dict(keep_vars=True)
            self._packed = unpacked(module.model)
            stored |= {f"{name}.weight": forward.layer.weight for name, forward in self._packed.items()}
        self.stored = {n: stored[n] for n in self.plain.state_dict() if n not in self.plain.all_tied_weights_keys}
        self._adapters, self._rows = outer_adapters(module.model), new_tokens.modules(module.model)
        self._config = getattr(module.model, "peft_config", {}).get(ADAPTER_NAME)

    @property
    def parts(self) -> dict[str, list[str]]:
        """Names of the weights that are gathered together: those of a layer, or a single one."""
        found: dict[str, list[str]] = {}
        for name in self.stored:
            layer = re.match(r".*?\.\d+(?=\.)", name)
            found.setdefault(layer[0] if layer else name, []).append(name)
        return found

    def part(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Weights on the CPU by name, gathered from all ranks; empty on ranks that do not keep them."""
        found: dict[str, Tensor] = {}
        adapted = dict.fromkeys(owner for name in names if (owner := name.rpartition(".")[0]) in self._adapters)
        for owner in adapted:
            found |= {f"{owner}.{own}": value for own, value in self._merged(owner).items()}
        for name in names:
            owner, _, own = name.rpartition(".")
            if owner in adapted:
                continue
            value = full(self.stored[name])
            if owner in self._rows and own == "weight":
                rows = full(self._rows[owner].new_rows).to(value.dtype)
                value = value.index_copy(0, self._rows[owner].new_ids, rows)
            if self.keep and owner in self._packed and own == "weight":
                value = self._packed[owner].values(value)
            if self.keep:
                found[name] = value.cpu()
        return {name: self._cast(found[name], self.dtype) for name in names if name in found}

    def files(self, max_size: str) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Any] | None]]:
        """Each weight file: its name, its tensors as transformers names them, and the index if there are several.

        Args:
            max_size: Maximum size of a file, such as ``5GB``.
        """
        empty = self.plain.state_dict()
        source = {
            n: part for part, own in self.parts.items() for n in self._written({name: empty[name] for name in own})
        }
        split = split_state_dict_into_shards_factory(
            self._written(empty),
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
                    left |= self._written(self.part(self.parts[part]))
            tensors = {name: left.pop(name).contiguous() for name in names if self.keep}
            yield file, tensors, index if split.is_sharded else None

    def _written(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors in the names and layouts of files, tied ones once."""
        left_out = {*self.plain.all_tied_weights_keys, *(self.plain._keys_to_ignore_on_save or ())}
        given = {name: tensor for name, tensor in tensors.items() if name not in left_out}
        found: dict[str, Tensor] = revert_weight_conversion(self.plain, given)
        return found

    def _merged(self, owner: str) -> dict[str, Tensor]:
        """The weights of a layer with an adapter in the precision of the wider of both."""
        layer, packed = self._adapters[owner], self._packed.get(owner)
        whole: dict[str, Tensor] = {}
        for name, parameter in layer.named_parameters():
            value = full(parameter)
            if self.keep and packed is not None and parameter is packed.layer.weight:
                value = packed.values(value)
            if self.keep:
                whole[name] = self._cast(value.cpu(), self.widest)
        if not self.keep:
            return {}
        if packed is not None:
            values, bias = whole.pop("base_layer.weight"), whole.pop("base_layer.bias", None)
            return merged_into(values, bias, whole, self._config).state_dict()
        parameters = {
            id(parameter): nn.Parameter(whole[name], requires_grad=False)
            for name, parameter in layer.named_parameters()
        }
        return merged(deepcopy(layer, parameters)).state_dict()

    @staticmethod
    def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
        return value.to(dtype) if value.is_floating_point() else value


def _architecture(module: SFTModule, dtype: torch.dtype) -> PreTrainedModel:
    """The exported model without memory."""
    assert module.model is not None
    if is_composite(module.model):
        raise InputError("what text does not use is read again from model.pretrained")
    with torch.device("meta"), default_dtype(dtype):
        plain = model_from_config(module.hparams["hf_config"])
    vars(plain.config).pop("quantization_config", None)  # weights are exported as plain ones
    if hasattr(module.model, "peft_config"):  # whose export begins with the pretrained model, and writes its names
        cast(Any, plain)._weight_conversions = getattr(module.model, "_weight_conversions", None)
    loading.check_copy(plain)
    return plain


def is_shared(folder: Path, first: FirstRank) -> bool:
    """Whether all ranks see a folder of rank 0, which is created if it is missing."""
    first(lambda: folder.mkdir(parents=True, exist_ok=True))
    seen = [folder.is_dir()]
    if first.group is not None:
        seen = [False] * dist.get_world_size(first.group)
        dist.all_gather_object(seen, folder.is_dir(), group=first.group)
    return all(seen)


def convert_shards(
    module: SFTModule,
    weights: ShardedWeights,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    rows: tuple[str, Sequence[Conversation]],
    settings: Settings,
    live: Live,
    facts: dict[str, Any],
    first: FirstRank,
) -> None:
    """Export a model in training as a Hugging Face folder, and compare it with the model; every rank calls this.

    Args:
        module: Module whose model is sharded.
        weights: Weights of the model.
        tokenizer: Tokenizer of the training.
        out: Folder to write, which all ranks see; an existing one is replaced.
        rows: Description of the rows, and the rows to compare on.
        settings: Settings of the export.
        live: Log-probabilities under the model in training.
        facts: Facts of the run.
        first: Rank 0, which writes.

    Raises:
        InputError: When the folder fails the comparison.
    """
    own, plain = dict(module.hparams), weights.plain
    report, _ = begun(rows[0], weights.widest, settings, live)
    assert module.scorer is not None
    trained = _log_probs(module, module.scorer, live.examples)
    report.targets, report.live = len(trained), mean_difference(trained, live)
    with whole_folder(out, replace=True) if first.is_here else nullcontext() as unfinished:
        folder = Path(first(lambda: str(unfinished)))
        first(lambda: write_settings(plain, tokenizer, folder, load_generation_config(own["pretrained"])))
        for file, tensors, index in weights.files(settings.max_shard_size):
            first(lambda: _write(folder, file, tensors, index))  # noqa: B023, called at once
        first(lambda: keep_files(plain, own["pretrained"], folder))
        scorer = _reloaded(module, folder, weights.widest)
        report.unequal_weights = _unequal(weights, scorer.model)
        report.models.append(parity.agreement("reloaded", trained, _log_probs(module, scorer, live.examples)))

        def compare() -> None:
            report.unkept = unkept(plain, {}, own["pretrained"], folder, weights.dtype)
            finish(folder, out, report, settings, own, facts, rows[1], tokenizer, live.examples, trained)

        first(compare)
    del scorer
    gc.collect()  # modules of FSDP2 refer to each other


def _write(folder: Path, file: str, tensors: dict[str, Tensor], index: dict[str, Any] | None) -> None:
    save_file(tensors, folder / file, metadata={"format": "pt"})
    if index is not None:
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


def _reloaded(module: SFTModule, folder: Path, dtype: torch.dtype) -> LikelihoodModel:
    """The model of a folder, sharded as that in training."""
    assert module.scorer is not None
    assert module.device_mesh is not None
    sharding = Sharding(module.device_mesh, *layout(module.trainer.strategy))
    with torch.random.fork_rng(devices=[]):
        model = loading.empty_model(str(folder), None, dtype)
        scorer = LikelihoodModel(model, module.scorer.findings)
        sharding.apply(scorer, model)
        loading.fill(model, str(folder), module.trainer.strategy.root_device, sharding.cpu_offload)
    return scorer


def _log_probs(module: SFTModule, scorer: LikelihoodModel, examples: Sequence[Example]) -> Tensor:
    """Log-probabilities of all tokens at the targets under a sharded model, ``[T, V]``, at its precision."""
    with eval_mode(scorer), evaluating(module):
        found: Tensor = scorer(None, lambda model, _: parity.log_probs(model, examples))
    cast(Any, scorer).reshard()  # after a forward pass FSDP2 keeps the embeddings whole, for a backward pass
    return found


def _unequal(weights: ShardedWeights, reloaded: PreTrainedModel) -> list[str]:
    """Names of the weights that differ in any bit from those that were to be written; known to rank 0."""
    theirs = reloaded.state_dict(keep_vars=True)
    differ = sorted(weights.plain.state_dict().keys() ^ theirs.keys())
    for names in weights.parts.values():
        ours = weights.part(names)
        for name in (name for name in names if name in theirs):
            value = full(theirs[name])
            if weights.keep and not torch.equal(ours[name], value.cpu().to(ours[name].dtype)):
                differ.append(name)
    return differ
