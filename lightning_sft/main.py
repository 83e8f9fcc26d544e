"""The command line: Lightning's own verbs for SFTModule and SFTDataModule, and a few of ours."""

from __future__ import annotations

import os
import sys
import traceback
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
from lightning.pytorch.utilities import rank_zero_info

from lightning_sft import __version__
from lightning_sft.callbacks import PredictionWriter
from lightning_sft.callbacks.defaults import default_callbacks, find_last
from lightning_sft.callbacks.ending import ending
from lightning_sft.checkpoints.reading import Checkpoint
from lightning_sft.commands.base import ConfigCLI, ConfigParser, check_config, with_own_defaults
from lightning_sft.commands.chat import chat
from lightning_sft.commands.completion import completion
from lightning_sft.commands.doctor import run_doctor
from lightning_sft.commands.init import init
from lightning_sft.commands.plan.command import PlanCLI
from lightning_sft.commands.replay import ReplayCLI
from lightning_sft.commands.report.page import write_report
from lightning_sft.commands.show.command import ShowCLI
from lightning_sft.commands.verify.command import VerifyCLI
from lightning_sft.datamodule import SFTDataModule
from lightning_sft.demos.pretrained import fetch_demo_model
from lightning_sft.export.convert import export_checkpoint
from lightning_sft.io.arguments import did_you_mean, unwrapped
from lightning_sft.io.errors import VerbParser, unexpected
from lightning_sft.machine.allocators import expand_segments
from lightning_sft.machine.terminal import printable
from lightning_sft.module import SFTModule
from lightning_sft.training.checks import check_precision
from lightning_sft.types import InputError


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
        self._goes_on = path == "last"
        if self._goes_on:
            model = config.get("model.init_args.pretrained", config.get("model.pretrained"))
            root, own = config.get("trainer.default_root_dir"), config.get("trainer.callbacks")
            path = find_last(root, own, model, self.subcommand == "fit")
        self._found = path
        if path == "best":
            raise InputError(
                "ckpt_path=best is the best checkpoint of a fit in the same process, and this one has none. Give its "
                "file, which ModelCheckpoint has named, or last."
            )
        if path and path != "hpc" and "://" not in path and not path.startswith("registry"):  # which Lightning finds
            self._checkpoint_config = Checkpoint(path).hyper_parameters.get("hf_config")

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """With checkpoints, an end in good order and a ledger, where the user has none of their own."""
        return super()._instantiate_trainer(config, [*callbacks, *self._defaults(config)])

    def _defaults(self, config: Mapping[str, Any]) -> list[Callback]:
        return default_callbacks(config, self._goes_on, is_fit=self.subcommand == "fit")

    @property
    def _own_config(self) -> Namespace:
        return cast(Namespace, self.config[self.subcommand] if self.subcommand else self.config)

    def after_fit(self) -> None:
        """Say why the fit ended, where its checkpoints are, and what to do next."""
        trainer = cast(Any, self.trainer)
        if trainer.checkpoint_callbacks and not trainer.fast_dev_run:
            resumed_at = Checkpoint(trainer.ckpt_path).step if trainer.ckpt_path else 0
            rank_zero_info(ending(trainer, resumed_at))

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
        verb = given[0]
        if verb == "--version":
            return __version__
        if verb == "doctor":
            return run_doctor(given[1:])
        if verb == "completion":
            return completion(main, ALL_VERBS)
        if verb in VERBS:
            settings: dict[str, Any] = {"parser_class": VerbParser, "prog": f"lightning-sft {verb}"}
            return auto_cli(VERBS[verb], args=given[1:], as_positional=verb == "report", **settings)
        if not verb.startswith("-") and verb not in ALL_VERBS:
            raise InputError(
                f"There is no verb {verb!r}.{did_you_mean([verb], ALL_VERBS)} Expected {', '.join(ALL_VERBS)}."
            )
    own_model, own_data = _own_class("model", given), _own_class("data", given)
    if isinstance(given, list) and not given[0].startswith("-"):  # a config's section is then read as that of the class
        own = {"--model": own_model, "--data": own_data}
        given = [given[0], *(f"{flag}={name}" for flag, name in own.items() if name), *given[1:]]
    arguments: dict[str, Any] = {
        "model_class": LightningModule if own_model else SFTModule,
        "datamodule_class": LightningDataModule if own_data else SFTDataModule,
        "subclass_mode_model": own_model is not None,
        "subclass_mode_data": own_data is not None,
        "seed_everything_default": 0,
        "trainer_defaults": {"max_epochs": 1},
        "auto_configure_optimizers": False,
        "parser_class": ConfigParser,
    }
    if isinstance(given, list) and given[0] in CONFIG_VERBS:
        arguments["parser_kwargs"] = {"prog": f"lightning-sft {given[0]}"}
        with unwrapped():
            cli = CONFIG_VERBS[given[0]](**arguments, args=given[1:], run=False)
        if not cli.passes:
            sys.exit(1)
        return cli
    arguments |= {"save_config_kwargs": {"overwrite": True}, "parser_kwargs": _PARSER}
    with unwrapped():
        return SFTCLI(**arguments, args=given)


VERBS: dict[str, Callable[..., Any]] = {
    "init": init,
    "chat": chat,
    "export": export_checkpoint,
    "report": write_report,
    "fetch-demo-model": fetch_demo_model,
}
CONFIG_VERBS: dict[str, type[ConfigCLI]] = {
    "show": ShowCLI,
    "plan": PlanCLI,
    "replay": ReplayCLI,
    "verify": VerifyCLI,
}
ALL_VERBS = [*SFTCLI.subcommands(), *CONFIG_VERBS, *VERBS, "doctor"]
_DESCRIPTION = (
    "Supervised fine-tuning of language models with PyTorch Lightning. Besides the verbs of Lightning's Trainer below: "
    "show (what fit would train on, token by token), plan (the memory that fit would take), "
    "replay (a step of a run once more), verify (our proofs on your "
    "model and data), export (a checkpoint as a Hugging Face folder), fetch-demo-model (SmolLM2-135M-Instruct), init "
    "(a commented YAML to begin with), chat (talk to a model), doctor (versions, devices, fast paths); each has a "
    "--help of its own. completion prints a script for bash."
)
_PARSER = {"prog": "lightning-sft", "description": _DESCRIPTION}


_NOISE = (  # of other packages, about which users can do nothing
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own, of torch 2.13
    "Precision bf16-mixed is not supported by the model summary",  # which counts bytes; plan does it
)


def console() -> None:
    """``main`` for the shell: errors are one message, not a traceback, which ``--debug`` shows.

    Classes of the current folder can be named, as with ``python -m``, unless Python runs with ``-P``.
    """
    for message in _NOISE:
        warnings.filterwarnings("ignore", message)
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    if not sys.flags.safe_path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that no file there takes the place of an installed package
    if sys.argv[1:2] == ["fit"]:
        expand_segments(os.environ)
    try:
        result = main()
    except Exception as error:
        if debug:
            raise
        said = str(error).strip() if _is_foreseen(error) else unexpected(error)
        sys.exit(f"lightning-sft: {printable(said)}")
    if isinstance(result, (str, Path)):
        print(result)


def _is_foreseen(error: Exception) -> bool:
    """Whether an error says by itself what was wrong: ours, the system's, or one that Lightning raises on purpose."""
    if isinstance(error, (InputError, FloatingPointError, MisconfigurationException, OSError, yaml.YAMLError)):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    package = str(frame.f_globals.get("__name__")).partition(".")[0]
    return isinstance(error, (ValueError, RuntimeError)) and package in ("lightning", "jsonargparse")


def _own_class(key: str, args: Any) -> str | None:
    """The class that the user brings for ``model`` or ``data``, the last that is named; if none, the help is flat."""
    found = None
    for section in args.values() if isinstance(args, Mapping) else ():
        found = _class_path(section, key) or found
    for flag, value in _flags(args) if isinstance(args, list) else ():
        if flag == f"--{key}.class_path" or (flag == f"--{key}" and not value.endswith((".yaml", ".yml"))):
            found = value
        if flag in ("--config", "-c") and Path(value).is_file():
            found = _class_path(yaml.safe_load(Path(value).read_text(encoding="utf-8")), key) or found
    return found


def _class_path(config: Any, key: str) -> str | None:
    section = config.get(key) if isinstance(config, Mapping) else None
    return section.get("class_path") if isinstance(section, Mapping) else None


def _flags(args: Sequence[str]) -> list[tuple[str, str]]:
    following = [*args[1:], ""]
    return [(a.partition("=")[0], a.partition("=")[2] if "=" in a else b) for a, b in zip(args, following, strict=True)]
