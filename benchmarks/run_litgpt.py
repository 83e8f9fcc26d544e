"""LitGPT, in its own environment: one task, told by the JSON of the first argument.

encode       each row as its loader encodes it, or the error that it raises
convert      the Hugging Face folder to LitGPT's format, once
train        its `finetune_full`, with a logger that records the steps
preprocess   its data loader alone: it encodes rows again in every epoch, in worker processes
"""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.fabric.loggers.logger import Logger
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import JSON
from litgpt.finetune import full
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from litgpt.tokenizer import Tokenizer

from benchmarks.record import Record, die, each_or_error, rows_of, settings


class Recorder(Logger):
    """Records every optimizer step of what LitGPT logs after each micro-batch.

    Args:
        out: File for the record.
        accumulate: Micro-batches of a step.
        dies_after: Step after which the process kills itself.
    """

    name, version = "benchmark", 0

    def __init__(self, out: str, accumulate: int, dies_after: int | None = None) -> None:
        self.record, self.accumulate, self.dies_after = Record(out), accumulate, dies_after
        self.tokens = self.targets = self.positions = 0

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """A micro-batch has ended; its loss is the mean over those of the step so far."""
        if metrics["iter"] % self.accumulate == 0:
            tokens = int(metrics["tokens"]) - self.tokens
            self.record.step(metrics["loss"], tokens, self.targets, self.positions)
            self.tokens, self.targets, self.positions = int(metrics["tokens"]), 0, 0
            if metrics["iter"] // self.accumulate == self.dies_after:
                die()

    def log_hyperparams(self, *arguments: Any, **others: Any) -> None:
        """Nothing."""

    def count(self, targets: torch.Tensor) -> None:
        """A micro-batch's targets, without each row's first position."""
        self.targets += int((targets != -100).sum())
        self.positions += targets.numel() + targets.shape[0]


def data(given: SimpleNamespace) -> JSON:
    """The rows, in the model's own chat format, with the prompt masked."""
    path = Path(given.folder) / "rows.json"
    rows = [{"instruction": row["prompt"], "output": row["completion"]} for row in rows_of(given.rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return JSON(path, mask_prompt=True, prompt_style="smollm2", val_split_fraction=4 / len(rows), seed=given.seed)


def train(given: SimpleNamespace) -> None:
    """Train with LitGPT's defaults, but for the settings of the case, and without its final validation."""
    arguments = {"global_batch_size": 16, "micro_batch_size": 1, "epochs": 5, "save_interval": 1000, **given.train}
    training = TrainArgs(log_interval=1, max_steps=given.steps, **arguments)
    recorder = Recorder(given.out, training.gradient_accumulation_iters(1), getattr(given, "dies_after", None))
    cross_entropy = full.chunked_cross_entropy

    def counted(logits: Any, targets: torch.Tensor, **others: Any) -> torch.Tensor:
        if torch.is_grad_enabled():  # not in a validation
            recorder.count(targets)
        return cross_entropy(logits, targets, **others)

    full.chunked_cross_entropy = counted
    full.choose_logger = lambda *arguments, **others: recorder
    full.setup(
        checkpoint_dir=Path(given.converted),
        out_dir=Path(given.folder),
        precision={"float32": "32-true", "bfloat16": "bf16-mixed"}[given.precision],
        data=data(given),
        train=training,
        eval=EvalArgs(interval=math.inf, max_new_tokens=1, final_validation=False),
        optimizer=given.optimizer,
        seed=given.seed,
        resume=getattr(given, "resumes", False),
    )


def preprocess(given: SimpleNamespace) -> None:
    """Rows a second out of its loader; the tokenizer is loaded already."""
    rows, tokenizer = data(given), Tokenizer(given.converted)
    rows.connect(tokenizer=tokenizer, batch_size=8, max_seq_length=given.length)
    rows.setup()
    began, count = time.perf_counter(), 0
    for batch in rows.train_dataloader():
        count += len(batch["input_ids"])
    Record(given.out).write(rows=count, seconds=time.perf_counter() - began)


def encode(given: SimpleNamespace) -> None:
    """Each row's token ids and labels, out of its data set; it reads Alpaca's rows alone."""

    def encoded(rows: list[dict[str, Any]]) -> list[Any]:
        path = Path(given.folder) / "rows.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([*rows, rows[0]]), encoding="utf-8")  # it keeps one for its validation
        own = JSON(path, mask_prompt=True, prompt_style=given.prompt_style, val_split_fraction=1 / (len(rows) + 1))
        own.connect(tokenizer=Tokenizer(given.model), batch_size=1, max_seq_length=-1)
        own.setup()
        found = {}
        for data in (own.train_dataset, own.test_dataset):
            for n in range(len(data)):
                item = data[n]
                key = json.dumps([data.data[n]["instruction"], data.data[n]["output"]])
                found[key] = [{name: item[name].tolist() for name in ("input_ids", "labels")}]
        return [found[json.dumps([row["instruction"], row["output"]])] for row in rows]

    Record(given.out).write(rows=each_or_error(encoded, rows_of(given.rows)))


def convert(given: SimpleNamespace) -> None:
    """Copy the folder, whose name has to be one that LitGPT knows, and convert its weights."""
    shutil.copytree(given.model, given.converted)
    convert_hf_checkpoint(Path(given.converted))


if __name__ == "__main__":
    chosen = settings()
    {"train": train, "preprocess": preprocess, "convert": convert, "encode": encode}[chosen.task](chosen)
