"""Facts of a run besides its weights, stored in its checkpoints and shown in the model card of an export."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_sft.checkpoints.reading import RUN_INFO_KEY, found_from
from lightning_sft.data.rows.messages import Reading
from lightning_sft.data.rows.mixture import Mixture, Part, as_mixture
from lightning_sft.data.rows.sources import Source, files_of
from lightning_sft.data.tokens.held_out import Side, side_of
from lightning_sft.data.tokens.template_config import TemplateConfig
from lightning_sft.training.optimizers import parts_of
from lightning_sft.training.trainer import datamodule_of
from lightning_sft.types import InputError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch.optim import Optimizer

    from lightning_sft.data.tokens.dataset import Split
    from lightning_sft.datamodule import SFTDataModule

_PACKAGES = ("lightning-sft", "lightning", "torch", "transformers", "tokenizers", "peft", "deepspeed")
_TRAINER = (
    *("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
    *("max_steps", "max_epochs", "num_nodes", "world_size"),
)
_FILES = 8  # of a part; an export reads a few rows
_OF_PARTS = ("system", "train_on", "chat_template_kwargs", "first")
_OF_MIXTURES = {"by": "rows", "temperature": None}  # with their defaults
_DATA = ("packing", "tokens_per_batch", "max_length", "overflow", "invalid_rows", "streaming", "seed", "held_out")

_ARGUMENTS = {"variables": "chat_template_kwargs", "held_out": "val"}  # what facts are called that have another name


def run_info(trainer: Trainer) -> dict[str, Any]:
    """Step, metrics, optimizer, settings, data and versions of a training run, as plain values.

    Every process must call this, since it reduces metrics over ranks.

    Args:
        trainer: Lightning trainer; its data module may be the user's own.
    """
    data = datamodule_of(trainer)
    return {
        "folder": str(Path.cwd()),  # which relative paths are relative to
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "optimizer": optimizer_facts(trainer.optimizers[0]) if trainer.optimizers else {},
        "trainer": {"strategy": type(trainer.strategy).__name__} | _plain(trainer, _TRAINER),
        **_data_info(data),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _data_info(data: Any) -> dict[str, Any]:
    """Settings of a data module, and its splits."""
    return {
        "data_module": {"class": type(data).__name__} | _plain(data, _DATA),
        "reading": _different(getattr(data, "reading", None), Reading()),
        "template": _template(data),
        "data": {name: _split(cast("SFTDataModule", data), name) for name in getattr(data, "splits", {})},
    }


def data_differences(trainer: Trainer, checkpoint: Mapping[str, Any]) -> str:
    """The settings of the training data that are not those of a checkpoint, in words; empty if none is known to differ.

    Args:
        trainer: Trainer whose data are set up.
        checkpoint: Loaded checkpoint.
    """
    of_run = checkpoint.get(RUN_INFO_KEY)
    if not of_run:  # of Lightning, or an early version
        return ""
    now = _data_info(datamodule_of(trainer))
    found: dict[str, str] = {}
    for section in ("data_module", "reading", "template"):
        before, after = of_run.get(section, {}), now[section]
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name) and name != "stop_ids":
                was, is_now = before.get(name, "the default"), after.get(name, "the default")
                found[f"data.{_ARGUMENTS.get(name, name)}"] = f"was {was}, now {is_now}"
    before, after = (facts.get("data", {}).get("train", {}) for facts in (of_run, now))
    parts, own = before.get("parts", []), after.get("parts", [])
    for key in ("source", "rows", "share", "weight") if parts else ():
        was, is_now = (", ".join(str(part.get(key)) for part in of) for of in (parts, own))
        if was != is_now:
            found["data.train" if key == "source" else f"{key} of data.train"] = f"was {was}, now {is_now}"
    for key, default in _OF_MIXTURES.items() if parts else ():
        if (was := before.get(key, default)) != (is_now := after.get(key, default)):
            found[f"{key} of data.train"] = f"was {was}, now {is_now}"
    return "; ".join(f"{name} {said}" for name, said in found.items())


def save_run_info(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Put :func:`run_info` into a checkpoint; every process must call this."""
    checkpoint[RUN_INFO_KEY] = run_info(trainer)


class LoggedSettings:
    """What the loggers get of a fit's settings: hyperparameters, optimizer, learning rate and data, all at once.

    Lightning would log the hyperparameters by themselves, before there is an optimizer, and TensorBoard shows and keeps
    only what it is given first.
    """

    def __init__(self) -> None:
        self._logging: list[Any] = []  # what Lightning would log the hyperparameters of

    def defer(self, trainer: Trainer) -> None:
        """Let Lightning log none in a fit; to be called in ``setup``, before it does.

        Args:
            trainer: The Lightning trainer.
        """
        self._restore()
        if trainer.state.fn == "fit":
            holders = (trainer.lightning_module, datamodule_of(trainer))
            self._logging = [holder for holder in holders if getattr(holder, "_log_hyperparams", False)]
            for holder in self._logging:
                holder._log_hyperparams = False

    def log(self, trainer: Trainer) -> None:
        """Log everything, when the optimizer has been made and the data set up; every process must call this."""
        logging = self._logging
        self._restore()
        if not trainer.loggers:
            return
        module, facts = trainer.lightning_module, run_info(trainer)
        settings = {name: value for name, value in module.hparams_initial.items() if not name.startswith("_")}
        settings |= {name: facts[name] for name in ("optimizer", "data_module", "data")}
        for holder in logging:
            for name, value in holder.hparams_initial.items() if holder is not module else ():  # the user's data module
                if not name.startswith("_"):
                    settings[name if name not in settings else f"data_module/{name}"] = value
        for logger in trainer.loggers:
            logger.log_hyperparams(settings)
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                file = os.path.join(logger.log_dir, logger.NAME_HPARAMS_FILE)  # Lightning writes it once
                save_hparams_to_yaml(file, logger.hparams)

    def _restore(self) -> None:
        for holder in self._logging:
            holder._log_hyperparams = True
        self._logging = []


def _template(data: Any) -> dict[str, Any]:
    """How conversations are rendered, where it is not the default."""
    found = getattr(data, "template", None)  # of a data module of somebody else's, it may be anything
    return found.different if isinstance(found, TemplateConfig) else {}


def _different(settings: Any, defaults: Any) -> dict[str, Any]:
    """The settings that are not the default ones."""
    own = {} if settings is None else asdict(settings)
    return {key: value for key, value in own.items() if value != getattr(defaults, key)}


def validation_data(facts: Mapping[str, Any]) -> tuple[Mixture, Reading, Side | None] | None:
    """The validation data recorded by :func:`run_info`, how they are read, and which of the rows they are.

    ``None`` if they were rows in memory.

    The checkpoint may come from somebody else, so only individually named files are read; no folder or pattern is
    searched.

    Args:
        facts: Facts of the run.

    Raises:
        InputError: When a recorded file does not exist.
    """
    parts = facts.get("data", {}).get("val", {}).get("parts", [])
    known = {part["name"]: part for part in parts if part["source"] is not None}
    if not known:
        return None
    made = {
        name: Part(
            _files(part, facts.get("folder")), **{key: part.get(key) for key in ("format", "columns", *_OF_PARTS)}
        )
        for name, part in known.items()
    }
    side = side_of("val", facts.get("data_module", {}).get("held_out"))
    return Mixture(dict(made)), Reading(**facts.get("reading", {})), side


def _files(part: Mapping[str, Any], folder: str | None) -> list[str]:
    source = part.get("files") or part["source"]
    names = [found_from(folder, name) for name in ([source] if isinstance(source, str) else source)]
    for name in names:
        if not (Path(name).is_file() or name.startswith("hf:") or (Path(name) / "dataset_info.json").is_file()):
            raise InputError(f"there is no file {name!r}")
    return names


@lru_cache(maxsize=64)  # a run asks at each checkpoint
def _first_files(name: str) -> list[str]:
    if name.startswith("hf:") or (Path(name) / "dataset_info.json").is_file():
        return [name]
    return [str(file) for file in files_of(name)[:_FILES]]


def _split(data: SFTDataModule, name: str) -> dict[str, Any]:
    """A split of a data module: its parts with sources and sizes, and the number of rows left out."""
    split, mixture = data.splits[name], as_mixture(cast(Mixture | Source, data.sources[name]))
    chosen = {key: found for key, default in _OF_MIXTURES.items() if (found := getattr(mixture, key)) != default}
    of_part = [
        {
            "name": part_name,
            "source": _name_of(part.source),
            **({"files": _files_of(part.source)} if name == "val" else {}),
            "format": part.format or data.reading.format,
            "columns": part.columns or data.reading.columns,
            **{key: value for key in _OF_PARTS if (value := getattr(part, key)) is not None},
            "share": part.share,
            "weight": part.weight,
        }
        for part_name, part in mixture.of_name.items()
    ]
    if name == "train" and data.streaming:  # only its first rows were read in advance
        return {"parts": of_part, **chosen}
    sizes = zip(_rows_of_parts(split), split.part_sizes, strict=True)
    counted = [{"rows": rows, "sequences": sequences} for rows, sequences in sizes]
    left_out = {"refused": _refused(split), "too_long": len(split.account.too_long), "cut": len(split.account.cut)}
    parts = [part | count for part, count in zip(of_part, counted, strict=True)]
    return {"parts": parts, **chosen, "targets": split.num_targets, **left_out}


def _rows_of_parts(split: Split) -> list[int]:
    """Number of rows of each part; a row may yield several sequences."""
    ends = np.searchsorted(split.examples.sequences_per_row.cumsum(), np.cumsum(split.part_sizes), side="right")
    rows: list[int] = np.diff(ends, prepend=0).tolist()
    return rows


def _refused(split: Split) -> int:
    return len(split.account.refused) + int(split.account.unlisted["refused"])


def _name_of(source: Any) -> str | list[str] | None:
    """The name of a source, or ``None`` for rows in memory."""
    if isinstance(source, (list, tuple)) and source and all(isinstance(item, (str, Path)) for item in source):
        return [str(item) for item in source]
    return str(source) if isinstance(source, (str, Path)) else None


def _files_of(source: Any) -> list[str] | None:
    """The first files of a named source, or ``None`` if it no longer exists."""
    names = _name_of(source)
    if names is None:
        return None
    try:
        found = [file for name in ([names] if isinstance(names, str) else names) for file in _first_files(name)]
    except InputError:
        return None
    return found[:_FILES]


def optimizer_facts(optimizer: Optimizer) -> dict[str, Any]:
    """Classes and settings of an optimizer as plain values; the learning rate is the one that its schedule scales."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # DeepSpeed wraps it
    first: dict[str, Any] = optimizer.param_groups[0]
    settings = {name: first.get(name, value) for name, value in getattr(optimizer, "defaults", {}).items()}
    settings |= {"lr": first.get("initial_lr", first.get("lr"))}
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in settings.items()}
    kinds = [type(part).__name__ for part in parts_of(optimizer)]
    return {"class": " and ".join(kinds)} | {n: v for n, v in plain.items() if isinstance(v, (int, float, list))}


def _plain(of: Any, names: tuple[str, ...]) -> dict[str, Any]:
    found = {name: getattr(of, name, None) for name in names}
    return {name: v for name, v in found.items() if isinstance(v, (bool, int, float, str))}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
