"""A name that is nowhere is refused in seconds, also without a network."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from lightning_sft.io import hub
from lightning_sft.model.pretrained import load_tokenizer
from lightning_sft.types import InputError


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine of a user, but for the hub, which does not answer."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "getproxies", dict)

    def refuse(*_: Any, **__: Any) -> Any:
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.mark.parametrize("name", ["SmolLM2-tpyo", "owner/nomodel"])
def test_what_is_nowhere_is_refused_without_asking_again_and_again(
    name: str,
) -> None:
    begin = time.monotonic()
    with pytest.raises(InputError, match=f"There is no folder or file {name!r} here.*cannot be reached"):
        load_tokenizer(name)
    assert time.monotonic() - begin < 30  # the libraries give up after a minute


@pytest.mark.parametrize("name", ["./nofolder", "/no/such/folder", "a/b/c"])
def test_a_path_that_is_not_there_is_no_name_of_the_hub(name: str) -> None:
    with pytest.raises(InputError, match="There is no folder or file"):
        hub.check_reachable(name, "a folder")


def test_folders_proxies_and_the_cache_are_left_to_the_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.check_reachable(str(tmp_path), "a folder")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "/cache/config.json")
    hub.check_reachable("owner/cached", "a folder")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy"})
    hub.check_reachable("owner/model", "a folder")
