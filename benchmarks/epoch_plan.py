"""Time and memory of the plan of an epoch against the number of rows: `python -m benchmarks.epoch_plan [--publish]`.

Lengths are log-normal, in packs of 2,048 tokens, for a rank of 8 that accumulate 4 micro-batches. Seconds are of CPU
time in one process; memory is what the process takes at its peak beside the lengths and weights themselves. It writes
epoch_plan.md and epoch_plan.png to build/bench, and with --publish the page docs/concepts/packing.md.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import time
from pathlib import Path

import numpy as np

from benchmarks.data_growth import apart
from benchmarks.environments import BUILD, ROOT
from benchmarks.plot import draw_growth
from benchmarks.table import write_page
from lightning_sft.data.batches.packing import packed
from lightning_sft.data.batches.plan import EpochPlan

PAGE = ROOT / "docs" / "concepts" / "packing.md"
ROWS = [100_000, 1_000_000, 10_000_000]
CAPACITY = 2048


def planned(rows: int) -> tuple[float, float]:
    """Seconds of CPU time and MB of memory for the plan and its first epoch."""
    drawn = np.random.default_rng(0).lognormal(np.log(CAPACITY / 16), 1.2, rows)
    lengths = np.clip(drawn, 1, CAPACITY).astype(np.int64)
    weights = np.maximum(lengths // 3, 1).astype(np.float64)
    del drawn
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    plan = EpochPlan(lengths, weights, lambda own: packed(own, CAPACITY), num_ranks=8, accumulate=4)
    plan.micro_batches(epoch=0, rank=3)
    seconds, after = time.process_time() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return seconds, (after - before) * 1024 / 1e6


def main(arguments: list[str] | None = None) -> list[tuple[int, float, float]]:
    """Measure the points, and return them: rows, seconds and MB."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--out", type=Path, default=BUILD)
    parser.add_argument("--publish", action="store_true", help="write the page and its picture")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    found = [(rows, *apart(planned, rows)) for rows in given.rows]
    lines = ["| rows | seconds | MB | bytes a row |", "|---|---|---|---|"]
    lines += [f"| {rows:,} | {seconds:.1f} | {mb:,.0f} | {mb * 1e6 / rows:,.0f} |" for rows, seconds, mb in found]
    text = "\n".join(lines)
    (given.out / "epoch_plan.md").write_text(text + "\n", encoding="utf-8")
    points = {"seconds": [(n, seconds) for n, seconds, _ in found], "MB": [(n, mb) for n, _, mb in found]}
    curves = {f"{unit} of a plan": {"x": "rows", "y": unit, "systems": {"ours": own}} for unit, own in points.items()}
    draw_growth(curves, given.out / "epoch_plan.png")
    if given.publish:
        new = f"{text}\n\n![Seconds and MB against rows](epoch_plan.png)"
        PAGE.write_text(write_page(PAGE.read_text(encoding="utf-8"), "epoch plan", new), encoding="utf-8")
        shutil.copy(given.out / "epoch_plan.png", PAGE.with_name("epoch_plan.png"))
    print(text)
    return found


if __name__ == "__main__":
    main()
