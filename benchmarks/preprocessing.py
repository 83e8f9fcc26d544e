"""Rows a second from a JSONL file to masked, packed sequences: ours and TRL's own, in alternation, on the same rows.

    python benchmarks/preprocessing.py train.jsonl --tokenizer FOLDER [--prompt question --completion answer]

TRL's side is `SFTTrainer._prepare_dataset` as the trainer calls it, on conversational prompt-completion rows (so that
it masks the prompt), with its cache off. Ours checks parity for every row on the way. `pip install trl==1.16.0` first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from lightning_sft.data.dataset import load_split
from lightning_sft.data.packing import pack
from lightning_sft.data.plan import Plan

LENGTH = 2048


def ours(path: str, tokenizer: Any, columns: dict[str, str]) -> tuple[int, int, int]:
    """Targets, tokens and packs."""
    split = load_split("train", path, tokenizer, columns=columns, max_length=LENGTH)
    plan = Plan(split.lengths, split.weights, partial(pack, capacity=LENGTH))
    return split.num_targets, sum(split.lengths), len(plan.packs)


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
    seconds: dict[str, list[float]] = {"lightning_sft": [], "TRL": []}
    results: dict[str, tuple[int, int, int]] = {}
    for _ in range(given.rounds):
        for name, run in (("lightning_sft", ours), ("TRL", theirs)):
            begin = time.perf_counter()
            results[name] = run(given.path, tokenizer, {"prompt": given.prompt, "completion": given.completion})
            seconds[name].append(time.perf_counter() - begin)
    table = Table(title=f"{num_rows:,} rows, packs of {LENGTH:,}, median of {given.rounds}")
    for column in ("", "seconds", "rows/s", "targets", "tokens", "packs", "fill"):
        table.add_column(column, justify="right" if column else "left")
    for name, times in seconds.items():
        median, (targets, tokens, packs) = statistics.median(times), results[name]
        cells = (f"{median:.1f}", f"{num_rows / median:,.0f}", f"{targets:,}", f"{tokens:,}", f"{packs:,}")
        table.add_row(name, *cells, f"{tokens / packs / LENGTH:.2%}")
    Console().print(table)
    ratio = statistics.median(t / o for o, t in zip(*seconds.values(), strict=True))
    print(f"lightning_sft is {ratio:.1f} times as fast as TRL.")


if __name__ == "__main__":
    main()
