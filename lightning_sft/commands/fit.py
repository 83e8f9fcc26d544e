"""``fit``, ``validate``, ``test`` and ``predict``: Lightning's own verbs, for SFTModule and SFTDataModule."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from lightning_sft.callbacks import PredictionWriter
from lightning_sft.callbacks.defaults import default_callbacks, find_last
from lightning_sft.callbacks.ending import ending
from lightning_sft.checkpoints.reading import Checkpoint
from lightning_sft.commands.base import ConfigCLI, ConfigParser, with_own_defaults
from lightning_sft.commands.saved_config import SaveConfig, no_trace_if_refused
from lightning_sft.commands.trainer_settings import refused_by_name
from lightning_sft.datamodule import SFTDataModule
from lightning_sft.io.arguments import unwrapped
from lightning_sft.io.config_files import flags, placed
from lightning_sft.io.words import counted
from lightning_sft.model.first_checks import refuse_other_model
from lightning_sft.module import SFTModule
from lightning_sft.training.checks import check_precision
from lightning_sft.types import InputError

_TRAINER_DEFAULTS = {"max_epochs": 1, "log_every_n_steps": 1}


class SFTCLI(LightningCLI):
    """Lightning's command line without its surprises: the command line wins over a checkpoint's hyperparameters."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Without Lightning's warning to whoever calls ``main`` with arguments from a program that has some too."""
        parse: Any = parser.parse_object if isinstance(args, (dict, Namespace)) else parser.parse_args
        self.config = with_own_defaults(parser, lambda: parse(args), getattr(self, "_subcommand_parsers", {}))

    def _prepare_subcommand_parser(self, klass: Any, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """With checkpoints that are loaded without running what may be in them, unless asked to."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults({"weights_only": True})
        return parser

    def _parse_ckpt_path(self) -> None:
        """Lightning would let the checkpoint override what the user has just asked for."""

    def before_instantiate_classes(self) -> None:
        """Build the architecture from the checkpoint, where there is one: the pretrained weights are not needed."""
        self._checkpoint_config = None
        config, path = self._own_config, self._get(self.config, "ckpt_path")
        self._resumes = path == "last"
        model = config.get("model.init_args.pretrained", config.get("model.pretrained"))
        if self._resumes:
            root, own = config.get("trainer.default_root_dir"), config.get("trainer.callbacks")
            path = find_last(root, own, model, self.subcommand == "fit")
        self._found = path
        if path == "best":
            raise InputError(
                "ckpt_path=best is the best checkpoint of a fit in the same process, and this one has none. Give its "
                "file, which ModelCheckpoint has named, or last."
            )
        if path and path != "hpc" and not path.startswith(("http", "registry")):  # which Lightning finds
            self._checkpoint_config = Checkpoint(path).hyper_parameters.get("hf_config")
            refuse_other_model(path, self._checkpoint_config, model)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Add checkpoints, graceful preemption and a sample log, unless the user has configured their own."""
        if config.get("barebones") and config["log_every_n_steps"] == _TRAINER_DEFAULTS["log_every_n_steps"]:
            config = config | {"log_every_n_steps": None}  # Lightning refuses any number, and nobody has asked for this
        with refused_by_name(config):
            trainer = super()._instantiate_trainer(config, [*callbacks, *self._defaults(config)])
        own: list[Callback] = cast(Any, trainer).callbacks
        own.sort(key=lambda callback: not isinstance(callback, SaveConfig))  # RunRecord reads what it has saved
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Without traces on disk if the command is refused."""
        with no_trace_if_refused(self.trainer):
            super()._run_subcommand(subcommand)

    def _defaults(self, config: Mapping[str, Any]) -> list[Callback]:
        return default_callbacks(config, self._resumes, is_fit=self.subcommand == "fit")

    @property
    def _own_config(self) -> Namespace:
        return cast(Namespace, self.config[self.subcommand] if self.subcommand else self.config)

    def after_fit(self) -> None:
        """Say why the fit ended, where its checkpoints are, and what to do next."""
        trainer = cast(Any, self.trainer)
        if trainer.fast_dev_run:
            tried = counted(int(trainer.num_training_batches), "micro-batch")
            rank_zero_info(f"This was a trial of {tried} (trainer.fast_dev_run): nothing has been saved.")
        elif trainer.checkpoint_callbacks:
            resumed_at = Checkpoint(trainer.ckpt_path).step if trainer.ckpt_path else 0
            rank_zero_info(ending(trainer, resumed_at))

    def before_predict(self) -> None:
        """Predictions go to ``predictions.jsonl`` beside the run, unless the user has a writer of their own."""
        callbacks: list[Callback] = cast(Any, self.trainer).callbacks
        if not any(isinstance(callback, BasePredictionWriter) for callback in callbacks):
            callbacks.append(PredictionWriter(str(Path(self.trainer.default_root_dir) / "predictions.jsonl")))

    def after_instantiate_classes(self) -> None:
        """Hand the checkpoint to the trainer, and its architecture to the module; the saved config still says last."""
        if self._resumes:
            self.config_init[self.subcommand]["ckpt_path"] = self._found
        check_precision(self._own_config.get("trainer.precision"), self.trainer)
        if self._checkpoint_config and isinstance(self.model, SFTModule):
            self.model._settle(hf_config=self._checkpoint_config)


def run(args: ArgsType) -> SFTCLI:
    """Run one of Lightning's verbs.

    Args:
        args: The verb and its arguments, or a configuration as a mapping.
    """
    settings: dict[str, Any] = {
        "save_config_callback": SaveConfig,
        "save_config_kwargs": {"overwrite": True},
        "parser_kwargs": {"prog": "lightning-sft"},
    }
    with placed(args), unwrapped():
        own = _own_classes(args)
        return SFTCLI(**_for_classes(own), **settings, args=_classes_first(own, args))


def run_config_verb(cli: type[ConfigCLI], args: list[str]) -> ConfigCLI:
    """Run a verb of ours that takes the configuration of ``fit``.

    Args:
        cli: The command line of the verb.
        args: The verb and its arguments.

    Raises:
        SystemExit: With 1 when it finds what does not pass.
    """
    with placed(args), unwrapped():
        own, prog = _own_classes(args), {"prog": f"lightning-sft {args[0]}"}
        done = cli(**_for_classes(own), parser_kwargs=prog, args=_classes_first(own, args)[1:], run=False)
    if not done.passes:
        sys.exit(1)
    return done


def _own_classes(args: ArgsType) -> dict[str, str]:
    """The classes that the user brings, for ``model``, ``data`` or both."""
    found = {key: _own_class(key, args) for key in ("model", "data")}
    return {key: name for key, name in found.items() if name is not None}


def _for_classes(own: Mapping[str, str]) -> dict[str, Any]:
    """Settings of a command line for our classes, or for those that the user brings."""
    return {
        "model_class": LightningModule if "model" in own else SFTModule,
        "datamodule_class": LightningDataModule if "data" in own else SFTDataModule,
        "subclass_mode_model": "model" in own,
        "subclass_mode_data": "data" in own,
        "seed_everything_default": 0,
        "trainer_defaults": _TRAINER_DEFAULTS,
        "auto_configure_optimizers": False,
        "parser_class": ConfigParser,
    }


def _classes_first(own: Mapping[str, str], args: Any) -> Any:
    """The arguments with the user's classes named first: a config's section is then read as that of the class."""
    if not isinstance(args, list) or args[0].startswith("-"):
        return args
    return [args[0], *(f"--{key}={name}" for key, name in own.items()), *args[1:]]


def _own_class(key: str, args: Any) -> str | None:
    """The class that the user brings for ``model`` or ``data``, the last that is named; if none, the help is flat."""
    found = None
    for section in args.values() if isinstance(args, Mapping) else ():
        found = _class_path(section, key) or found
    for flag, value in flags(args) if isinstance(args, list) else ():
        if flag == f"--{key}.class_path" or (flag == f"--{key}" and not value.endswith((".yaml", ".yml"))):
            found = value
        if flag in ("--config", "-c") and Path(value).is_file():
            found = _class_path(yaml.safe_load(Path(value).read_text(encoding="utf-8")), key) or found
    return found


def _class_path(config: Any, key: str) -> str | None:
    section = config.get(key) if isinstance(config, Mapping) else None
    return section.get("class_path") if isinstance(section, Mapping) else None
