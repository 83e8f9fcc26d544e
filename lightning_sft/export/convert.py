"""Conversion of a checkpoint to a Hugging Face folder, compared with the trained model before it gets its name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_sft.checkpoints.reading import RUN_INFO_KEY, Checkpoint
from lightning_sft.checkpoints.run_info import validation_data
from lightning_sft.checkpoints.writing import checkpoint_of
from lightning_sft.data.rows.mixture import as_mixture
from lightning_sft.export import hub, parity
from lightning_sft.export.folder import set_aside, widest_dtype, write, write_settings
from lightning_sft.export.gguf_file import GGUFType, check_converter, write_gguf
from lightning_sft.export.kept import keep_files, pretrained_parts, put_back, unkept
from lightning_sft.export.model_card import model_card
from lightning_sft.export.restore import cast_weights, restored, tokenizer_of
from lightning_sft.export.weights import StoredWeights, architecture, compare_folder, log_probs, write_file
from lightning_sft.io.arguments import FileSize, Name, NonNegative, check_arguments
from lightning_sft.io.disk import check_is_free, whole_folder
from lightning_sft.io.words import counted
from lightning_sft.model.pretrained import load_exported, load_generation_config, load_model, load_tokenizer
from lightning_sft.model.tuning.adapters import has_adapters, merge
from lightning_sft.types import Conversation, Example, InputError

Dtype = Literal["float32", "bfloat16", "float16"]
_HALVES = (torch.bfloat16, torch.float16)
_EXACT, _ROUNDED = 1e-6, 1e-2  # maximum mean KL, with float32 throughout, and with any half precision


@dataclass(frozen=True)
class Settings:
    """Settings of an export.

    Args:
        dtype: Dtype of the exported weights; by default that of the trained weights.
        max_shard_size: Maximum size of a weight file, such as ``5GB``.
        max_kl: Maximum mean KL(trained ‖ exported) in nats per token; by default 1e-6, or 1e-2 with half precision.
        gguf_converter: Path of llama.cpp's converter, to also write a GGUF file, see
            :mod:`lightning_sft.export.gguf_file`.
        gguf_type: Storage type of the weights in the GGUF file.
    """

    dtype: Dtype | None = None
    max_shard_size: FileSize = "5GB"
    max_kl: NonNegative | None = None
    gguf_converter: str | Path | None = None
    gguf_type: GGUFType = "f16"

    def __post_init__(self) -> None:
        check_arguments(Settings, vars(self), "export")

    def most(self, in_16_bits: bool) -> float:
        """The maximum mean KL that passes, with half precision or without."""
        return self.max_kl if self.max_kl is not None else _ROUNDED if in_16_bits else _EXACT


@dataclass(frozen=True)
class Live:
    """Log-probabilities of targets under the model in training, which the exported folder has to reproduce.

    Args:
        examples: Sequences of the targets.
        log_probs: Log-probability of each target, ``[T]``.
        in_16_bits: Whether the model in training computes in half precision.
    """

    examples: Sequence[Example]
    log_probs: Tensor
    in_16_bits: bool


def export_checkpoint(
    ckpt: Name | Path,
    out: Name | Path,
    dtype: Dtype | None = None,
    max_shard_size: FileSize = "5GB",
    rows: str | Path | None = None,
    max_kl: NonNegative | None = None,
    gguf_converter: str | Path | None = None,
    gguf_type: GGUFType = "f16",
    push: str | None = None,
) -> Path:
    """Export a checkpoint as a Hugging Face folder for plain transformers, and compare it with the trained model.

    Args:
        ckpt: Checkpoint: a file; a folder written by FSDP2, tensor parallelism or DeepSpeed; or the folder of a run
            or of checkpoints, whose newest is used.
        out: Folder to write, which must not exist yet.
        dtype: Dtype of the exported weights; by default that of the trained ones. Half precision halves the size and
            rounds.
        max_shard_size: Maximum size of a weight file.
        rows: File of rows to compare on; by default the first rows of the run's validation data, if readable.
        max_kl: Maximum mean KL(trained || exported) in nats per token; by default 1e-6, or 1e-2 with half precision.
        gguf_converter: Path of llama.cpp's convert_hf_to_gguf.py, to also write and compare a GGUF file.
        gguf_type: Storage type of the weights in the GGUF file.
        push: Repository of the Hugging Face hub, as owner/name, to upload the folder to once it has passed the
            comparison; one that does not exist is created, private. Nothing is uploaded by default.

    Returns:
        Path of the folder.

    Raises:
        InputError: When the checkpoint cannot be read, the folder cannot be uploaded, or it fails the comparison; it is
            then kept as ``OUT.failed``, or under the next free name.
    """
    check_arguments(export_checkpoint, locals(), "export")
    if push is not None:
        hub.check_repository(push)
    if gguf_converter is not None:
        check_converter(gguf_converter)
    checkpoint = Checkpoint(checkpoint_of(str(ckpt)))
    metadata = checkpoint.metadata
    check_is_free(Path(out))
    found = rows_to_compare(metadata.get(RUN_INFO_KEY, {}), rows)
    settings = Settings(dtype, max_shard_size, max_kl, gguf_converter, gguf_type)
    folder = from_checkpoint(checkpoint, Path(out), found, settings)
    if push is not None:
        rank_zero_info(f"Uploaded to {hub.push(folder, push)}")
    return folder


def from_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    rows: tuple[str, Sequence[Conversation]],
    settings: Settings,
    replace: bool = False,
) -> Path:
    """Export a checkpoint on disk, see :func:`convert`; a distributed one a part at a time, where that is possible.

    Raises:
        InputError: When the checkpoint cannot be read, or the folder fails the comparison.
    """
    tokenizer = tokenizer_of(checkpoint.metadata)
    if checkpoint.kind == "distributed":
        try:
            weights = StoredWeights(checkpoint, settings.dtype)
        except InputError as error:
            rank_zero_info(f"The whole model is read to export it: {error}.")
        else:
            return convert_parts(checkpoint.metadata, weights, tokenizer, out, rows, settings, replace)
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
    """Export an unsharded checkpoint as a Hugging Face folder, and compare it with the trained model.

    Args:
        checkpoint: Checkpoint with ``hyper_parameters``, ``state_dict``, and facts of the run.
        tokenizer: Tokenizer of the training.
        out: Folder to write.
        rows: Description of the rows, and the rows to compare on.
        settings: Settings of the export.
        live: Log-probabilities under the model in training, to compare as well.
        replace: Whether to replace an existing folder.

    Returns:
        Path of the folder.

    Raises:
        InputError: When the folder fails the comparison.
    """
    own = checkpoint["hyper_parameters"]
    with torch.random.fork_rng(devices=[]):  # exporting must not change the random numbers of a run
        model = restored(checkpoint)
        parts = pretrained_parts(model, own["pretrained"])
    dtype = widest_dtype(model)
    examples = parity.sequences(rows[1], tokenizer)
    report, target = begun(parity.used(*rows, examples), dtype, settings, live)
    trained = _in_float32(model, examples)
    report.targets = len(trained)
    if live is not None:
        report.live = mean_difference(trained, live)
    if has_adapters(model):
        cast_weights(model, dtype)  # adapters may have higher precision than their base
        merge(model)
        report.models.append(parity.agreement("merged", trained, _in_float32(model, examples)))
    put_back(model, parts)
    cast_weights(model, target)
    with whole_folder(out, replace) as folder:
        write(model, tokenizer, folder, load_generation_config(own["pretrained"]), settings.max_shard_size)
        keep_files(model, own["pretrained"], folder)
        reloaded = load_exported(folder)
        report.unkept = unkept(reloaded, parts, own["pretrained"], folder, target)
        report.unequal_weights = parity.unequal_weights(model, reloaded)
        report.models.append(parity.agreement("reloaded", trained, _in_float32(reloaded, examples)))
        del reloaded
        facts = checkpoint.get(RUN_INFO_KEY, {})
        finish(folder, out, report, settings, own, facts, rows[1], tokenizer, examples, trained)
    return out


def convert_parts(
    facts: Mapping[str, Any],
    weights: StoredWeights,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    rows: tuple[str, Sequence[Conversation]],
    settings: Settings = Settings(),
    replace: bool = False,
) -> Path:
    """Export the weights of a checkpoint like :func:`convert`, with a file of them and a layer in memory at a time.

    Args:
        facts: Metadata of the checkpoint.
        weights: Weights of the checkpoint.
        tokenizer: Tokenizer of the training.
        out: Folder to write.
        rows: Description of the rows, and the rows to compare on.
        settings: Settings of the export.
        replace: Whether to replace an existing folder.

    Returns:
        Path of the folder.

    Raises:
        InputError: When the folder fails the comparison.
    """
    own, computed_in = facts["hyper_parameters"], (torch.float32, torch.device("cpu"))
    examples = parity.sequences(rows[1], tokenizer)
    report, _ = begun(parity.used(*rows, examples), weights.widest, settings, None)
    model = architecture(weights.hf_config, torch.float32)
    trained = log_probs(model, weights.trained, examples, *computed_in)
    report.targets = len(trained)
    with whole_folder(out, replace) as folder:
        write_settings(weights.plain, tokenizer, folder, load_generation_config(own["pretrained"]))
        for file, tensors, index in weights.files(settings.max_shard_size):
            write_file(folder, file, tensors, index)
        compare_folder(weights, folder, own["pretrained"], report, trained, examples, *computed_in)
        run = facts.get(RUN_INFO_KEY, {})
        finish(folder, out, report, settings, own, run, rows[1], tokenizer, examples, trained)
    return out


def begun(rows: str, dtype: torch.dtype, settings: Settings, live: Live | None) -> tuple[parity.Report, torch.dtype]:
    """An empty report, and the dtype of the exported weights.

    Args:
        rows: Description of the rows to compare on.
        dtype: Dtype that holds all trained weights.
        settings: Settings of the export.
        live: Log-probabilities under the model in training, or ``None``.
    """
    target: torch.dtype = getattr(torch, settings.dtype) if settings.dtype else dtype
    is_rounded = torch.promote_types(dtype, target) != target
    in_16_bits = is_rounded or dtype in _HALVES or (live is not None and live.in_16_bits)
    report = parity.Report(rows, settings.most(in_16_bits), dtype=_name(target))
    report.rounded_from = _name(dtype) if is_rounded else None
    return report, target


def finish(
    folder: Path,
    out: Path,
    report: parity.Report,
    settings: Settings,
    own: Mapping[str, Any],
    facts: Mapping[str, Any],
    rows: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    trained: Tensor,
) -> None:
    """Compare the tokenizer and a GGUF file too, and write the report and the model card.

    Args:
        folder: Unfinished folder.
        out: Path that it will have.
        report: Comparison of its weights.
        settings: Settings of the export.
        own: Hyperparameters of the module.
        facts: Facts of the run.
        rows: Rows to compare on.
        tokenizer: Tokenizer of the training.
        examples: Sequences of the rows.
        trained: Log-probabilities of all tokens at their targets under the trained model, ``[T, V]``.

    Raises:
        InputError: When the folder fails the comparison, or the GGUF file cannot be written; the folder is kept as
            ``OUT.failed``.
    """
    no_gguf: InputError | None = None
    report.unequal_ids = parity.unequal_ids(rows, tokenizer, load_tokenizer(str(folder)))
    if settings.gguf_converter is not None:
        try:
            file = load_model(str(write_gguf(folder, settings.gguf_converter, settings.gguf_type)))
        except InputError as error:
            no_gguf = error
        else:
            report.most = report.most if settings.gguf_type == "f32" else settings.most(in_16_bits=True)
            report.models.append(parity.agreement(f"GGUF, {settings.gguf_type}", trained, _in_float32(file, examples)))
    found = report.as_json()
    (folder / "parity.json").write_text(json.dumps(found, indent=2, ensure_ascii=False), encoding="utf-8")
    (folder / "README.md").write_text(model_card(out.name, own, facts, found), encoding="utf-8")
    report.show()
    if report.failures:
        raise _failed(folder, out, report)
    if no_gguf is not None:
        raise InputError(f"{no_gguf}\nThe exported model has passed its comparison; it is in {set_aside(folder, out)}.")


def rows_to_compare(facts: Mapping[str, Any], rows: str | Path | None = None) -> tuple[str, Sequence[Conversation]]:
    """Rows to compare models on, with a description: given rows, the run's validation data, or built-in rows.

    Args:
        facts: Facts of the run.
        rows: File of rows, or ``None``.

    Raises:
        InputError: When the given rows cannot be read.
    """
    if rows is not None:
        found = parity.held_out(as_mixture(rows))
        return f"{counted(len(found), 'row')} of {rows}", found
    try:
        if (recorded := validation_data(facts)) is not None:
            found = parity.held_out(*recorded)
            return f"{counted(len(found), 'row')} of the run's validation data", found
        why = "the run had no validation data in files"
    except InputError as error:  # e.g. on another machine
        why = f"the run's validation data cannot be read: {error}"
    return f"a few built-in rows ({why}; give some with rows=FILE.jsonl)", parity.built_in()


def _in_float32(model: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """Log-probabilities of all tokens at the targets, ``[T, V]``, in float32: CPUs may be slow in other dtypes."""
    tensors = [t for t in model.state_dict(keep_vars=True).values() if t.is_floating_point()]
    stored = [tensor.data for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.float()
    try:
        return parity.log_probs(model, examples)
    finally:
        for tensor, data in zip(tensors, stored, strict=True):
            tensor.data = data


def mean_difference(trained: Tensor, live: Live) -> float:
    """Mean absolute difference of log Pr of the targets from the model in training."""
    targets = [t for e in live.examples for t, w in zip(e.input_ids[1:], e.target_weights[1:], strict=True) if w > 0]
    own = trained.gather(1, torch.tensor(targets)[:, None]).squeeze(1)
    return float((own.double() - live.log_probs.cpu().double()).abs().mean())


def _failed(folder: Path, out: Path, report: parity.Report) -> InputError:
    kept = set_aside(folder, out)
    return InputError(
        f"The exported model is not the one that was trained: {'; '.join(report.failures)}. It is in {kept}, "
        "with the measurements in parity.json. If weights were rounded, use another dtype or a higher max_kl."
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
