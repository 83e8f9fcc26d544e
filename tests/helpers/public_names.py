"""What users name in YAML files, commands and Python: classes with their arguments, verbs with their options.

    python -m tests.helpers.public_names > tests/public_names.txt   # after a change that is meant

``tests/test_public_names.py`` compares.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from functools import partial

from lightning.pytorch.strategies import StrategyRegistry

import lightning_sft
from lightning_sft import callbacks
from lightning_sft.commands.kept_help import captured
from lightning_sft.main import VERBS, main

PACKAGES = {
    "lightning_sft": lightning_sft.__all__,
    "lightning_sft.callbacks": callbacks.__all__,
    "lightning_sft.demos": ["tiny_model", "tiny_pretrained", "tiny_tokenizer"],
    "lightning_sft.strategies": ["FSDP2Strategy"],
}
OWN = ("model", "data")  # sections of a configuration that are ours; those of the trainer are Lightning's


def classes() -> Iterator[str]:
    """Class paths and functions with their arguments."""
    for package, names in PACKAGES.items():
        module = importlib.import_module(package)
        for name in sorted(names):
            found = getattr(module, name)
            arguments = inspect.signature(found).parameters if callable(found) else ()
            yield f"{package}.{name}({', '.join(arguments)})"
    yield from (f"strategy {name}" for name in StrategyRegistry.available_strategies() if name.startswith("fsdp2"))


def options(verb: str) -> Iterator[str]:
    """Options of a verb, as its help has them."""
    said, _ = captured(partial(main, [verb, "--help"]))
    found = dict.fromkeys(re.findall(r"^  (?:-\w, )?(--[\w.-]+)", said, flags=re.MULTILINE))
    for option in found:
        section = option.removeprefix("--").partition(".")[0]
        if section in OWN or (section != "trainer" and verb not in ("fit", "validate", "test", "predict")):
            yield f"{verb} {option}"


def names() -> list[str]:
    """All of them, a line each."""
    return [*classes(), *VERBS, *(line for verb in VERBS for line in options(verb))]


if __name__ == "__main__":
    sys.stdout.write("\n".join(names()) + "\n")
