"""Export of a model in training from its shards: no rank ever has the whole model in memory.

Weights are gathered layer by layer, merged with their adapters, and written a file at a time; then rank 0 runs the
folder layer by layer, and compares it with the model in training on held-out rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightning_sft.export import parity
from lightning_sft.export.convert import Dtype, Live, Settings, begun, finish, mean_difference
from lightning_sft.export.folder import widest_dtype, write_settings
from lightning_sft.export.weights import Weights, architecture, cast_floating, compare_folder, write_file
from lightning_sft.io.disk import whole_folder
from lightning_sft.machine.contexts import eval_mode, evaluating
from lightning_sft.model.likelihood import LikelihoodModel
from lightning_sft.model.parallel.rank_zero import FirstRank
from lightning_sft.model.parallel.sharding import full
from lightning_sft.model.pretrained import load_generation_config
from lightning_sft.model.tuning import new_tokens
from lightning_sft.model.tuning.adapters import ADAPTER_NAME, merged, merged_into, outer_adapters, without_adapters
from lightning_sft.model.tuning.packed import unpacked
from lightning_sft.strategies import layout
from lightning_sft.types import Conversation, Example

if TYPE_CHECKING:
    from lightning_sft.module import SFTModule


class ShardedWeights(Weights):
    """The weights of a sharded model as they are exported.

    Every rank calls :meth:`part` with the same names in the same order.

    Args:
        module: Module whose model is sharded.
        dtype: Dtype of the exported weights; by default that of the trained ones.
        keep: Whether this rank gets the weights.

    Raises:
        InputError: When the model cannot be exported a part at a time.
    """

    def __init__(self, module: SFTModule, dtype: Dtype | None, keep: bool) -> None:
        assert module.model is not None
        widest = widest_dtype(module.model)
        target: torch.dtype = getattr(torch, dtype) if dtype else widest
        plain = architecture(module.hparams["hf_config"], target)
        if hasattr(module.model, "peft_config"):  # whose export begins with the pretrained model, and writes its names
            cast(Any, plain)._weight_conversions = getattr(module.model, "_weight_conversions", None)
        super().__init__(plain, widest, target, keep)
        with without_adapters(module.model):
            stored: dict[str, Tensor] = module.model.state_dict(keep_vars=True)
            self._packed = unpacked(module.model)
            stored |= {f"{name}.weight": forward.layer.weight for name, forward in self._packed.items()}
        self.stored = {n: stored[n] for n in self.plain.state_dict() if n not in self.plain.all_tied_weights_keys}
        self._adapters, self._rows = outer_adapters(module.model), new_tokens.modules(module.model)
        self._config = getattr(module.model, "peft_config", {}).get(ADAPTER_NAME)

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
        return {name: cast_floating(found[name], self.dtype) for name in names if name in found}

    def _merged(self, owner: str) -> dict[str, Tensor]:
        """The weights of a layer with an adapter in the precision of the wider of both."""
        layer, packed = self._adapters[owner], self._packed.get(owner)
        whole: dict[str, Tensor] = {}
        for name, parameter in layer.named_parameters():
            value = full(parameter)
            if self.keep and packed is not None and parameter is packed.layer.weight:
                value = packed.values(value)
            if self.keep:
                whole[name] = cast_floating(value.cpu(), self.widest)
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
        out: Folder to write; an existing one is replaced.
        rows: Description of the rows, and the rows to compare on.
        settings: Settings of the export.
        live: Log-probabilities under the model in training.
        facts: Facts of the run.
        first: Rank 0, which writes.

    Raises:
        InputError: When the folder fails the comparison.
    """
    own, plain, compute_dtype = dict(module.hparams), weights.plain, layout(module.trainer.strategy)[0]
    report, _ = begun(rows[0], weights.widest, settings, live)
    assert module.scorer is not None
    trained = _log_probs(module, module.scorer, live.examples)
    report.targets, report.live = len(trained), mean_difference(trained, live)
    with ExitStack() as unfinished:
        folder = Path(first(lambda: str(unfinished.enter_context(whole_folder(out, replace=True)))))
        first(lambda: write_settings(plain, tokenizer, folder, load_generation_config(own["pretrained"])))
        for file, tensors, index in weights.files(settings.max_shard_size):
            first(lambda: write_file(folder, file, tensors, index))  # noqa: B023, called at once

        def compare() -> None:
            dtype = weights.widest if compute_dtype is None else getattr(torch, compute_dtype)
            with evaluating(module):
                compare_folder(weights, folder, own["pretrained"], report, trained, live.examples, dtype, module.device)
            finish(folder, out, report, settings, own, facts, rows[1], tokenizer, live.examples, trained)

        first(compare)
        first(unfinished.close)  # which gives it its name


def _log_probs(module: SFTModule, scorer: LikelihoodModel, examples: Sequence[Example]) -> Tensor:
    """Log-probabilities of all tokens at the targets under a sharded model, ``[T, V]``, at its precision."""
    with eval_mode(scorer), evaluating(module):
        found: Tensor = scorer(None, lambda model, _: parity.log_probs(model, examples, module.device))
    cast(Any, scorer).reshard()  # after a forward pass FSDP2 keeps the embeddings whole, for a backward pass
    return found
