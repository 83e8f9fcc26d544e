"""lightning_sft, in its own environment: one task, told by the JSON of the first argument.

train        `python -m lightning_sft fit`, as a user runs it, with a callback that records the steps
preprocess   rows to packs
batches      the data in figures, and the first rows as token ids, which other systems can be given
encode       each row's sequences as token ids and labels, or why it is refused

The library is imported by the tasks that need it: `train` is to begin like the command, in a process that has nothing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from benchmarks.record import Record, settings


def train(given: SimpleNamespace) -> None:
    """Become the command line, with the settings of the benchmark before those of the case."""
    here = {
        "--model.pretrained": given.model,
        "--seed_everything": given.seed,
        "--trainer.max_steps": given.steps,
        "--trainer.max_epochs": 100,  # a short file has fewer steps
        "--trainer.precision": {"float32": "32-true", "bfloat16": "bf16-mixed"}[given.precision],
        "--trainer.default_root_dir": given.folder,
        "--trainer.callbacks": "benchmarks.hooks_ours.Recorder",
        "--trainer.callbacks.out": given.out,
    }
    if given.given:
        here |= {
            "--data": "benchmarks.hooks_ours.Given",
            "--data.path": given.given,
            "--data.size": given.rows_per_step,
        }
    else:
        here |= {"--data.train": given.rows, "--data.cache": "null"}
    pairs = {**here, **given.flags}.items()
    command = [
        sys.executable,
        "-m",
        "lightning_sft",
        "fit",
        *(str(part) for pair in pairs for part in pair),
        *getattr(given, "more", []),
    ]
    os.execv(sys.executable, command)


def preprocess(given: SimpleNamespace) -> None:
    """Rows a second from the file to the plan of an epoch; the tokenizer is loaded already."""
    from lightning_sft.data.batches.split_plan import SplitPlan
    from lightning_sft.data.tokens.dataset import load_split
    from lightning_sft.data.tokens.encode_rows import EncodingConfig
    from lightning_sft.model.pretrained import load_tokenizer
    from lightning_sft.training.trainer import Division

    tokenizer = load_tokenizer(given.model)
    began = time.perf_counter()
    split = load_split(
        "train", given.rows, EncodingConfig(tokenizer, max_length=given.length), num_workers=given.workers
    )
    SplitPlan.of(split, Division(), tokens_per_batch=given.length, seed=0)
    Record(given.out).write(rows=len(split.examples), seconds=time.perf_counter() - began)


def batches(given: SimpleNamespace) -> None:
    """Figures of the data, and its first rows as ``input_ids`` and ``labels``, which stand at their own positions."""
    from lightning_sft.data.tokens.dataset import load_split
    from lightning_sft.data.tokens.encode_rows import EncodingConfig
    from lightning_sft.model.pretrained import load_tokenizer
    from lightning_sft.types import IGNORE

    split = load_split("train", given.rows, EncodingConfig(load_tokenizer(given.model), max_length=given.length))
    lengths = split.lengths
    with Path(given.batches).open("w", encoding="utf-8") as file:
        for example in split.examples[: given.steps * given.rows_per_step]:
            pairs = zip(example.input_ids, example.target_weights, strict=True)
            labels = [int(token) if weight > 0 else IGNORE for token, weight in pairs]
            file.write(json.dumps({"input_ids": [int(i) for i in example.input_ids], "labels": labels}) + "\n")
    pairs_per_token = float((lengths * (lengths + 1) / 2).sum() / lengths.sum())
    facts = {"rows": len(lengths), "tokens": int(lengths.sum()), "targets": split.num_targets}
    Record(given.out).write(**facts, pairs_per_token=pairs_per_token, longest=int(lengths.max()))


def encode(given: SimpleNamespace) -> None:
    """The sequences of each row; the data module's own skipping of refused rows tells why."""
    from lightning_sft.data.tokens.dataset import load_split
    from lightning_sft.data.tokens.encode_rows import EncodingConfig
    from lightning_sft.model.pretrained import load_tokenizer
    from lightning_sft.types import IGNORE

    recipe = EncodingConfig(load_tokenizer(given.model))
    split = load_split("train", given.rows, recipe, invalid_rows="skip")
    lines = len(Path(given.rows).read_text(encoding="utf-8").splitlines())
    rows: list[list[dict[str, list[int]]]] = [[] for _ in range(lines)]
    for example in split.examples:
        pairs = zip(example.input_ids, example.target_weights, strict=True)
        labels = [int(token) if weight > 0 else IGNORE for token, weight in pairs]
        number = int(example.provenance.rpartition(":")[2])
        rows[number - 1].append({"input_ids": [int(i) for i in example.input_ids], "labels": labels})
    Record(given.out).write(rows=[row or "refused" for row in rows])


if __name__ == "__main__":
    chosen = settings()
    {"train": train, "preprocess": preprocess, "batches": batches, "encode": encode}[chosen.task](chosen)
