"""A stream's memory while it reads a file that is larger than it: rows a second, and the peak so far, at every tenth.

    python benchmarks/streaming.py --tokenizer FOLDER [--gigabytes 2] [--workers 2] [--file big.jsonl]

The file is generated unless it is there. Nothing is trained: batches are made and thrown away, as fast as they come.
Memory is the proportional set size (PSS) of this process and its workers together: pages that they share count once.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoTokenizer

from lightning_sft.data.batches.stream import StreamLoader
from lightning_sft.data.batches.stream_blocks import StreamLayout
from lightning_sft.data.rows.mixture import as_mixture
from lightning_sft.data.tokens.encode_rows import EncodingConfig
from lightning_sft.data.tokens.row_report import RowReport

WORDS = "the of and a to in he have it that for they with as not on she".split()  # noqa: SIM905 -- one line, not one a word


def generate(path: Path, size: int) -> None:
    """Write rows of a short question and an answer of some 300 words until the file has the size."""
    draw, written = random.Random(0), 0
    with path.open("w", encoding="utf-8") as file, Progress() as progress:
        task = progress.add_task(f"Writing {path}", total=size)
        number = 0
        while written < size:
            answer = " ".join(draw.choices(WORDS, k=draw.randint(50, 600)))
            line = json.dumps({"prompt": f"Question {number}?", "completion": answer}) + "\n"
            file.write(line)
            written, number = written + len(line), number + 1
            progress.update(task, completed=written)


def memory() -> float:
    """Megabytes of this process and its workers."""
    own = psutil.Process()
    return sum(process.memory_full_info().pss for process in [own, *own.children()]) / 1e6


def main() -> None:
    """Read the file once, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--file", type=Path, default=Path("build/stream.jsonl"))
    given = parser.parse_args()
    given.file.parent.mkdir(parents=True, exist_ok=True)
    if not given.file.exists():
        generate(given.file, int(given.gigabytes * 1e9))
    with given.file.open("rb") as file:
        num_rows = sum(1 for _ in file)
    recipe = EncodingConfig(AutoTokenizer.from_pretrained(given.tokenizer), max_length=2048)
    shape = StreamLayout(num_ranks=1, accumulate=1, capacity=2048, packing="packed", buffer_rows=4096, seed=0)
    ended: list[RowReport] = []
    loader = StreamLoader(
        as_mixture(str(given.file)),
        recipe,
        shape,
        num_workers=given.workers,
        finished=lambda account, targets: ended.append(account),
    )
    title = f"{given.file.stat().st_size / 1e9:.2f} GB, {num_rows:,} rows, {given.workers} workers"
    table = Table("rows", "seconds", "rows/s", "tokens/s", "memory now, MB", "peak so far, MB", title=title)
    rows, tokens, positions, peak, begin = 0, 0, 0, 0.0, time.perf_counter()
    marks = [num_rows * tenth // 10 for tenth in range(1, 11)]
    for number, batch in enumerate(loader):
        rows, tokens = rows + len(batch.provenance), tokens + batch.input_ids.numel()
        positions += shape.capacity
        if number % 20 == 0:
            peak = max(peak, memory())
        if rows >= marks[0]:
            marks.pop(0)
            seconds, now = time.perf_counter() - begin, memory()
            figures = (f"{rows:,}", f"{seconds:.0f}", f"{rows / seconds:,.0f}", f"{tokens / seconds:,.0f}")
            table.add_row(*figures, f"{now:,.0f}", f"{max(peak, now):,.0f}")
            print(*figures, f"{now:,.0f} MB", flush=True)
    console = Console()
    console.print(table)
    [account] = ended
    print(f"{rows:,} of {account.num_rows:,} rows came, each once; packs were {tokens / positions:.2%} full.")


if __name__ == "__main__":
    main()
