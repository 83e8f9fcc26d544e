"""Nothing is uploaded unless asked for, and nothing that has not passed the comparison."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import SafeCheckpoint
from lightning_sft.main import main
from lightning_sft.types import InputError


class Hub:
    """What the hub was asked to do."""

    calls: list[Any]
    refuses = False

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> None:
        if self.refuses:
            raise HfHubHTTPError("403 Forbidden", response=SimpleNamespace(headers={}, request=None))
        self.calls.append((repository, private, exist_ok))

    def upload_folder(self, *, repo_id: str, folder_path: Path) -> str:
        self.calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))
        return f"https://hub/{repo_id}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    Hub.calls, Hub.refuses = [], False
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    return Hub


@pytest.fixture
def ckpt(pretrained: str, quiet_trainer: Any, rows: list[dict[str, str]], tmp_path: Path) -> str:
    trainer = quiet_trainer(callbacks=[SafeCheckpoint(tmp_path / "run")], enable_checkpointing=True, max_steps=1)
    trainer.fit(SFTModule(pretrained), SFTDataModule(train=rows))
    [path] = (tmp_path / "run").glob("*.ckpt")
    return str(path)


def test_a_folder_is_uploaded_to_a_private_repository_on_request_alone(
    hub: type[Hub], ckpt: str, tmp_path: Path
) -> None:
    main(["export", "--ckpt", ckpt, "--out", str(tmp_path / "one")])
    assert hub.calls == []
    main(["export", "--ckpt", ckpt, "--out", str(tmp_path / "two"), "--push", "me/mine"])
    created, (repository, files) = hub.calls
    assert created == ("me/mine", True, True)
    assert repository == "me/mine"
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= set(files)


def test_what_cannot_be_uploaded_is_refused_before_the_export_or_kept(
    hub: type[Hub], ckpt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["export", "--ckpt", ckpt, "--out", str(tmp_path / "out"), "--push"]
    with pytest.raises(InputError, match=r"push='a/b/c' is no name of a repository.*Expected owner/name"):
        main([*command, "a/b/c"])
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(InputError, match="hf auth login"):
        main([*command, "me/mine"])
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    hub.refuses = True
    with pytest.raises(InputError, match="is exported, but cannot be uploaded to me/mine: 403") as refused:
        main([*command, "me/mine"])
    assert "hf_secret" not in str(refused.value)
    assert (tmp_path / "out" / "config.json").is_file()
