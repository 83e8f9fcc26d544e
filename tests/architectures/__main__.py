"""Write docs/reference/models.md: ``python -m tests.architectures``; with model types, measure their rows again."""

from __future__ import annotations

import sys
import time

from tests.architectures.configs import ARCHITECTURES
from tests.architectures.table import PAGE, all_measured, page, versions, written


def main(names: list[str]) -> None:
    """Measure architectures and write the page after each, so that an interrupted run has not been in vain."""
    everything = [name for group in ARCHITECTURES.values() for name in group]
    if unknown := set(names) - set(everything):
        sys.exit(f"There is no configuration of {', '.join(sorted(unknown))} in tests/architectures/configs.py.")
    text = PAGE.read_text(encoding="utf-8")
    if names and versions() not in text:
        sys.exit("The page is of other versions. Measure all architectures: python -m tests.architectures")
    rows = written(text) if names else {}
    begin = time.monotonic()
    for name, row in all_measured(names or everything):
        rows[name] = row
        print(f"{time.monotonic() - begin:.0f} s  {name}: {row}", flush=True)
        PAGE.write_text(page(text, rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
