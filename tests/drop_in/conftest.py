from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.gradients import ROWS


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jsonl: Any, pretrained: str) -> Path:
    """The folder of a user, with a model and data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SmolLM2").symlink_to(pretrained)
    jsonl(ROWS)
    jsonl(ROWS[:4], "val.jsonl")
    return tmp_path
