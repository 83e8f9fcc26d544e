from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_sft.main import main
from tests.processes import torchrun


def flags(pretrained: str, path: str, out: Path) -> list[str]:
    keys = {"model.pretrained": pretrained, "data.predict": path, "model.max_new_tokens": 2, "trainer.logger": "false"}
    keys |= {"trainer.accelerator": "cpu", "trainer.default_root_dir": str(out), "data.predict_batch_size": 2}
    return [text for key, value in keys.items() for text in (f"--{key}", str(value))]


def test_two_processes_write_every_row_once_in_the_order_of_the_input(
    pretrained: str, jsonl: Any, tmp_path: Path
) -> None:
    path = jsonl([{"prompt": "a" * n, "completion": str(n)} for n in (3, 9, 1, 4, 7)])
    main(["predict", *flags(pretrained, path, tmp_path / "one")])
    torchrun("lightning_sft", "predict", *flags(pretrained, path, tmp_path / "two"), "--trainer.devices", "2")
    one, two = ((tmp_path / name / "predictions.jsonl").read_text() for name in ("one", "two"))
    assert [json.loads(line)["reference"] for line in one.splitlines()] == ["3", "9", "1", "4", "7"]
    assert one == two
