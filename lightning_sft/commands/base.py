"""What verbs that take the configuration of ``fit`` have in common: ``show``, ``plan``, ``replay`` and ``verify``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from jsonargparse import ArgumentParser, Namespace, _typehints
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_sft.commands.trainer_settings import check_names
from lightning_sft.io.disk import whole
from lightning_sft.io.errors import OneLine


class ConfigParser(OneLine, LightningArgumentParser):
    """Of verbs that take the configuration of ``fit``, and of ``fit`` itself."""

    def save(self, cfg: Any, path: Any, *args: Any, **settings: Any) -> None:
        """Write a configuration, as ``config.yaml`` of a run; to a local path atomically."""
        if "://" in str(path):
            super().save(cfg, path, *args, **settings)
            return
        with whole(path) as [partial]:
            super().save(cfg, str(partial), *args, **settings)


def with_own_defaults(
    parser: LightningArgumentParser,
    parse: Callable[[], Namespace],
    subcommands: Mapping[str, LightningArgumentParser] | None = None,
) -> Namespace:
    """Parse arguments so that an optimizer of another class than the module's default takes its own settings.

    jsonargparse hands those of the default on to whatever class takes arguments of the same names. So the arguments are
    parsed again, with that class as the default.

    Args:
        parser: Parser of the arguments.
        parse: Function that parses them with it.
        subcommands: Parsers of its subcommands.
    """
    parse = _torch_first(parse)
    config = parse()
    name = config.get("subcommand")
    own, found = (subcommands or {}).get(name, parser), config if name is None else config[name]
    model = found.get("model.class_path")  # where the user brings a class of their own
    key = "model.optimizer" if model is None else "model.init_args.optimizer"
    asked: Any = found.get(f"{key}.class_path")
    if asked in (None, _default_optimizer(own, model)):
        return config
    optimizer: dict[str, Any] = {"class_path": asked}
    if model is None:
        own.set_defaults({"model.optimizer": optimizer})
    else:
        own.set_defaults({"model": {"class_path": model, "init_args": {"optimizer": optimizer}}})
    return parse()


def _torch_first(parse: Callable[[], Namespace]) -> Callable[[], Namespace]:
    """Parse so that a short name of torch's, as AdamW, is torch's own class where other packages have one of that name.

    jsonargparse knows all classes that have been imported, and refuses a name that several have: that of bitsandbytes
    would be ambiguous once a module of the user imports it.
    """
    resolve = _typehints.resolve_class_path_by_name

    def resolved(kind: Any, name: str) -> str:
        try:
            return str(resolve(kind, name))
        except ValueError:
            for module in (torch.optim, torch.optim.lr_scheduler):
                if isinstance(getattr(module, name, None), type):
                    return f"{module.__name__}.{name}"
            raise

    def parsed() -> Namespace:
        with patch.object(_typehints, "resolve_class_path_by_name", resolved):
            return parse()

    return parsed


def _default_optimizer(parser: ArgumentParser, model: str | None) -> Any:
    if model is not None:
        parser = ArgumentParser()
        module, _, name = model.rpartition(".")
        parser.add_class_arguments(getattr(import_module(module), name), "model")
    return parser.get_defaults().get("model.optimizer.class_path")


class ConfigCLI(LightningCLI):
    """The command line of ``fit`` with the arguments of a verb; no trainer is made, and no weights are loaded."""

    verb: ClassVar[Callable[..., Any]]
    """Takes the data module, the module, the settings of a trainer, and arguments of its own."""

    result: Any
    """What the verb has returned."""

    @property
    def passes(self) -> bool:
        """Whether the command is to exit with 0."""
        return True

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Those of ``fit``, which a saved config has, and our own."""
        parser.add_method_arguments(Trainer, "fit", skip=set(self.subcommands()["fit"]))
        self._own = parser.add_function_arguments(self.verb, skip={"data", "module", "trainer"})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse them; another optimizer than the default takes its own defaults."""
        assert isinstance(args, list)
        self.config = with_own_defaults(parser, lambda: parser.parse_args(args))

    def instantiate_classes(self) -> None:
        """The module and the data module. The trainer's section stays as it is: its devices need not be here."""
        config = self.config.clone()
        self.trainer_config = config.pop("trainer")
        check_names(self.trainer_config)
        self.config_init = self.parser.instantiate_classes(config)
        self.model, self.datamodule = self._get(self.config_init, "model"), self._get(self.config_init, "data")

    def after_instantiate_classes(self) -> None:
        """Do it."""
        own = {name: self.config_init[name] for name in self._own}
        self.result = self.verb(self.datamodule, self.model, self.trainer_config, **own)
