from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_sft.disk import sync


def test_files_and_folders_are_asked_to_be_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("all of it")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    sync([file, tmp_path])
    assert synced == [file.stat().st_ino, tmp_path.stat().st_ino]
