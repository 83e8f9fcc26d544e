from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hypothesis import settings
from lightning.pytorch import Trainer

from lightning_sft.demos import tiny_pretrained
from tests.helpers import second_device

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed, where it is installed, says so on standard output
os.environ["HF_HUB_OFFLINE"] = "1"  # for processes that tests start
huggingface_hub.constants.HF_HUB_OFFLINE = True  # nor do tests ask the hub: without a network it is tried for a minute
logging.getLogger("lightning.pytorch").propagate = True  # to caplog; where pytest begins to log later, it is not
settings.register_profile("untimed", deadline=None)  # other work of the machine is no failure
settings.load_profile("untimed")
second_device.register()  # before the first backward pass of the process, which counts the devices that there are


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama as a Hugging Face folder."""
    return tiny_pretrained(tmp_path_factory.mktemp("pretrained") / "llama")


@pytest.fixture(scope="session")
def pretrained_for_two(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama with tied embeddings, and heads that two tensor-parallel ranks can share."""
    settings = {"num_key_value_heads": 2, "tie_word_embeddings": True}
    return tiny_pretrained(tmp_path_factory.mktemp("pretrained") / "for_two", **settings)


@pytest.fixture(scope="session")
def exports_of(tmp_path_factory: pytest.TempPathFactory, pretrained_for_two: str) -> Callable[[str], Path]:
    """The folder of what a strategy has exported in two processes; those that can share them run together, once."""
    from tests.helpers.exporting import TWO, ZERO, launch

    out, ran = tmp_path_factory.mktemp("exports"), set[str]()

    def folder(name: str) -> Path:
        if name not in ran:
            names = next(group for group in (TWO, ZERO) if name in group)
            if names is ZERO:
                pytest.importorskip("deepspeed")
            launch(names, pretrained_for_two, out)
            ran.update(names)
        return out

    return folder


@pytest.fixture
def rows() -> list[dict[str, str]]:
    return [{"prompt": f"Say {i}", "completion": f"{i} it is"} for i in range(12)]


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """Write rows (or a text, as it is) to a JSONL file."""

    def write(rows: Any, name: str = "train.jsonl") -> str:
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.fixture
def quiet_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """A trainer on the CPU that shows and writes nothing."""

    def make(**settings: Any) -> Trainer:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        defaults = {"accelerator": "cpu", "max_epochs": 1, "enable_model_summary": False, "default_root_dir": tmp_path}
        return Trainer(**{**quiet, **defaults, **settings})

    return make


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """Chromium, where it is installed with its driver."""
    from tests.helpers.browsing import started

    with started(tmp_path) as session:
        yield session
