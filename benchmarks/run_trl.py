"""TRL, in its own environment: one task, told by the JSON of the first argument.

train        `SFTTrainer` on conversational prompt-completion rows, so that it masks the prompt, with its own packing
preprocess   rows to packs, as its trainer makes them
encode       each row as its trainer encodes it, with the loss on answers alone, or the error that it raises
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import datasets
import torch
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.record import Record, die, each_or_error, rows_of, settings


class Recorder(TrainerCallback):
    """Records every optimizer step; the trainer logs each.

    Args:
        out: File for the record.
        accumulate: Micro-batches of a step.
        counts: Tokens, targets and positions of the micro-batches, in order.
        dies_after: Step after which the process kills itself.
    """

    def __init__(
        self, out: str, accumulate: int, counts: list[tuple[int, int, int]], dies_after: int | None = None
    ) -> None:
        self.record, self.accumulate, self.counts, self.dies_after = Record(out), accumulate, counts, dies_after
        self.begun_at = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """A resumed run begins behind the steps of its checkpoint."""
        self.begun_at = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        """A step has ended, or the training has, which has no loss of its own."""
        if "loss" in logs:
            step = state.global_step - self.begun_at
            own = self.counts[(step - 1) * self.accumulate : step * self.accumulate]
            self.record.step(logs["loss"], *(sum(column) for column in zip(*own, strict=True)))

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """A step begins; those before it are saved, if they are to be."""
        if state.global_step == self.dies_after:
            die()


class Counting:
    """The trainer's collator, which counts what it makes: in the order of the training, some batches ahead of it."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.counts: list[tuple[int, int, int]] = []

    def __call__(self, examples: Any) -> Any:
        """One micro-batch."""
        batch = self.collator(examples)
        tokens = batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel()
        targets = (batch["labels"][:, 1:] != -100).sum()
        self.counts.append((int(tokens), int(targets), batch["input_ids"].numel()))
        return batch


def conversations(path: str) -> list[dict[str, Any]]:
    """The rows as TRL takes them."""
    roles = {"prompt": "user", "completion": "assistant"}
    rows = rows_of(path)
    return [{key: [{"role": role, "content": row[key]}] for key, role in roles.items()} for row in rows]


def train(given: SimpleNamespace) -> None:
    """Train with TRL's defaults, but for the settings of the case and what makes the steps seen."""
    config = {
        "output_dir": given.folder,
        "max_steps": given.steps,
        "seed": given.seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "bf16": given.precision == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
    }
    rows = conversations(given.rows)
    if given.given:
        rows = rows_of(given.given)
        config |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "train_sampling_strategy": "sequential"}
    arguments = SFTConfig(**{**config, **given.config})
    trainer = SFTTrainer(given.model, args=arguments, train_dataset=datasets.Dataset.from_list(rows))
    trainer.data_collator = counting = Counting(trainer.data_collator)
    dies_after = getattr(given, "dies_after", None)
    trainer.add_callback(Recorder(given.out, arguments.gradient_accumulation_steps, counting.counts, dies_after))
    trainer.train(resume_from_checkpoint=getattr(given, "resumes", False))
    if weights := getattr(given, "weights", None):
        torch.save(trainer.model.state_dict(), weights)


def preprocess(given: SimpleNamespace) -> None:
    """Rows a second to packs, as the trainer calls it; the tokenizer is loaded already, and its cache is off."""
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    config = SFTConfig(max_length=given.length, packing=True, report_to=[], use_cpu=True, bf16=False)
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=True)
    began = time.perf_counter()
    rows = conversations(given.rows)
    prepare: Any = SFTTrainer._prepare_dataset
    prepare(trainer, datasets.Dataset.from_list(rows), tokenizer, config, True, None, "train")
    Record(given.out).write(rows=len(rows), seconds=time.perf_counter() - began)


def encode(given: SimpleNamespace) -> None:
    """Each row's token ids and labels, out of the trainer's own data set and collator."""

    def encoded(rows: list[dict[str, Any]]) -> list[Any]:
        settings = {"max_length": None, "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True}
        settings |= {"output_dir": given.folder, "assistant_only_loss": "prompt" not in rows[0]}
        data = datasets.Dataset.from_list(rows)
        tokenizer = AutoTokenizer.from_pretrained(given.model)
        trainer = SFTTrainer(given.model, args=SFTConfig(**settings), train_dataset=data, processing_class=tokenizer)
        batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
        return [[{key: batch[key][0].tolist() for key in ("input_ids", "labels")}] for batch in batches]

    rows = conversations(given.rows) if given.dialect == "prompt_completion" else rows_of(given.rows)
    Record(given.out).write(rows=each_or_error(encoded, rows))


if __name__ == "__main__":
    datasets.disable_caching()
    datasets.disable_progress_bars()
    chosen = settings()
    {"train": train, "preprocess": preprocess, "encode": encode}[chosen.task](chosen)
