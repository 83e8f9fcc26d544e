"""Tests of the way tests start processes."""

from __future__ import annotations

import sys

import psutil
import pytest

from tests.helpers.processes import run


def test_what_is_printed_is_returned_and_a_failure_shows_it() -> None:
    assert run([sys.executable, "-c", "print('done')"]) == "done\n"
    with pytest.raises(AssertionError, match=r"exit code 3(?s:.*)said before"):
        run([sys.executable, "-c", "print('said before'); raise SystemExit(3)"])


def test_a_hang_ends_with_the_stacks_of_all_processes() -> None:
    child = "import time\ndef waits_for_ever():\n    time.sleep(100)\nwaits_for_ever()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    with pytest.raises(AssertionError, match=r"no end after 2 s(?s:.*)in waits_for_ever"):
        run([sys.executable, "-c", code], timeout=2)
    assert not psutil.Process().children(recursive=True)
