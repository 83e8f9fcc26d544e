"""The files of a run, read for its report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_sft.callbacks.samples import SAMPLES_FOLDER
from lightning_sft.checkpoints.run_files import METRICS_FILE, RECORD_FILE, lines_of, record_of
from lightning_sft.io.disk import rows_of
from lightning_sft.types import InputError

_OF_STEPS = ("loss", "token_accuracy", "entropy", "perplexity", "bits_per_byte")
_OF_TRAINING = (
    *("gradient_norm", "tokens_per_second", "targets_per_second", "tokens_seen", "targets_seen", "peak_memory_gib"),
    *("mfu", "share_of_peak", "packing_efficiency", "fill", "expert_imbalance", "unused_experts", "router_loss"),
)
_OURS = ("lr", "drift/", *(f"{kind}/{name}" for kind in ("train", "val") for name in (*_OF_STEPS, *_OF_TRAINING)))


@dataclass(frozen=True)
class Run:
    """A run, read from its folder.

    Args:
        folder: Folder with the record.
        record: Description of the run, see :class:`~lightning_sft.callbacks.record.RunRecord`.
        metrics: Logged metrics by name, as (step, value) pairs.
        seconds: Duration in seconds, over all starts.
        samples: Generated answers by step, see :class:`~lightning_sft.callbacks.samples.SampleGenerations`.
    """

    folder: Path
    record: dict[str, Any]
    metrics: dict[str, list[tuple[float, float]]]
    seconds: float
    samples: list[dict[str, Any]]

    @classmethod
    def read(cls, path: str | Path) -> Run:
        """Read the run in a folder, or the newest in its loggers' subfolders.

        Raises:
            InputError: When there is no run, or its record is damaged.
        """
        root = Path(path)
        found = [root / RECORD_FILE, *root.glob(f"*/{RECORD_FILE}"), *root.glob(f"*/*/{RECORD_FILE}")]
        records = sorted((file for file in found if file.is_file()), key=lambda file: file.stat().st_mtime_ns)
        if not records:
            raise InputError(
                f"There is no {RECORD_FILE} in {str(root)!r}. Expected the folder of a run: "
                "trainer.default_root_dir, or a folder like lightning_logs/version_0. In Python, the callback "
                "RunRecord writes it."
            )
        folder = records[0].parent if records[0] == root / RECORD_FILE else records[-1].parent
        record = record_of(folder)
        if not record:
            raise InputError(
                f"{folder / RECORD_FILE} is damaged. The run rewrites it when it resumes (--ckpt_path last)."
            )
        lines = [line for line, _ in lines_of(folder / METRICS_FILE)] if (folder / METRICS_FILE).is_file() else []
        metrics: dict[str, dict[float, float]] = {}
        for line in lines:
            for name, value in line.items():
                if name not in ("step", "epoch", "seconds"):
                    metrics.setdefault(name, {})[line["step"]] = value
        samples = [row for file in sorted((folder / SAMPLES_FOLDER).glob("step=*.jsonl")) for row, _ in rows_of(file)]
        curves = {name: sorted(points.items()) for name, points in metrics.items()}
        return cls(folder, record, curves, _seconds(lines), samples)

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps."""
        return round(max((step for points in self.metrics.values() for step, _ in points), default=0))

    @property
    def ended(self) -> str:
        """Why the last start of the run ended, as far as the record says."""
        end = self.record["starts"][-1].get("end")
        return "not yet, or it was killed" if end is None else str(end["reason"])

    @property
    def own_metrics(self) -> list[str]:
        """Names of the metrics that are not ours."""
        return [name for name in self.metrics if not name.startswith(_OURS)]

    def last(self, name: str) -> float | None:
        """The last value of a metric, or ``None``."""
        return self.metrics[name][-1][1] if self.metrics.get(name) else None

    def curves(self, prefix: str) -> dict[str, list[tuple[float, float]]]:
        """The metrics whose name starts with a prefix, by the rest of the name."""
        return {name.removeprefix(prefix): own for name, own in self.metrics.items() if name.startswith(prefix)}


def _seconds(lines: list[dict[str, Any]]) -> float:
    """Duration over all starts; the clock restarts with each."""
    total = before = 0.0
    for line in lines:
        total += max(0.0, line["seconds"] - before) if line["seconds"] >= before else line["seconds"]
        before = line["seconds"]
    return total
