"""However many processes train, each row is encoded once; by each machine, where these do not share a folder."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from lightning_sft.data.tokens.cache import cached
from tests.data.tokens.test_cache import chunks
from tests.helpers.gradients import ROWS
from tests.helpers.processes import torchrun

PROCESSES = 4


def encoded(folder: Path) -> Counter[str]:
    """How often each row was encoded, over all processes."""
    return Counter(line for path in folder.glob("encoded-*.txt") for line in path.read_text().splitlines())


@pytest.mark.parametrize(("kind", "times"), [("rows", 1), ("small", 1), ("file", 1), ("apart", 2)])
def test_a_row_is_encoded_once_for_all_processes_that_share_a_folder(
    kind: str, times: int, pretrained: str, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    torchrun("tests.helpers.encoding", pretrained, kind, str(tmp_path), processes=PROCESSES)
    assert list(encoded(tmp_path).values()) == [times] * len(ROWS)
    said = "".join(path.read_text() for path in tmp_path.glob("said-*.txt"))
    assert ("train was encoded 2 times, by machines that do not share the folder data.cache" in said) == (times == 2)
    results = [path.read_text() for path in tmp_path.glob("examples-*.json")]
    assert len(results) == PROCESSES
    assert len(set(results)) == 1


def test_a_process_that_is_killed_while_it_encodes_does_not_leave_others_waiting(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from lightning_sft.data.tokens.cache import cached;"
        "from tests.data.tokens.test_cache import chunks;"
        "cached(Path(sys.argv[1]), 'key', lambda: chunks(100_000, 0.02))"
    )
    killed = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    while not list(tmp_path.glob(".key.*/key.arrow")):
        time.sleep(0.02)
    waiting = "from tests.data.tokens.test_encoding_once import waits; waits"
    process = subprocess.Popen([sys.executable, "-c", f"{waiting}({str(tmp_path)!r})"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"waiting\n"
    assert process.poll() is None
    killed.kill()
    killed.wait()
    assert process.wait(60) == 0
    process.stdout.close()
    assert len(cached(tmp_path, "key", chunks)[0]) == 3


def waits(folder: str) -> None:
    """Want the entry that another process is building."""
    print("waiting", flush=True)
    cached(Path(folder), "key", chunks)
