"""Every file of configs/ runs as it is, but for the model, the data and how long it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_sft.main import main

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_it_fits(config: Path, pretrained: str, jsonl: Any, rows: list[dict[str, str]], tmp_path: Path) -> None:
    path = jsonl(rows)
    flags = {"model.pretrained": pretrained, "data.train": path, "data.val": path}
    flags |= {"trainer.precision": "32-true", "trainer.accelerator": "cpu", "trainer.default_root_dir": str(tmp_path)}
    cli = main(["fit", "--config", str(config), *(text for k, v in flags.items() for text in (f"--{k}", v))])
    assert cli.trainer.global_step > 0
