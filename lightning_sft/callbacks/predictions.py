"""Predictions to a file, as they come."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_sft.io.arguments import check_arguments
from lightning_sft.io.disk import rows_of, write
from lightning_sft.io.named import OurNames
from lightning_sft.io.words import counted
from lightning_sft.training.trainer import data_parallel, datamodule_of, gather
from lightning_sft.types import Prompt

if TYPE_CHECKING:
    from lightning_sft.datamodule import SFTDataModule


class PredictionWriter(Callback, OurNames):
    """Writes what ``predict`` generates as JSONL, one row an input row, in the order of the input.

    Until all are there, each rank appends its own to a hidden file beside it. A ``predict`` that begins where another
    was killed, with the same model, prompts and settings, takes from these files what has been answered already.

    Args:
        path: The file to write.
    """

    def __init__(self, path: str | Path = "predictions.jsonl") -> None:
        check_arguments(PredictionWriter, locals())
        self.path = Path(path)
        self._rows: dict[int, dict[str, Any]] = {}  # those that this rank knows, by number
        self._key = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the data module leave out what has been answered, and hand out the longest prompts first."""
        data = cast("SFTDataModule", datamodule_of(trainer))  # or a user's own
        if stage == "predict" and hasattr(data, "predict_only"):
            prompts = data.prompts_of("predict")
            answered = self._answered(trainer, prompts)
            left = [prompt for prompt in prompts if prompt.number not in answered]
            data.predict_only(sorted(left, key=lambda prompt: -len(prompt.input_ids)))

    def _answered(self, trainer: Trainer, prompts: Sequence[Prompt]) -> set[int]:
        """The numbers of the prompts that need not be answered again, but for one; every rank calls it."""
        self._key, self._rows = _key(trainer, prompts), {}
        for part in self._parts():
            first, *rows = [row for row, _ in rows_of(part)] or [{}]
            if first.get("key") == self._key:
                self._rows |= {row["number"]: row["row"] for row in rows}
        known = {number for rows in gather(trainer, sorted(self._rows)) for number in rows}
        trainer.strategy.barrier("answered")  # nobody writes before all have read
        if known:
            have = "has" if len(known) == 1 else "have"
            rank_zero_info(f"Of {counted(len(prompts), 'prompt')}, {len(known):,} {have} been answered before.")
        return known if len(known) < len(prompts) else known - {prompts[-1].number}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a file of this rank, with what it knows; those of another model or of other prompts are overwritten."""
        self._file = self._part(data_parallel(trainer)[0])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._append({"key": self._key}, *_lines(self._rows), mode="w")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch's rows."""
        rank, num_ranks = data_parallel(trainer)
        prompts: Sequence[Prompt] | None = getattr(batch, "prompts", None)
        begin = len(self._rows)  # without numbers, as of a user's own loader, rank r has the rows r, r + n, …
        numbers = [(begin + i) * num_ranks + rank for i in range(len(outputs))]
        numbers = numbers if prompts is None else [prompt.number for prompt in prompts]
        found = dict(zip(numbers, outputs, strict=True))
        self._rows |= found
        self._append(*_lines(found))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the rows of all ranks and write them on the first."""
        rows = {number: row for share in gather(trainer, self._rows) for number, row in share.items()}
        self._rows = {}
        if trainer.is_global_zero:
            text = "".join(json.dumps(rows[number], ensure_ascii=False) + "\n" for number in sorted(rows))
            write(self.path, text)
            for part in self._parts():
                part.unlink()
            print(f"{counted(len(rows), 'prediction')}: {self.path}")

    def _part(self, rank: int | str) -> Path:
        return self.path.with_name(f".{self.path.name}.rank{rank}.partial")

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(self._part("*").name))

    def _append(self, *lines: dict[str, Any], mode: str = "a") -> None:
        with self._file.open(mode, encoding="utf-8") as file:
            file.write("".join(f"{json.dumps(line)}\n" for line in lines))


def _lines(rows: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"number": number, "row": row} for number, row in rows.items()]


def _key(trainer: Trainer, prompts: Sequence[Prompt]) -> str:
    """A digest of all that answers depend on."""
    module = trainer.lightning_module
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.number, list(map(int, prompt.input_ids)), prompt.provenance]).encode())
    pretrained, sampling = getattr(module, "pretrained", None), getattr(module, "sampling", None)
    of_model = [pretrained, *_times(pretrained), str(trainer.ckpt_path), *_times(trainer.ckpt_path)]
    how = [getattr(module, "max_new_tokens", None), None if sampling is None else asdict(sampling), trainer.precision]
    digest.update(json.dumps([of_model, how]).encode())
    return digest.hexdigest()


def _times(path: Any) -> list[int]:
    """When a file, or the files of a folder, were written."""
    path = Path(str(path)).expanduser()
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    return [file.stat().st_mtime_ns for file in files]
