"""The claim of one process to make a file that many want: on this machine, or on others that see its folder.

A claim is a file that its owner creates, which only one process can do, and rewrites every few seconds. It works on any
file system, with or without locks. Whoever waits sees the owner and its progress in it; a claim that is not rewritten
any more is that of a dead process, and void. Owners that were only paused may thus find theirs void when they return:
what is made under a claim has to be published by a rename, so that two makers do no harm.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_sft.machine.terminal import Console

BEAT, LOST, POLL = 5.0, 60.0, 0.2
"""Seconds after which an owner rewrites its claim, a claim that was not is void, and waiting processes look again."""

_SAID = 30.0  # seconds between lines about what is waited for


class Claim:
    """A claim to a file.

    Args:
        path: Path of the claim, in the folder of the file.
        what: Name of what is made, for those who wait.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what, self.progress = path, what, ""
        self._held: os.stat_result | None = None
        self._ended = threading.Event()

    def take(self) -> bool:
        """Whether this process has the claim now; it is rewritten from then on, until it is released."""
        try:
            file = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        self._held = os.fstat(file)
        self._beat(file, 0)
        threading.Thread(target=self._beats, args=[file], daemon=True).start()
        return True

    def release(self) -> None:
        """Give up the claim, if this process has it."""
        self._ended.set()
        with suppress(OSError):
            if self._held is not None and os.path.samestat(self._held, self.path.stat()):
                self.path.unlink()

    def wait(self) -> None:
        """Wait until nobody has the claim; every half minute one process of each machine says so."""
        seen, changed = "", time.monotonic()
        says_at = changed + min(_SAID, 2 * BEAT)
        while True:
            try:
                now = self.path.read_text(encoding="utf-8")
            except FileNotFoundError:
                return
            if now != seen:
                seen, changed = now, time.monotonic()
            owner = _read(now)
            if time.monotonic() - changed > LOST or _has_died(owner):
                self._void(now)
                return
            if time.monotonic() > says_at:
                says_at += _SAID
                self._say(owner)
            time.sleep(POLL)

    def _beats(self, file: int) -> None:
        number = 0
        while not self._ended.wait(BEAT):
            number += 1
            with suppress(OSError):  # a full disk; those who wait may find the claim void
                self._beat(file, number)
        os.close(file)

    def _beat(self, file: int, number: int) -> None:
        text = json.dumps({**_here(), "progress": self.progress, "beat": number}).encode()
        os.pwrite(file, text, 0)
        os.ftruncate(file, len(text))

    def _void(self, seen: str) -> None:
        """Remove the claim of a dead process, which others may do at the same time, and a new owner claim again."""
        aside = self.path.with_name(f"{self.path.name}.{os.getpid()}.void")
        with suppress(FileNotFoundError):
            self.path.rename(aside)
            if aside.read_text(encoding="utf-8") != seen:  # a new owner was faster
                with suppress(FileExistsError):
                    os.link(aside, self.path)
            aside.unlink()

    def _say(self, owner: dict[str, Any]) -> None:
        if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
            who = f"process {owner['process']} on {owner['host']}" if owner else "another process"
            progress = f": {owner['progress']} so far" if owner.get("progress") else ""
            Console().print(f"Waiting for {who}, which encodes {self.what}{progress}.", highlight=False)


def _here() -> dict[str, Any]:
    """This process; process numbers mean something within a machine, and a container, alone."""
    with suppress(OSError):
        return {"process": os.getpid(), "host": socket.gethostname(), "space": os.stat("/proc/self/ns/pid").st_ino}
    return {"process": os.getpid(), "host": socket.gethostname(), "space": None}


def _read(text: str) -> dict[str, Any]:
    """The owner, or nothing while it writes."""
    try:
        found = json.loads(text)
        return found if isinstance(found, dict) and {"process", "host", "space"} <= found.keys() else {}
    except ValueError:
        return {}


def _has_died(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this machine, and is none any more."""
    here = _here()
    if not owner or here["space"] is None or [owner[key] for key in ("host", "space")] != [here["host"], here["space"]]:
        return False
    try:
        os.kill(int(owner["process"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return False
