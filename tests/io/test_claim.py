"""Of all processes that want a file one makes it; the others wait, but never for a dead one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_sft.io import claim as claiming
from lightning_sft.io.claim import Claim

HOLD = (
    "import sys, time; from pathlib import Path; from lightning_sft.io.claim import Claim;"
    "claim = Claim(Path(sys.argv[1]), 'train'); claim.take(); claim.progress = '7 rows'; print('taken', flush=True);"
    "time.sleep(600)"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "key.claim"


@pytest.fixture
def owner(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the claim."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_one_takes_it_and_the_next_one_may_when_it_is_released(path: Path) -> None:
    first, second = Claim(path, "train"), Claim(path, "train")
    assert first.take()
    assert not second.take()
    second.release()  # of another's claim does nothing
    assert path.exists()
    first.release()
    second.wait()
    assert second.take()
    second.release()
    assert not path.exists()


def test_a_claim_of_a_killed_process_of_this_machine_is_void_at_once(path: Path, owner: subprocess.Popen[str]) -> None:
    owner.kill()
    owner.wait()
    waiting = Claim(path, "train")
    assert not waiting.take()
    waiting.wait()
    assert waiting.take()
    waiting.release()


def test_a_claim_of_another_machine_is_void_when_it_is_not_rewritten(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claiming, "LOST", 0.3)
    here = {"process": os.getpid(), "host": f"not {socket.gethostname()}", "space": 1}
    path.write_text(json.dumps(here | {"progress": "", "beat": 0}))
    waiting, begin = Claim(path, "train"), time.monotonic()
    waiting.wait()
    assert time.monotonic() - begin >= 0.3
    assert waiting.take()
    waiting.release()


def test_a_claim_that_is_rewritten_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claiming, "BEAT", 0.05)
    monkeypatch.setattr(claiming, "LOST", 0.5)
    monkeypatch.setattr(claiming, "_has_died", lambda owner: False)
    mine, checks = Claim(path, "train"), []
    sleep, until = time.sleep, time.monotonic() + 1.5
    mine.take()

    def waits(seconds: float) -> None:
        checks.append(path.exists())
        if time.monotonic() > until:
            mine.release()
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", waits)
    Claim(path, "train").wait()
    assert all(checks)
    assert time.monotonic() > until


def test_a_paused_owner_does_not_release_the_claim_of_who_came_after_it(
    path: Path, owner: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claiming, "LOST", 0.3)
    owner.send_signal(signal.SIGSTOP)
    late = Claim(path, "train")
    late.wait()
    assert late.take()
    owner.send_signal(signal.SIGCONT)
    assert not Claim(path, "train").take()
    late.release()


def test_a_new_owner_keeps_its_claim_when_the_old_one_is_found_void(path: Path) -> None:
    path.write_text("new")
    Claim(path, "train")._void("old")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]
    Claim(path, "train")._void("new")
    assert not list(path.parent.iterdir())


def test_who_waits_says_for_whom_and_how_far_that_is(
    path: Path, owner: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(claiming, "_SAID", 0.0)
    seen = 0
    sleep = time.sleep

    def waits(seconds: float) -> None:
        nonlocal seen
        seen += 1
        if "7 rows" in path.read_text() or seen > 100:
            owner.kill()
            owner.wait()
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", waits)
    monkeypatch.setenv("LOCAL_RANK", "0")
    Claim(path, "train").wait()
    said = capsys.readouterr().out
    assert f"Waiting for process {owner.pid} on {socket.gethostname()}, which encodes train" in said.replace("\n", " ")
