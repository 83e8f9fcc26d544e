"""``config.yaml`` of a run, and what remains on disk of a command that is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from lightning_sft.checkpoints.run_files import RECORD_FILE

_OF_LOGGERS = ("hparams.yaml", "metrics.csv", "events.out.tfevents.*")


class SaveConfig(SaveConfigCallback):
    """Saves the configuration at the first batch, when nothing can refuse the command any more.

    Only ``fit`` replaces the configuration in the folder of a run, as the others' cannot be given to ``fit``.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder; every rank must call this."""
        self._folder = str(trainer.log_dir or trainer.default_root_dir)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Save it before the first step."""
        self._save(trainer)

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Save it before the first validation, unless that is the sanity check, after which a fit may be refused."""
        if not trainer.sanity_checking:
            self._save(trainer)

    def on_test_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Save it before the first batch."""
        self._save(trainer)

    def on_predict_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Save it before the first batch."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if self.already_saved:
            return
        self.already_saved = True
        is_of_fit = trainer.state.fn != "fit" and Path(self._folder, RECORD_FILE).exists()
        if trainer.is_global_zero and not is_of_fit:
            get_filesystem(self._folder).makedirs(self._folder, exist_ok=True)
            path = f"{self._folder}/{self.config_filename}"
            self.parser.save(self.config, path, skip_none=False, overwrite=self.overwrite, multifile=self.multifile)


@contextmanager
def no_trace_if_refused(trainer: Trainer) -> Iterator[None]:
    """Remove the folders that loggers make in advance, if the command ends with an error before its first batch.

    Lightning starts all loggers before it looks at the data. Files other than theirs are kept, as are folders that were
    there before.

    Args:
        trainer: Trainer of the command; if it has no :class:`SaveConfig`, as under ``fast_dev_run``, all is kept.
    """
    savers = [callback for callback in trainer.callbacks if isinstance(callback, SaveConfig)]  # type: ignore[attr-defined]  # set by a connector
    made = _missing(trainer) if savers and trainer.is_global_zero else []
    try:
        yield
    except BaseException:
        if not any(saver.already_saved for saver in savers):
            for folder in made:
                for path in (found for pattern in _OF_LOGGERS for found in folder.glob(pattern)):
                    path.unlink()
                with suppress(OSError):  # something else is in it, or it was not made
                    folder.rmdir()
        raise


def _missing(trainer: Trainer) -> list[Path]:
    """The folders of loggers that do not exist, each before its parents."""
    found = [getattr(logger, "log_dir", None) for logger in trainer.loggers]
    folders = [Path(folder) for folder in found if isinstance(folder, str) and "://" not in folder]
    return [path for folder in folders for path in (folder, *folder.parents) if not path.exists()]
