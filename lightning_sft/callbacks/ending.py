"""The closing message of a fit: why it ended, where its checkpoints are, and what to do next."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from lightning_sft.checkpoints.writing import newest
from lightning_sft.io.address import place
from lightning_sft.io.disk import short_path
from lightning_sft.training.trainer import callbacks_of, datamodule_of


def why_ended(trainer: Trainer) -> str:
    """The reason why a finished fit ended."""
    if trainer.should_stop:
        for callback in callbacks_of(trainer):
            if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
                return f"EarlyStopping: {callback.stopping_reason_message.rstrip('.')}"
            if isinstance(callback, Timer) and (callback.time_remaining() or 0.0) <= 0.0:
                return "trainer.max_time reached"
        return "a callback or the module has set trainer.should_stop"
    if 0 <= trainer.max_steps <= trainer.global_step:
        return f"trainer.max_steps={trainer.max_steps} reached"
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch:
        return f"trainer.max_epochs={trainer.max_epochs} reached"
    return "the data are exhausted"


def ending(trainer: Trainer, resumed_at: int = 0) -> str:
    """The closing message of a fit: why it ended, its checkpoints, and the commands that use them.

    Args:
        trainer: Trainer after the fit.
        resumed_at: Step of the checkpoint that the fit resumed from.
    """
    step = trainer.global_step
    why = why_ended(trainer)
    in_others = isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)  # processes, which counted the steps
    lines = ["The fit ended." if in_others else f"The fit ended after step {step:,}: {why}."]
    if step == resumed_at and step:
        lines = [f"Nothing was left to train after step {step:,}: {why}. Raise trainer.max_epochs or max_steps."]
        changed = getattr(trainer.lightning_module, "changed_settings", [])
        if changed:
            lines[0] += f" Changed settings of the optimizer have had no effect: {', '.join(changed)}."
    has_rows = "val" in getattr(datamodule_of(trainer), "splits", ()) and bool(trainer.limit_val_batches)
    if has_rows and step > resumed_at and not any(name.startswith("val/") for name in trainer.callback_metrics):
        lines.append("No validation was due before that: trainer.val_check_interval sets one within an epoch.")
    savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
    in_turn = sorted(savers, key=lambda saver: not saver.save_weights_only)  # those to resume from behind the others
    written = [path for saver in in_turn if (path := saver._last_checkpoint_saved) and place(path).exists()]
    last = next(reversed(written), str(trainer.ckpt_path or "") if step == resumed_at else "")
    best = ""
    for saver in savers:
        if saver.monitor and saver.best_model_path:
            best = best or short_path(saver.best_model_path)
            score = "" if saver.best_model_score is None else f" ({float(saver.best_model_score):.6g})"
            lines.append(f"Best by {saver.monitor}{score}: {short_path(saver.best_model_path)}")
    if in_others and best:
        last = str(newest([place(best).parent]) or "")
    if last:
        last = short_path(last)
        lines.append(f"Last checkpoint: {last}")
    if chosen := best or last:
        lines.append(f"Talk to it: lightning-sft chat --model {chosen}")
        lines.append(f"Export it: lightning-sft export --ckpt {chosen} --out FOLDER")
    return "\n".join(lines)
