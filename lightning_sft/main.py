"""The command line: a table of verbs, each imported when it is called.

Nothing heavy is imported here, so that ``--version``, ``--help`` and a mistyped verb answer without waiting for torch.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_sft import __version__
from lightning_sft.io.closest import did_you_mean
from lightning_sft.machine.noise import keep_quiet, quiet_others

if TYPE_CHECKING:
    from lightning.pytorch.cli import ArgsType

    from lightning_sft.commands.fit import SFTCLI as SFTCLI

GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "Get started": {
        "init": ("lightning_sft.commands.init:init", "Write a commented YAML config for your data and machine."),
        "fetch-demo-model": ("lightning_sft.demos.pretrained:fetch_demo_model", "Download SmolLM2-135M-Instruct."),
        "doctor": ("lightning_sft.commands.doctor:run_doctor", "Check versions, devices and fast paths."),
        "completion": ("lightning_sft.commands.completion:completion", "Print a completion script for bash."),
    },
    "Train and evaluate": {
        "fit": ("lightning_sft.commands.fit:run", "Fine-tune a model; with --dry_run, plan it."),
        "validate": ("lightning_sft.commands.fit:run", "Compute metrics on the validation data."),
        "test": ("lightning_sft.commands.fit:run", "Compute metrics on the test data."),
        "predict": ("lightning_sft.commands.fit:run", "Generate answers to the prompts of a data set."),
    },
    "Inspect": {
        "show": ("lightning_sft.commands.show.command:ShowCLI", "Show what fit would train on, token by token."),
        "plan": ("lightning_sft.commands.plan.command:PlanCLI", "Estimate the memory that fit would need."),
        "replay": ("lightning_sft.commands.replay:ReplayCLI", "Recompute one step of a run, sample by sample."),
        "verify": ("lightning_sft.commands.verify.command:VerifyCLI", "Run our checks on your model and data."),
    },
    "Use a trained model": {
        "chat": ("lightning_sft.commands.chat:chat", "Chat with a model or a checkpoint."),
        "export": ("lightning_sft.export.convert:export_checkpoint", "Export a checkpoint as a Hugging Face folder."),
        "report": ("lightning_sft.commands.report.page:report", "Write an HTML report of a run, or compare runs."),
    },
}
"""Under each heading of ``--help``, the verbs: what to import and call, and a line about it."""

DRY_RUN = "--dry_run"
"""Option of ``fit``, which runs ``plan`` on its arguments."""

_MISUSED = 2  # exit code of a command line that is wrong, as argparse has it
_INTERRUPTED = 128 + 2  # exit code of what SIGINT has ended, for shells

VERBS = {verb: entry for group in GROUPS.values() for verb, entry in group.items()}
_ELSEWHERE = {
    "train": "fit",
    "sft": "fit",
    "finetune": "fit",
    "evaluate": "test",
    "eval": "test",
    "generate": "predict",
}


def __getattr__(name: str) -> Any:
    """``SFTCLI``, imported when it is first used."""
    if name != "SFTCLI":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _imported("lightning_sft.commands.fit:SFTCLI")


def main(args: ArgsType = None) -> Any:
    """Run ``lightning-sft``: ``fit``, ``validate``, ``test``, ``predict``, ``show``, ``replay``, ``export``, ....

    Args:
        args: The arguments; those of the process by default.

    Returns:
        The :class:`SFTCLI`, with its ``trainer``, ``model`` and ``datamodule``; or what the verb returns.

    Raises:
        SystemExit: With 1 when ``show --check``, ``plan`` or ``verify`` finds what does not pass, and with 2 and a
            message when there is no such verb.

    >>> main(["--version"])
    '0.1.0'
    """
    given = sys.argv[1:] if args is None else args
    if not isinstance(given, list):
        return _imported("lightning_sft.commands.fit:run")(given)
    given = given or ["--help"]
    verb = given[0]
    if verb == "--version":
        return __version__
    if verb in ("-h", "--help"):
        print(_help())
        sys.exit(0)
    if not verb.startswith("-") and verb not in VERBS:
        own = f" Did you mean {_ELSEWHERE[verb]}?" if verb in _ELSEWHERE else did_you_mean([verb], VERBS)
        print(f"lightning-sft: There is no verb {verb!r}.{own} All verbs: lightning-sft --help", file=sys.stderr)
        sys.exit(_MISUSED)
    _check_configs(given)
    if verb == "fit" and DRY_RUN in given:
        verb, given = "plan", ["plan", *(argument for argument in given[1:] if argument != DRY_RUN)]
    return _run(verb, given)


def _run(verb: str, given: list[str]) -> Any:
    """Import a verb and call it as it is to be called: with all arguments, with its own, or by a parser of its own."""
    found = _imported(VERBS[verb if verb in VERBS else "fit"][0])  # Lightning's options may stand before its verb
    keep_quiet()
    if verb not in VERBS or verb in GROUPS["Train and evaluate"]:
        return found(given)
    if verb == "doctor":
        return found(given[1:])
    if verb == "completion":
        return found(main, [name for name in VERBS if name != verb], given[1:])
    if isinstance(found, type):
        return _imported("lightning_sft.commands.fit:run_config_verb")(found, given)
    if verb == "report":
        given = [verb, *_as_list(given[1:])]
    parser = {"parser_class": _imported("lightning_sft.io.errors:VerbParser"), "prog": f"lightning-sft {verb}"}
    return _imported("jsonargparse:auto_cli")(found, args=given[1:], as_positional=verb == "report", **parser)


def _as_list(arguments: list[str]) -> list[str]:
    """The arguments before the first option as one list in JSON: jsonargparse takes one value for each name."""
    values = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
    return [json.dumps(values), *arguments[len(values) :]] if values else arguments


def _from_shell() -> Any:
    """``main``, but the help of a verb is read where it was made before, and ``fit`` sets CUDA's allocator up first."""
    if sys.argv[2:] in (["--help"], ["-h"]) and sys.argv[1] in VERBS:
        _imported("lightning_sft.commands.kept_help:print_help")(sys.argv[1], main)
    if sys.argv[1:2] == ["fit"]:
        _imported("lightning_sft.machine.allocators:expand_segments")(os.environ)
    return main()


def _imported(target: str) -> Any:
    """What ``module:name`` stands for."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def _check_configs(given: list[str]) -> None:
    """Refuse YAML files among the arguments that a parser would not get through."""
    for before, text in zip(["", *given], given, strict=False):
        flag, _, value = text.partition("=") if text.startswith("-") else (before, "", text)
        if value.endswith((".yaml", ".yml")) and Path(value).is_file():
            _imported("lightning_sft.io.config_files:check_config")(value, flag in ("--config", "-c"))


def _help() -> str:
    """The page of ``lightning-sft --help``, at most 80 columns wide."""
    options = {
        "--help": ("", "Show this page; after a verb, its options."),
        "--version": ("", "Print the version."),
        "--debug": ("", "Show tracebacks, and messages of other packages."),
    }
    lines = [
        "usage: lightning-sft VERB [options]",
        "",
        "Supervised fine-tuning of language models with PyTorch Lightning.",
    ]
    for heading, group in {**GROUPS, "Options": options}.items():
        lines += ["", f"{heading}:", *(f"  {name:<18}{line}" for name, (_, line) in group.items())]
    return "\n".join([*lines, "", "Help on a verb: lightning-sft VERB --help"])


def console() -> None:
    """``main`` for the shell: errors and Ctrl-C are one message, not a traceback, which ``--debug`` shows.

    Classes of the current folder can be named, as with ``python -m``, unless Python runs with ``-P``.
    """
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    quiet_others(debug)
    if not sys.flags.safe_path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that no file there takes the place of an installed package
    try:
        result = _from_shell()
    except (KeyboardInterrupt, SystemExit) as end:  # Lightning makes the one into the other
        if debug or KeyboardInterrupt not in (type(end), type(end.__context__)):
            raise
        print("lightning-sft: interrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    except Exception as error:
        if debug:
            raise
        from lightning_sft.io.errors import is_foreseen, unexpected
        from lightning_sft.machine.terminal import printable

        said = str(error).strip() if is_foreseen(error) else unexpected(error)
        sys.exit(f"lightning-sft: {printable(said)}")
    if isinstance(result, (str, Path)):
        print(result)
