"""A checkpoint to a Hugging Face folder, compared with what was trained before it gets its name."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_sft import checkpoints, parity
from lightning_sft.data.mixture import as_mixture
from lightning_sft.export import check_is_free, whole_folder, widest_dtype, write
from lightning_sft.model_card import model_card
from lightning_sft.module import SFTModule
from lightning_sft.pretrained import load_exported, load_generation_config, load_tokenizer
from lightning_sft.run_facts import FACTS, validation_data
from lightning_sft.types import Conversation, Example, InputError

Dtype = Literal["float32", "bfloat16", "float16"]
_HALVES = (torch.bfloat16, torch.float16)
_EXACT, _ROUNDED = 1e-6, 1e-2  # mean KL that passes, with float32 throughout, and where anything is rounded to 16 bits


@dataclass(frozen=True)
class Settings:
    """How a folder is written.

    Args:
        dtype: Of the weights; that of the trained ones by default.
        max_shard_size: Of a file of weights, as ``5GB``.
        max_kl: Largest mean KL(trained ‖ exported), in nats a token; by default 1e-6, or 1e-2 where 16 bits come in.
    """

    dtype: Dtype | None = None
    max_shard_size: str = "5GB"
    max_kl: float | None = None


@dataclass(frozen=True)
class Live:
    """log Pr of the targets of sequences under the model in training, which the folder has to reproduce.

    Args:
        examples: The sequences.
        log_probs: One value a target, ``[T]``.
        in_16_bits: Whether the model in training computes in 16 bits.
    """

    examples: Sequence[Example]
    log_probs: Tensor
    in_16_bits: bool


def export_checkpoint(
    ckpt: str,
    out: str,
    dtype: Dtype | None = None,
    max_shard_size: str = "5GB",
    rows: str | None = None,
    max_kl: float | None = None,
) -> Path:
    """Write a checkpoint as a Hugging Face folder that plain transformers loads, and compare it with what was trained.

    Args:
        ckpt: The checkpoint: a file, or the folder that FSDP2, tensor parallelism or DeepSpeed writes.
        out: The folder to write; it must not exist yet.
        dtype: Of the weights; that of the trained ones by default. 16 bits halve the folder and round the weights.
        max_shard_size: Of a file of weights.
        rows: Rows to compare on; by default the first ones of the run's validation data, where it can be read.
        max_kl: Largest mean KL(trained || exported) in nats a token; by default 1e-6, or 1e-2 where 16 bits come in.

    Raises:
        InputError: When the checkpoint cannot be read, or the folder does not pass; it then is kept as ``OUT.failed``.
    """
    checkpoints.kind_of(ckpt)
    check_is_free(Path(out))
    found = checkpoints.facts(ckpt)
    name, conversations = rows_to_compare(found.get(FACTS, {}), rows)
    settings = Settings(dtype, max_shard_size, max_kl)
    whole = found | {"state_dict": checkpoints.weights(ckpt)}
    return convert(whole, tokenizer_of(found), Path(out), (name, conversations), settings)


def convert(
    checkpoint: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    rows: tuple[str, Sequence[Conversation]],
    settings: Settings = Settings(),
    live: Live | None = None,
    replace: bool = False,
) -> Path:
    """Write a checkpoint, whole on this process, as a folder, and compare.

    Args:
        checkpoint: With ``hyper_parameters`` and ``state_dict``, and what else is known of the run.
        tokenizer: Of the training.
        out: The folder.
        rows: Where the rows come from, and the rows to compare on.
        settings: How it is written.
        live: What the model in training makes of the same rows.
        replace: Whether a folder that is there gives way.

    Raises:
        InputError: When the folder does not pass.
    """
    with torch.random.fork_rng(devices=[]):  # a run that exports draws the same numbers as one that does not
        model = restored(checkpoint)
    dtype = widest_dtype(model)
    target = getattr(torch, settings.dtype) if settings.dtype else dtype
    is_rounded = torch.promote_types(dtype, target) != target
    in_16_bits = is_rounded or dtype in _HALVES or (live is not None and live.in_16_bits)
    most = settings.max_kl if settings.max_kl is not None else (_ROUNDED if in_16_bits else _EXACT)
    report = parity.Report(rows[0], most, dtype=_name(target), rounded_from=_name(dtype) if is_rounded else None)
    examples = parity.sequences(rows[1], tokenizer)
    trained = _in_float32(model, examples)
    report.targets = len(trained)
    if live is not None:
        report.live = _mean_difference(trained, live)
    if (merged := _merged(model)) is not model:
        model = merged
        report.models.append(parity.agreement("merged", trained, _in_float32(model, examples)))
    cast_weights(model, target)
    with whole_folder(out, replace) as folder:
        own = checkpoint["hyper_parameters"]
        write(model, tokenizer, folder, load_generation_config(own["pretrained"]), settings.max_shard_size)
        reloaded = load_exported(folder)
        report.unequal_weights = parity.unequal_weights(model, reloaded)
        report.unequal_ids = parity.unequal_ids(rows[1], tokenizer, load_tokenizer(str(folder)))
        report.models.append(parity.agreement("reloaded", trained, _in_float32(reloaded, examples)))
        found = report.as_json()
        (folder / "parity.json").write_text(json.dumps(found, indent=2, ensure_ascii=False), encoding="utf-8")
        (folder / "README.md").write_text(model_card(out.name, own, checkpoint.get(FACTS, {}), found), encoding="utf-8")
        report.show()
        if report.failures:
            raise _failed(folder, out, report)
    return out


def restored(checkpoint: Mapping[str, Any]) -> PreTrainedModel:
    """The model of a checkpoint on the CPU, its weights in the dtype that they have there.

    Raises:
        InputError: When the checkpoint is not of :class:`SFTModule`, or its weights are of another architecture.
    """
    known = inspect.signature(SFTModule.__init__).parameters
    own = {name: value for name, value in checkpoint.get("hyper_parameters", {}).items() if name in known}
    if not own.get("hf_config"):
        raise InputError("The checkpoint does not say which model it is of (hf_config); SFTModule did not write it.")
    module = SFTModule(**own)
    module.configure_model()
    module.on_load_checkpoint(dict(checkpoint))
    try:
        module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading, assign=True)
    except RuntimeError as error:
        raise InputError(f"The weights of the checkpoint are not those of its model: {error}") from error
    assert module.model is not None
    module.model.tie_weights()  # a checkpoint may hold both ends of a tie, each by itself
    return module.model


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast what is saved of a model, in place; tables that are computed, as of rotary positions, stay as they are."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def tokenizer_of(facts: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, with the chat template that it was trained with."""
    states = (state for state in facts.values() if isinstance(state, dict) and "chat_template" in state)
    data: dict[str, Any] = next(states, {})  # under the name of the data module's class, which may be the user's own
    tokenizer = load_tokenizer(data.get("tokenizer") or facts["hyper_parameters"]["pretrained"])
    tokenizer.chat_template = data.get("chat_template") or tokenizer.chat_template
    return tokenizer


def rows_to_compare(facts: Mapping[str, Any], rows: str | None = None) -> tuple[str, Sequence[Conversation]]:
    """Rows on which models are compared, and what they are: those given, or of the run's validation data.

    Args:
        facts: Of the run.
        rows: A file of rows.

    Raises:
        InputError: When the rows that were given cannot be read.
    """
    if rows is not None:
        found = parity.held_out(as_mixture(rows))
        return f"{len(found)} rows of {rows}", found
    mixture = validation_data(facts)
    try:
        if mixture is not None:
            found = parity.held_out(mixture)
            return f"{len(found)} rows of the run's validation data", found
        why = "the run had no validation data in files"
    except InputError as error:  # another machine, say
        why = f"the run's validation data cannot be read: {error}"
    return f"a few built-in rows ({why}; give some with rows=FILE.jsonl)", parity.built_in()


def _in_float32(model: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """Log Pr of all tokens at the targets, in float32 whatever they are stored in: a CPU may be slow in others."""
    tensors = [t for t in model.state_dict(keep_vars=True).values() if t.is_floating_point()]
    stored = [tensor.data for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.float()
    try:
        return parity.log_probs(model, examples)
    finally:
        for tensor, data in zip(tensors, stored, strict=True):
            tensor.data = data


def _merged(model: PreTrainedModel) -> PreTrainedModel:
    return model


def _mean_difference(trained: Tensor, live: Live) -> float:
    targets = [t for e in live.examples for t, w in zip(e.input_ids[1:], e.target_weights[1:], strict=True) if w > 0]
    own = trained.gather(1, torch.tensor(targets)[:, None]).squeeze(1)
    return float((own.double() - live.log_probs.double()).abs().mean())


def _failed(folder: Path, out: Path, report: parity.Report) -> InputError:
    kept = out.with_name(f"{out.name}.failed")
    shutil.rmtree(kept, ignore_errors=True)
    folder.rename(kept)
    return InputError(
        f"The exported model is not the one that was trained: {'; '.join(report.failures)}. It is in {kept}, "
        "with what was measured in parity.json. Where weights were rounded, another dtype may do, or a higher max_kl."
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
