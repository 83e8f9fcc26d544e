"""Tests of the way tests start processes."""

from __future__ import annotations

import sys

import psutil
import pytest

from tests.helpers.processes import fork, run, torchrun


def test_what_is_printed_is_returned_and_a_failure_shows_it() -> None:
    assert run([sys.executable, "-c", "print('done')"]) == "done\n"
    with pytest.raises(AssertionError, match=r"exit code 3(?s:.*)said before"):
        run([sys.executable, "-c", "print('said before'); raise SystemExit(3)"])


def test_a_hang_ends_with_the_stacks_of_all_processes() -> None:
    child = "import time\ndef waits_for_ever():\n    time.sleep(100)\nwaits_for_ever()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    before = psutil.Process().children(recursive=True)
    with pytest.raises(AssertionError, match=r"no end after 2 s(?s:.*)in waits_for_ever"):
        run([sys.executable, "-c", code], timeout=2)
    assert psutil.Process().children(recursive=True) == before


@pytest.mark.parametrize(("number", "timeout", "how"), [("1", 60, "exit code -6, 3"), ("9", 1, "no end after 1 s")])
def test_when_one_rank_fails_or_all_hang_they_are_ended_with_their_stacks(number: str, timeout: int, how: str) -> None:
    with pytest.raises(AssertionError, match=rf"{how}(?s:.*)said before(?s:.*)in waits_for_ever"):
        torchrun("tests.helpers.hanging", number, timeout=timeout)


def test_a_module_runs_as_from_a_shell_with_the_variables_of_its_rank() -> None:
    for rank, ended in enumerate(fork("tests.helpers.hanging", "none", ranks=[{"RANK": "0"}, {"RANK": "1"}])):
        assert ended == (0, f"{rank} ['none'] __main__\n", "")
