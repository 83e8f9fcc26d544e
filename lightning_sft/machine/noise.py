"""Messages of other packages: those about which a user of the command line can do nothing are dropped, unless
``--debug`` is given; of others, no character controls the terminal.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

_WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own use, deprecated by torch 2.13
    "Precision bf16-mixed is not supported by the model summary",  # which counts bytes; plan does it
    "The `srun` command is available",  # a remark for whoever forgot it, and nobody does interactive work otherwise
    "Checkpoint directory .* exists and is not empty",  # that of the run, which the lock and earlier starts have used
    "The dirpath has changed from",  # as above
    "Starting from v1.9.0, `tensorboardX` has been removed",  # CSV files take its place, and the summary names them
    "You defined a `validation_step` but have no `val_dataloader`",  # the module has one for whoever has such data
    r"Found .* module\(s\) in eval mode at the start of training",  # frozen parts, which the summary counts
)
_LOGS = {  # by logger
    "torchao": "Failed to load|Skipping import of cpp extensions",  # kernels for other devices, or a newer torch
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # from the hub; it has one of its own
    "torch.utils._pytree": "KernelPreference|ScaleCalculationMode",  # torchao's use of a deprecated function
    "lightning.fabric.utilities.seed": "Seed set to",  # in the config that is saved with the run
    "lightning.pytorch.utilities.rank_zero": "|".join(
        (
            r"(GPU|TPU) available: ",  # the summary has the device in use
            "💡 Tip: ",  # advertisements of litlogger and litmodels
            "Detected KeyboardInterrupt",  # said as the process ends
            r"`Trainer\.fit` stopped: ",  # said at the end, with the checkpoints
            "Trainer already configured with model summary callbacks",  # ours, which is meant to take the place
            r"Using .*Automatic Mixed Precision \(AMP\)",  # the summary has the precision
            r"LOCAL_RANK: \d+ - CUDA_VISIBLE_DEVICES",  # the summary has the devices
        )
    ),
    "DeepSpeed": "Setting ",  # on import, whether DeepSpeed is used or not
}
_with_place = warnings.formatwarning  # Python's own
_format: list[Callable[..., str]] = []  # of warnings, where they are printed without their places
_LONG_SECONDS = 2  # bars of other packages, such as "Loading weights", are for what takes longer


def quiet_others(debug: bool = False) -> None:
    """Print warnings without the places in code they come from, and drop the messages of the tables above.

    Warnings and log records may name files of others, so what would control the terminal is escaped.

    Call it before the packages are imported.

    Args:
        debug: Whether nothing is left out.
    """
    logging.setLogRecordFactory(_Record)
    _format.clear()
    if debug:
        warnings.formatwarning = partial(_as_text, written=_with_place)
        return
    os.environ.setdefault("TQDM_DELAY", str(_LONG_SECONDS))
    _format[:] = [partial(_as_text, written=_without_place)]
    keep_quiet()
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message)
    for name, pattern in _LOGS.items():
        logging.getLogger(name).addFilter(partial(_is_heard, re.compile(pattern)))


def keep_quiet() -> None:
    """Print warnings as :func:`quiet_others` has said, if it has: Lightning, once imported, prints places again."""
    if _format:
        warnings.formatwarning = _format[0]


def _is_heard(noise: re.Pattern[str], record: logging.LogRecord) -> bool:
    return noise.search(record.getMessage()) is None


class _Record(logging.LogRecord):
    def getMessage(self) -> str:  # noqa: N802  # of logging
        return _printable(super().getMessage())


def _as_text(*warning: Any, written: Callable[..., str], **place: Any) -> str:
    return _printable(written(*warning, **place))


def _without_place(message: Warning | str, *_: Any, **__: Any) -> str:
    return f"Warning: {message}\n"


def _printable(text: str) -> str:
    from lightning_sft.machine.terminal import printable  # of rich, for which --version does not wait

    return printable(text)
