"""Tests of what holds for the pinned releases alone: pages that are measured with them, texts of other packages."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from tests.helpers.processes import ROOT

_PINS = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
_RELEASES = dict(line.split("==") for line in _PINS if "==" in line)


def with_pinned(*packages: str) -> pytest.MarkDecorator:
    """Mark of a test that is skipped where one of the packages is not the release of .ci/constraints.txt."""
    others = [name for name in packages if version(name).partition("+")[0] != _RELEASES[name]]
    return pytest.mark.skipif(bool(others), reason=f"made with the pinned {', '.join(others)}")
