"""A checkpoint to a Hugging Face folder, compared with what was trained before it gets its name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_sft.checkpoints.reading import Checkpoint
from lightning_sft.checkpoints.run_info import RUN_INFO_KEY, validation_data
from lightning_sft.checkpoints.writing import checkpoint_of
from lightning_sft.data.rows.mixture import as_mixture
from lightning_sft.export import parity
from lightning_sft.export.folder import check_is_free, set_aside, whole_folder, widest_dtype, write
from lightning_sft.export.gguf_file import GGUFType, write_gguf
from lightning_sft.export.model_card import model_card
from lightning_sft.export.restore import cast_weights, restored, tokenizer_of
from lightning_sft.io.arguments import NonNegative, check_arguments
from lightning_sft.model.pretrained import load_exported, load_generation_config, load_model, load_tokenizer
from lightning_sft.model.tuning.adapters import has_adapters, merge
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
        gguf_converter: llama.cpp's, which then writes a GGUF file too, see :mod:`lightning_sft.export.gguf_file`.
        gguf_type: How the GGUF file stores weights.
    """

    dtype: Dtype | None = None
    max_shard_size: str = "5GB"
    max_kl: NonNegative | None = None
    gguf_converter: str | Path | None = None
    gguf_type: GGUFType = "f16"

    def __post_init__(self) -> None:
        check_arguments(Settings, vars(self), "export")

    def most(self, in_16_bits: bool) -> float:
        """The largest mean KL that passes, where 16 bits come in or not."""
        return self.max_kl if self.max_kl is not None else _ROUNDED if in_16_bits else _EXACT


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
    ckpt: str | Path,
    out: str | Path,
    dtype: Dtype | None = None,
    max_shard_size: str = "5GB",
    rows: str | Path | None = None,
    max_kl: NonNegative | None = None,
    gguf_converter: str | Path | None = None,
    gguf_type: GGUFType = "f16",
) -> Path:
    """Write a checkpoint as a Hugging Face folder that plain transformers loads, and compare it with what was trained.

    Args:
        ckpt: The checkpoint: a file, the folder that FSDP2, tensor parallelism or DeepSpeed writes, or the folder of a
            run, whose newest checkpoint is taken.
        out: The folder to write; it must not exist yet.
        dtype: Of the weights; that of the trained ones by default. 16 bits halve the folder and round the weights.
        max_shard_size: Of a file of weights.
        rows: Rows to compare on; by default the first ones of the run's validation data, where it can be read.
        max_kl: Largest mean KL(trained || exported) in nats a token; by default 1e-6, or 1e-2 where 16 bits come in.
        gguf_converter: convert_hf_to_gguf.py of llama.cpp, to write a GGUF file too, and compare it.
        gguf_type: How the GGUF file stores weights.

    Raises:
        InputError: When the checkpoint cannot be read, or the folder does not pass; it then is kept as
            ``OUT.failed``, or under the next free name.
    """
    check_arguments(export_checkpoint, locals(), "export")
    checkpoint = Checkpoint(checkpoint_of(str(ckpt)))
    metadata = checkpoint.metadata
    check_is_free(Path(out))
    found = rows_to_compare(metadata.get(RUN_INFO_KEY, {}), rows)
    return from_checkpoint(
        checkpoint.path, Path(out), found, Settings(dtype, max_shard_size, max_kl, gguf_converter, gguf_type)
    )


def from_checkpoint(
    path: str | Path,
    out: Path,
    rows: tuple[str, Sequence[Conversation]],
    settings: Settings,
    replace: bool = False,
) -> Path:
    """Convert a checkpoint on disk, see :func:`convert`."""
    checkpoint = Checkpoint(path)
    tokenizer = tokenizer_of(checkpoint.metadata)
    return convert(checkpoint.whole(), tokenizer, out, rows, settings, replace=replace)


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
    report = parity.Report(rows[0], settings.most(in_16_bits), dtype=_name(target))
    report.rounded_from = _name(dtype) if is_rounded else None
    examples = parity.sequences(rows[1], tokenizer)
    trained = _in_float32(model, examples)
    report.targets = len(trained)
    if live is not None:
        report.live = _mean_difference(trained, live)
    if has_adapters(model):
        cast_weights(model, dtype)  # adapters may be finer than their base
        merge(model)
        report.models.append(parity.agreement("merged", trained, _in_float32(model, examples)))
    cast_weights(model, target)
    with whole_folder(out, replace) as folder:
        own = checkpoint["hyper_parameters"]
        write(model, tokenizer, folder, load_generation_config(own["pretrained"]), settings.max_shard_size)
        reloaded = load_exported(folder)
        report.unequal_weights = parity.unequal_weights(model, reloaded)
        report.unequal_ids = parity.unequal_ids(rows[1], tokenizer, load_tokenizer(str(folder)))
        report.models.append(parity.agreement("reloaded", trained, _in_float32(reloaded, examples)))
        if settings.gguf_converter is not None:
            del reloaded
            file = load_model(str(write_gguf(folder, settings.gguf_converter, settings.gguf_type)))
            report.most = settings.most(in_16_bits or settings.gguf_type != "f32")
            report.models.append(parity.agreement(f"GGUF, {settings.gguf_type}", trained, _in_float32(file, examples)))
        found = report.as_json()
        (folder / "parity.json").write_text(json.dumps(found, indent=2, ensure_ascii=False), encoding="utf-8")
        (folder / "README.md").write_text(
            model_card(out.name, own, checkpoint.get(RUN_INFO_KEY, {}), found), encoding="utf-8"
        )
        report.show()
        if report.failures:
            raise _failed(folder, out, report)
    return out


def rows_to_compare(facts: Mapping[str, Any], rows: str | Path | None = None) -> tuple[str, Sequence[Conversation]]:
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
    try:
        mixture = validation_data(facts)
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


def _mean_difference(trained: Tensor, live: Live) -> float:
    targets = [t for e in live.examples for t, w in zip(e.input_ids[1:], e.target_weights[1:], strict=True) if w > 0]
    own = trained.gather(1, torch.tensor(targets)[:, None]).squeeze(1)
    return float((own.double() - live.log_probs.cpu().double()).abs().mean())


def _failed(folder: Path, out: Path, report: parity.Report) -> InputError:
    kept = set_aside(folder, out)
    return InputError(
        f"The exported model is not the one that was trained: {'; '.join(report.failures)}. It is in {kept}, "
        "with what was measured in parity.json. Where weights were rounded, another dtype may do, or a higher max_kl."
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
