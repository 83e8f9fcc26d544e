"""Each how-to guide of one task, copied block by block into the folder that "Get started" leaves, does what it says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_sft.demos import tiny_pretrained
from lightning_sft.demos.data import write_demo_data
from lightning_sft.main import main
from tests.helpers.pages import blocks, page
from tests.helpers.processes import ROOT
from tests.helpers.reading import Reader

NAMES = (
    "adapters",
    "base_to_chat",
    "early_stopping",
    "loggers",
    "long_documents",
    "losses",
    "metrics",
    "optimizers",
    "reasoning",
    "schedules",
    "serving",
    "subclass",
    "sweeps",
    "tool_calls",
)
SLOW = ("sweeps",)
FIT = {
    "model": {"pretrained": "SmolLM2"},
    "data": {"train": "train.jsonl", "val": "test.jsonl", "tokens_per_batch": 4096},
    "trainer": {"accelerator": "cpu", "max_epochs": 1},
}


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What stands for SmolLM2: its tokens are bytes, so its context has to be long."""
    return tiny_pretrained(tmp_path_factory.mktemp("pretrained") / "smollm2", max_position_embeddings=2048)


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2: str) -> None:
    """The reader is in the folder of "Get started", with fewer rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    Path("SmolLM2").symlink_to(smollm2)
    write_demo_data(".", num_train=48, num_test=8)
    Path("fit.yaml").write_text(yaml.safe_dump(FIT), encoding="utf-8")


# peft asks transformers for an attribute that has another name by now
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
# torch's own use, as it compiles an optimizer of torchao
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in NAMES])
def test_every_block_of_a_guide_does_what_the_page_says(name: str, started: None, capsys: Any) -> None:
    Reader(capsys).read(ROOT / "docs" / "howto" / f"{name}.md")


def test_a_sweep_of_wandb_calls_fit_with_flags_that_it_takes(started: None, capsys: Any) -> None:
    sweep = yaml.safe_load(next(block for block in blocks(page("howto/sweeps.md"), "yaml") if "${args}" in block))
    values = {name: given.get("value", given.get("min")) for name, given in sweep["parameters"].items()}
    assert sweep["command"][:2] == ["lightning-sft", "fit"]
    Path("wandb.yaml").write_text("{trainer: {logger: true}}", encoding="utf-8")  # that of the guide on loggers
    given = [word for word in sweep["command"][1:] if word != "${args}"]
    with pytest.raises(SystemExit) as end:
        main([*given, *(f"--{name}={value}" for name, value in values.items()), "--print_config"])
    assert end.value.code == 0
    assert (
        yaml.safe_load(capsys.readouterr().out)["model"]["optimizer"]["init_args"]["lr"] == values["model.optimizer.lr"]
    )
