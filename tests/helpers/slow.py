"""Cases of tests of which a few are in the quick suite."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(quick: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """Parameters of a test, marked as slow but for a few of them.

    Args:
        quick: Those that are not slow, all of which are among the cases.
        cases: All of them.
    """
    chosen, cases = list(quick), list(cases)
    assert all(case in cases for case in chosen)
    marked = (pytest.param(*case if isinstance(case, tuple) else [case], marks=pytest.mark.slow) for case in cases)
    return [case if case in chosen else param for case, param in zip(cases, marked, strict=True)]
