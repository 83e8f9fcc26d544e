"""Rows a second from a JSONL file to masked, packed sequences: ours and TRL's own, in alternation, on the same rows.

    python benchmarks/preprocessing.py train.jsonl --tokenizer FOLDER [--prompt question --completion answer]

TRL's side is `SFTTrainer._prepare_dataset` as the trainer calls it, on conversational prompt-completion rows (so that
it masks the prompt), with its cache off. Ours checks parity for every row on the way. `pip install trl==1.16.0` first.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from lightning_sft.data.batches.split_plan import SplitPlan
from lightning_sft.data.rows.messages import Reading
from lightning_sft.data.tokens.dataset import load_split
from lightning_sft.data.tokens.encode_rows import EncodingConfig
from lightning_sft.training.trainer import Division

LENGTH = 2048


def ours(
    path: str, tokenizer: Any, columns: dict[str, str], num_workers: int = 0, cache: Path | None = None
) -> tuple[int, int, int]:
    """Targets, tokens and packs."""
    recipe = EncodingConfig(tokenizer, Reading(columns=columns), max_length=LENGTH)
    split = load_split("train", path, recipe, num_workers=num_workers, cache=cache)
    plan = SplitPlan.of(split, Division(), tokens_per_batch=LENGTH, seed=0).plan
    return split.num_targets, int(split.lengths.sum()), len(plan.packs)


def theirs(path: str, tokenizer: Any, columns: dict[str, str]) -> tuple[int, int, int]:
    """The same of TRL."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt, completion = row[columns["prompt"]], row[columns["completion"]]
        rows.append(
            {
                "prompt": [{"role": "user", "content": prompt}],
                "completion": [{"role": "assistant", "content": completion}],
            }
        )
    config = SFTConfig(max_length=LENGTH, packing=True, report_to=[], use_cpu=True, bf16=False)
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=True)
    prepare = SFTTrainer._prepare_dataset
    data = prepare(trainer, datasets.Dataset.from_list(rows), tokenizer, config, True, None, "train")
    mask = sum(label != -100 for labels in data["labels"] for label in labels)
    return mask, sum(map(len, data["input_ids"])), len(data)


def main() -> None:
    """Alternate the two, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--prompt", default="prompt")
    parser.add_argument("--completion", default="completion")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    num_rows = len(Path(given.path).read_text(encoding="utf-8").splitlines())
    cache = Path(tempfile.mkdtemp())
    runs: dict[str, Callable[..., tuple[int, int, int]]] = {
        "lightning_sft": ours,
        "lightning_sft, 2 workers": partial(ours, num_workers=2),
        "lightning_sft, second start": partial(ours, cache=cache),
        "TRL": theirs,
    }
    columns = {"prompt": given.prompt, "completion": given.completion}
    ours(given.path, tokenizer, columns, cache=cache)  # the first start
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, tuple[int, int, int]] = {}
    for _ in range(given.rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            results[name] = run(given.path, tokenizer, columns)
            seconds[name].append(time.perf_counter() - begin)
    table = Table(title=f"{num_rows:,} rows, packs of {LENGTH:,}, median of {given.rounds}")
    for column in ("", "seconds", "rows/s", "targets", "tokens", "packs", "fill"):
        table.add_column(column, justify="right" if column else "left")
    for name, times in seconds.items():
        median, (targets, tokens, packs) = statistics.median(times), results[name]
        cells = (f"{median:.1f}", f"{num_rows / median:,.0f}", f"{targets:,}", f"{tokens:,}", f"{packs:,}")
        table.add_row(name, *cells, f"{tokens / packs / LENGTH:.2%}")
    Console().print(table)
    for name, times in seconds.items():
        if name != "TRL":
            ratio = statistics.median(t / o for o, t in zip(times, seconds["TRL"], strict=True))
            print(f"{name} is {ratio:.1f} times as fast as TRL.")
    shutil.rmtree(cache)


if __name__ == "__main__":
    main()
