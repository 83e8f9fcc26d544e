"""What a command line did wrong, in one line, and an unexpected error without its traceback."""

from __future__ import annotations

import re
import sys
import tempfile
import traceback
from contextlib import suppress
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from safetensors import SafetensorError

from lightning_sft.io.closest import meant
from lightning_sft.io.config_files import is_config, place_of
from lightning_sft.io.parser_errors import refusal
from lightning_sft.machine.terminal import printable
from lightning_sft.types import InputError

_NEGATIVE = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$", re.IGNORECASE)  # argparse takes -1e-4 for an option
_WITHOUT_DASHES = re.compile(r"( required: |, )(?=\w+\.)")
_NAME = re.compile(r"""(?:--|(?:[Oo]ption|[Kk]ey) ['"])(\w[\w.-]*)""")  # of an option, in messages of jsonargparse


class OneLine:
    """For parsers of jsonargparse: instead of a page of options, the one that may be meant."""

    prog: str
    args: list[str]
    exit_on_error: bool
    _option_string_actions: dict[str, Any]

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | settings)
        self._negative_number_matcher = _NEGATIVE

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong, and exit with 2 as argparse does.

        Args:
            message: Message of jsonargparse.
            ex: Exception that it caught.
        """
        if not self.exit_on_error:  # one of several types of an argument is tried
            super().error(message, ex)  # type: ignore[misc]  # of the parser that it is mixed into
        parser = getattr(ex, "subcommand_parser", None) or self
        prog = parser.prog.replace(" [options]", "")
        verbs = getattr(getattr(parser, "_subcommands_action", None), "choices", ())
        given = next(iter(getattr(self, "args", None) or [""]))
        prog = f"{prog} {given}" if given in verbs else prog
        options = [name.lstrip("-") for name in parser._option_string_actions]
        text = " ".join(message.split())
        options += ["dry_run"] if prog.endswith(" fit") else []  # which main takes out
        for name in verbs:
            text = text.replace(f"required: {name}.", "required: --")  # an argument is called as it is given
        if " required: " in text:
            text = _WITHOUT_DASHES.sub(r"\1--", text)
        hints = {action.dest: getattr(action, "_typehint", None) for action in parser._option_string_actions.values()}
        args = getattr(self, "args", None) or []
        found = refusal(text, hints, args)
        if found is None:
            files = [word for word in text.split() if is_config(word)]  # that no option stands before
            closest = f" Did you mean --config {files[0]}?" if files else meant(_NAME.findall(text), options, "--")
            text = f"{text.rstrip('.')}.{closest}"
        else:
            where = place_of(args, found.key, found.value)
            text = f"{where}: {found.key} {found.said}" if where else f"--{found.key} {found.said}"
        sys.stderr.write(printable(f"{prog}: {text}"))
        sys.stderr.write(f" All options: {prog} --help\n")
        sys.exit(2)


class VerbParser(OneLine, ArgumentParser):
    """Of verbs that have arguments of their own alone."""


def is_foreseen(error: Exception) -> bool:
    """Whether an error says by itself what was wrong: ours, the system's, or one that Lightning raises on purpose.

    Args:
        error: Any that has been raised.
    """
    foreseen = InputError, FloatingPointError, MisconfigurationException, OSError, SafetensorError, yaml.YAMLError
    if isinstance(error, foreseen):  # safetensors has an error of its own for a full disk
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    package = str(frame.f_globals.get("__name__")).partition(".")[0]
    return isinstance(error, (ValueError, RuntimeError)) and package in ("lightning", "jsonargparse")


def unexpected(error: Exception) -> str:
    """What went wrong, for the shell: of an error that nobody has foreseen, its kind, and where its traceback is.

    Args:
        error: Exception to describe.
    """
    text, where = f"{type(error).__name__}: {error}".strip().rstrip(".:"), "add --debug to see it"
    settings: dict[str, Any] = {"encoding": "utf-8", "prefix": "lightning-sft-", "suffix": ".txt", "delete": False}
    with suppress(OSError), tempfile.NamedTemporaryFile("w", **settings) as file:  # the disk may be full
        traceback.print_exception(error, file=file)
        where = f"it is in {file.name}, or {where}"
    return f"{text}.\nFor the traceback: {where}."
