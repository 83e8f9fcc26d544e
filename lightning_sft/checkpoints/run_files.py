"""The files of a run besides its checkpoints: ledger, metrics and record, read and truncated to a step."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_sft.checkpoints.writing import newest, why_unreadable
from lightning_sft.io.address import Place, place
from lightning_sft.io.disk import rows_of
from lightning_sft.training.trainer import how_to_resume
from lightning_sft.types import InputError

LEDGER_FILE, METRICS_FILE, RECORD_FILE = "samples.jsonl", "metrics.jsonl", "run.json"


def lines_of(path: str | Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The lines of a ledger, each with its end position in the file; damaged ones are skipped with a warning."""
    return ((row, end) for row, end in rows_of(path) if isinstance(row.get("step"), int))


def cut_off(path: Path, step: int) -> int:
    """Truncate a ledger after a step; one without earlier steps is renamed.

    Args:
        path: Path of the ledger, which need not exist.
        step: Last step to keep.

    Returns:
        The last remaining step, or 0.
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
    """Refuse to start at step 0 in the folder of a run that has finished steps.

    A run that was killed before its first checkpoint counts as having finished none, since all its steps are repeated.

    Args:
        trainer: Trainer at the start of training.
        folder: Folder of the ledger and the record.

    Raises:
        InputError: When the folder holds such a run; the message says how to proceed.
    """
    if trainer.global_step == 0:
        own = [str(found) for saver in trainer.checkpoint_callbacks if (found := getattr(saver, "dirpath", None))]
        refuse_finished(folder, [*own, folder / "checkpoints"], how_to_resume(trainer))


def refuse_finished(folder: Path, places: Iterable[str | Place], how: str = "--ckpt_path last") -> None:
    """Refuse the folder of a run that has finished steps, see :func:`refuse_anew`.

    Args:
        folder: Folder of the ledger and the record.
        places: Folders of the run's checkpoints.
        how: What the user writes to resume a run.

    Raises:
        InputError: When the folder holds such a run; the message says how to proceed.
    """
    folders = list(dict.fromkeys(map(place, places)))
    files = [path for name in (LEDGER_FILE, METRICS_FILE) if (path := folder / name).is_file()]
    steps = max((line["step"] for path in files for line, _ in lines_of(path)), default=0)
    if not steps or not (any(any(own.glob("*.ckpt")) for own in folders) or record_of(folder).get("saved")):
        return
    if found := newest(folders):
        remedy = f"Resume it from {found} ({how})"
    elif found := newest(folders, resumable=False):
        remedy = (
            f"{found} has only the weights, from which no run can resume. To start from these weights, export them "
            "(lightning-sft export) and set model.pretrained to that folder"
        )
    else:
        reason = why_unreadable(path for own in folders for path in own.glob("*.ckpt"))
        remedy = "No readable checkpoint of it is left to resume from" + (f" ({reason})" if reason else "")
    raise InputError(
        f"The run in {folder} has finished step {steps:,}, and this one would start at step 0 and replace its record. "
        f"{remedy}; give a new run a separate folder (trainer.default_root_dir)."
    )


def record_of(folder: Path) -> dict[str, Any]:
    """The contents of a folder's ``run.json``; empty if it is missing or damaged."""
    path = folder / RECORD_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        found = None
    if isinstance(found, dict):
        return found
    warnings.warn(f"Skipping {path}: it is damaged, not a JSON object.", stacklevel=2)
    return {}


def line_of(path: str | Path, step: int) -> dict[str, Any]:
    """The ledger's line of a step.

    Raises:
        InputError: When there is no ledger, or the step is not in it.
    """
    if not Path(path).is_file():
        raise InputError(f"There is no ledger {str(path)!r}: fit writes one, with the callback SampleLedger.")
    steps = [line for line, _ in lines_of(path)]
    for line in steps:
        if line["step"] == step:
            return line
    have = f"{steps[0]['step']} to {steps[-1]['step']}" if steps else "none"
    raise InputError(f"{path} has no step {step}. It has {have}.")
