"""The files of a run beside its checkpoints: the ledger, the metrics and the record, read and cut to a step."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_sft.checkpoints.writing import newest
from lightning_sft.io.disk import rows_of
from lightning_sft.types import InputError

LEDGER_FILE, METRICS_FILE, RECORD_FILE = "samples.jsonl", "metrics.jsonl", "run.json"


def lines_of(path: str | Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The lines of a ledger, each with the position in the file where it ends; damaged ones are skipped by name."""
    return ((row, end) for row, end in rows_of(path) if isinstance(row.get("step"), int))


def cut_off(path: Path, step: int) -> int:
    """Cut a ledger off after a step; one that has nothing of this run is put aside under another name.

    Args:
        path: The ledger; it need not exist.
        step: The last that is kept.

    Returns:
        The last step that it has.
    """
    if not path.exists():
        return 0
    kept = [(line["step"], end) for line, end in lines_of(path) if line["step"] <= step]
    if not kept:
        free = next(
            p for n in range(1, 1_000_000) if not (p := path.with_name(f"{path.stem}.{n}{path.suffix}")).exists()
        )
        path.rename(free)
        rank_zero_info(f"{path} has no step that this run resumes from; it is kept as {free.name}.")
        return 0
    os.truncate(path, max(end for _, end in kept))
    return int(kept[-1][0])


def refuse_anew(trainer: Trainer, folder: Path) -> None:
    """Refuse to begin at step 0 in the folder of a run that has finished steps.

    A run that was killed before its first checkpoint has finished none: all of its steps are taken again.

    Args:
        trainer: At its first step, or at that of the checkpoint that it was resumed from.
        folder: Of the ledger and the record.

    Raises:
        InputError: With what to do.
    """
    if trainer.global_step == 0:
        own = [str(found) for saver in trainer.checkpoint_callbacks if (found := getattr(saver, "dirpath", None))]
        refuse_finished(folder, [*own, folder / "checkpoints"])


def refuse_finished(folder: Path, places: Iterable[str | Path]) -> None:
    """Refuse the folder of a run that has finished steps, see :func:`refuse_anew`.

    Args:
        folder: Of the ledger and the record.
        places: Where its checkpoints are.

    Raises:
        InputError: With what to do.
    """
    folders = list(dict.fromkeys(map(Path, places)))
    files = [path for name in (LEDGER_FILE, METRICS_FILE) if (path := folder / name).is_file()]
    steps = max((line["step"] for path in files for line, _ in lines_of(path)), default=0)
    if not steps or not (any(any(own.glob("*.ckpt")) for own in folders) or record_of(folder).get("saved")):
        return
    if found := newest(folders):
        remedy = f"Resume it from {found} (--ckpt_path last)"
    elif found := newest(folders, resumable=False):
        remedy = (
            f"{found} has the weights alone, from which no run can resume. To begin with these weights, export them "
            "(lightning-sft export) and set model.pretrained to that folder"
        )
    else:
        remedy = "No checkpoint of it that can be read is left to resume from"
    raise InputError(
        f"The run in {folder} has finished step {steps:,}, and this one would begin at step 0 and replace its record. "
        f"{remedy}; give a new run a folder of its own (trainer.default_root_dir)."
    )


def record_of(folder: Path) -> dict[str, Any]:
    """What ``run.json`` says of the run of a folder; nothing where there is none, or a damaged one."""
    path = folder / RECORD_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        found = None
    if isinstance(found, dict):
        return found
    warnings.warn(f"Skipping {path}: it is damaged, no JSON object.", stacklevel=2)
    return {}


def line_of(path: str | Path, step: int) -> dict[str, Any]:
    """The line of a step.

    Raises:
        InputError: When there is no ledger, or no such step in it.
    """
    if not Path(path).is_file():
        raise InputError(f"There is no ledger {str(path)!r}: fit writes one, with the callback SampleLedger.")
    steps = [line for line, _ in lines_of(path)]
    for line in steps:
        if line["step"] == step:
            return line
    have = f"{steps[0]['step']} to {steps[-1]['step']}" if steps else "none"
    raise InputError(f"{path} has no step {step}. It has {have}.")
