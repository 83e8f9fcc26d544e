"""Every file of configs/ runs as it is, but for the model, the machine and how long it takes.

Those of configs/models/ are run by test_families, each with its own architecture.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_sft.demos import tiny_pretrained
from lightning_sft.main import main
from tests.helpers.processes import ROOT, run

ALL = {path.stem: path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "models"}
TWO_NODES = "fit"  # is run by test_two_nodes
PARALLEL = sorted(
    {name for name, path in ALL.items() if yaml.safe_load(path.read_text())["trainer"].get("devices", 1) != 1}
    - {TWO_NODES}
)
ON_CPU = {"trainer.precision": "32-true", "trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false"}


def sources(value: Any) -> Iterator[str]:
    """The data files that a config names."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from sources(inner)
    elif isinstance(value, str) and value.endswith(".jsonl"):
        yield value.replace("*", "1")


def write_data(config: Path, folder: Path) -> None:
    """Write the data that a config names below `folder`, where it finds the templates of configs/, too."""
    if not (folder / "configs").exists():
        (folder / "configs").symlink_to(ROOT / "configs")
    for name in sources(yaml.safe_load(config.read_text())["data"]):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        prompt, completion = ("question", "answer") if "maths" in path.stem else ("prompt", "completion")
        rows = [{prompt: f"Say {i}", completion: f"{i} it is"} for i in range(12)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(config: Path, **flags: str) -> list[str]:
    flags = ON_CPU | {"trainer.max_steps": "3"} | flags
    return ["fit", "--config", str(config), *(text for key, value in flags.items() for text in (f"--{key}", value))]


@pytest.mark.parametrize("name", sorted(ALL.keys() - {*PARALLEL, TWO_NODES}))
def test_it_fits(name: str, pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ALL[name]
    monkeypatch.chdir(tmp_path)
    write_data(config, tmp_path)
    cli = main(arguments(config, **{"model.pretrained": pretrained}))
    assert cli.trainer.global_step > 0
    if config.stem == "mixture":
        assert {"train/loss/maths", "val/loss/chat"} <= cli.trainer.callback_metrics.keys()
    [saved] = tmp_path.rglob("config.yaml")
    again = main(["fit", "--config", str(saved)])
    assert {key: again.config.fit[key] for key in ("data", "model")} == {
        key: cli.config.fit[key] for key in ("data", "model")
    }


@pytest.mark.slow  # that their strategies train is seen by test_strategies too
@pytest.mark.parametrize("name", PARALLEL)
def test_it_fits_on_two_processes(name: str, tmp_path: Path) -> None:
    """Each as a user starts it: Lightning starts the second process."""
    write_data(ALL[name], tmp_path)
    flags = {"model.pretrained": tiny_pretrained(tmp_path / "model", num_key_value_heads=2), "trainer.devices": "2"}
    flags |= {"data.tokens_per_batch": "48", "trainer.logger": "CSVLogger", "trainer.logger.save_dir": str(tmp_path)}
    if name == "context_parallel":
        flags["trainer.strategy.init_args.context_parallel_size"] = "2"
    if name == "deepspeed":
        pytest.importorskip("deepspeed")
        flags |= {"trainer.strategy": "tests.helpers.deepspeed_cpu.DeepSpeedOnCPU", "trainer.strategy.stage": "3"}
    command = [sys.executable, "-m", "lightning_sft", *arguments(ALL[name], **flags)]
    run(command, cwd=tmp_path)
    [metrics] = tmp_path.rglob("metrics.csv")
    assert "train/loss" in metrics.read_text()
    assert list(tmp_path.rglob("*.ckpt"))
