"""The command line: Lightning's own verbs for SFTModule and SFTDataModule, and a few of ours."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from jsonargparse import Namespace, auto_cli
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_sft import __version__
from lightning_sft.callbacks import PredictionWriter
from lightning_sft.callbacks.survival import default_callbacks, find_last
from lightning_sft.chat import chat
from lightning_sft.checkpoints import hyper_parameters
from lightning_sft.completion import completion
from lightning_sft.config_cli import ConfigCLI, check_config
from lightning_sft.cuda_segments import expand_segments
from lightning_sft.datamodule import SFTDataModule
from lightning_sft.demo_model import fetch_demo_model
from lightning_sft.doctor import run_doctor
from lightning_sft.export.convert import export_checkpoint
from lightning_sft.guards import check_precision
from lightning_sft.module import SFTModule
from lightning_sft.planning.command import PlanCLI
from lightning_sft.replay import ReplayCLI
from lightning_sft.report_html import write_report
from lightning_sft.show import ShowCLI
from lightning_sft.start import init
from lightning_sft.types import InputError
from lightning_sft.verify.command import VerifyCLI


class SFTCLI(LightningCLI):
    """Lightning's command line without its surprises: the command line wins over a checkpoint's hyperparameters."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Without Lightning's warning to whoever calls ``main`` with arguments from a program that has some too."""
        self.config = parser.parse_object(args) if isinstance(args, (dict, Namespace)) else parser.parse_args(args)

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
        self._goes_on = path == "last"
        if self._goes_on:
            model = config.get("model.init_args.pretrained", config.get("model.pretrained"))
            root, own = config.get("trainer.default_root_dir"), config.get("trainer.callbacks")
            path = find_last(root, own, model, self.subcommand == "fit")
        self._found = path
        if path and Path(path).exists():
            self._checkpoint_config = hyper_parameters(path).get("hf_config")

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """With checkpoints, an end in good order and a ledger, where the user has none of their own."""
        return super()._instantiate_trainer(config, [*callbacks, *self._defaults(config)])

    def _defaults(self, config: Mapping[str, Any]) -> list[Callback]:
        return default_callbacks(config, self._goes_on, is_fit=self.subcommand == "fit")

    @property
    def _own_config(self) -> Namespace:
        return cast(Namespace, self.config[self.subcommand] if self.subcommand else self.config)

    def before_predict(self) -> None:
        """Predictions go to ``predictions.jsonl`` beside the run, unless the user has a writer of their own."""
        callbacks: list[Callback] = cast(Any, self.trainer).callbacks
        if not any(isinstance(callback, BasePredictionWriter) for callback in callbacks):
            callbacks.append(PredictionWriter(str(Path(self.trainer.default_root_dir) / "predictions.jsonl")))

    def after_instantiate_classes(self) -> None:
        """Hand the checkpoint to the trainer, and its architecture to the module; the saved config still says last."""
        if self._goes_on:
            self.config_init[self.subcommand]["ckpt_path"] = self._found
        check_precision(self._own_config.get("trainer.precision"), self.trainer)
        if self._checkpoint_config and isinstance(self.model, SFTModule):
            self.model.hf_config = self._checkpoint_config


def main(args: ArgsType = None) -> Any:
    """Run ``lightning-sft``: ``fit``, ``validate``, ``test``, ``predict``, ``show``, ``replay``, ``export``, ....

    Args:
        args: The arguments; those of the process by default.

    Returns:
        The :class:`SFTCLI`, with its ``trainer``, ``model`` and ``datamodule``; or what the verb returns.

    Raises:
        SystemExit: With 1 when ``show --check``, ``plan`` or ``verify`` finds what does not pass.

    >>> main(["--version"])
    '0.1.0'
    """
    given = sys.argv[1:] if args is None else args
    if isinstance(given, list):
        given = given or ["--help"]
        for _, value in _flags(given):
            if value.endswith((".yaml", ".yml")) and Path(value).is_file():
                check_config(value)
        if given[0] == "--version":
            return __version__
        if given[0] == "doctor":
            return run_doctor(given[1:])
        if given[0] == "completion":
            return completion(main, [*SFTCLI.subcommands(), *CONFIG_VERBS, *VERBS, "report", "doctor"])
        if given[0] == "report":
            return auto_cli(write_report, args=given[1:])
        if given[0] in VERBS:
            return auto_cli(VERBS[given[0]], args=given[1:], as_positional=False)
    own_model, own_data = _names_a_class("model", given), _names_a_class("data", given)
    arguments: dict[str, Any] = {
        "model_class": LightningModule if own_model else SFTModule,
        "datamodule_class": LightningDataModule if own_data else SFTDataModule,
        "subclass_mode_model": own_model,
        "subclass_mode_data": own_data,
        "seed_everything_default": 0,
        "trainer_defaults": {"max_epochs": 1},
        "auto_configure_optimizers": False,
    }
    if isinstance(given, list) and given[0] in CONFIG_VERBS:
        cli = CONFIG_VERBS[given[0]](**arguments, args=given[1:], run=False)
        if not cli.passes:
            sys.exit(1)
        return cli
    arguments |= {"save_config_kwargs": {"overwrite": True}, "parser_kwargs": {"description": _DESCRIPTION}}
    return SFTCLI(**arguments, args=given)


VERBS: dict[str, Callable[..., Any]] = {
    "init": init,
    "chat": chat,
    "export": export_checkpoint,
    "fetch-demo-model": fetch_demo_model,
}
CONFIG_VERBS: dict[str, type[ConfigCLI]] = {
    "show": ShowCLI,
    "plan": PlanCLI,
    "replay": ReplayCLI,
    "verify": VerifyCLI,
}
_DESCRIPTION = (
    "Supervised fine-tuning of language models with PyTorch Lightning. Besides the verbs of Lightning's Trainer below: "
    "show (what fit would train on, token by token), plan (the memory that fit would take), "
    "replay (a step of a run once more), verify (our proofs on your "
    "model and data), export (a checkpoint as a Hugging Face folder), fetch-demo-model (SmolLM2-135M-Instruct), init "
    "(a commented YAML to begin with), chat (talk to a model), doctor (versions, devices, fast paths); each has a "
    "--help of its own. completion prints a script for bash."
)


_NOISE = (  # of other packages, about which users can do nothing
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own, of torch 2.13
    "Precision bf16-mixed is not supported by the model summary",  # which counts bytes; plan does it
)


def console() -> None:
    """``main`` for the shell: what the user can put right is one message, not a traceback."""
    for message in _NOISE:
        warnings.filterwarnings("ignore", message)
    if sys.argv[1:2] == ["fit"]:
        expand_segments(os.environ)
    try:
        result = main()
    except (InputError, FloatingPointError, MisconfigurationException, yaml.YAMLError) as error:
        sys.exit(f"lightning-sft: {error}")
    if isinstance(result, (str, Path)):
        print(result)


def _names_a_class(key: str, args: Any) -> bool:
    """Whether the user brings a class of their own for ``model`` or ``data``; if not, the help is flat."""
    if isinstance(args, Mapping):
        return any("class_path" in (config.get(key) or {}) for config in args.values() if isinstance(config, Mapping))
    for flag, value in _flags(args):
        if flag == f"--{key}.class_path" or (flag == f"--{key}" and not value.endswith((".yaml", ".yml"))):
            return True
        if flag in ("--config", "-c") and Path(value).is_file():
            config = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
            section = config.get(key) if isinstance(config, Mapping) else None
            if isinstance(section, Mapping) and "class_path" in section:
                return True
    return False


def _flags(args: Sequence[str]) -> list[tuple[str, str]]:
    following = [*args[1:], ""]
    return [(a.partition("=")[0], a.partition("=")[2] if "=" in a else b) for a, b in zip(args, following, strict=True)]
