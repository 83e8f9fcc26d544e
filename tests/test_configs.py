"""Every file of configs/ runs as it is, but for the model, the machine and how long it takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_sft.main import main

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def sources(value: Any) -> Iterator[str]:
    """The data files that a config names."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from sources(inner)
    elif isinstance(value, str) and value.endswith(".jsonl"):
        yield value.replace("*", "1")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_it_fits(config: Path, pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = yaml.safe_load(config.read_text())
    monkeypatch.chdir(tmp_path)
    for path in map(Path, sources(given["data"])):
        path.parent.mkdir(parents=True, exist_ok=True)
        prompt, completion = ("question", "answer") if "maths" in path.stem else ("prompt", "completion")
        rows = [{prompt: f"Say {i}", completion: f"{i} it is"} for i in range(12)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"model.pretrained": pretrained, "trainer.precision": "32-true", "trainer.accelerator": "cpu"}
    flags |= {"trainer.max_steps": "3", "trainer.enable_progress_bar": "false"}
    cli = main(["fit", "--config", str(config), *(text for k, v in flags.items() for text in (f"--{k}", v))])
    assert cli.trainer.global_step > 0
    if config.stem == "mixture":
        assert {"train/loss/maths", "val/loss/chat"} <= cli.trainer.callback_metrics.keys()
    [saved] = tmp_path.rglob("config.yaml")
    again = main(["fit", "--config", str(saved)])
    assert {key: again.config.fit[key] for key in ("data", "model")} == {
        key: cli.config.fit[key] for key in ("data", "model")
    }
