"""Each tutorial, copied block by block into an empty folder, does what it says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_sft.demos import tiny_pretrained
from tests.helpers.processes import ROOT
from tests.helpers.reading import Reader, all_blocks

NOT_READ = ("index",)  # the list of tutorials
PAGES = {path.stem: path for path in sorted((ROOT / "docs" / "tutorials").glob("*.md")) if path.stem not in NOT_READ}
SLOW = ("lora", "many_devices", "start")
ONE_DEVICE = {  # what commands for many devices read here, where there is one process
    "--trainer.devices 2": "--trainer.devices 1",
    "--trainer.strategy ddp --trainer.accumulate_grad_batches 2": "",
    "--trainer.strategy fsdp2 --trainer.accumulate_grad_batches 2": "",
    "--trainer.strategy fsdp2 --trainer.strategy.tensor_parallel_size 2": "",
}


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What stands for SmolLM2: its tokens are bytes, so its context has to be long."""
    return tiny_pretrained(tmp_path_factory.mktemp("pretrained") / "smollm2", max_position_embeddings=2048)


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2: str) -> Path:
    """Where the reader is, with the demo model as if it had been fetched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    (tmp_path / "SmolLM2").symlink_to(smollm2)
    return tmp_path


# peft asks transformers for an attribute that has another name by now
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in PAGES])
def test_every_block_of_a_tutorial_does_what_the_page_says(name: str, empty_folder: Path, capsys: Any) -> None:
    Reader(capsys, ONE_DEVICE).read(PAGES[name])


@pytest.mark.parametrize("name", PAGES)
def test_a_tutorial_is_one_page_with_one_title(name: str) -> None:
    text = PAGES[name].read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert [block.language for block in all_blocks(text)].count("") == 0
    assert "TODO" not in text
