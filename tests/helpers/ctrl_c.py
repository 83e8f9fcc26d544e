"""The command line, interrupted by Ctrl-C where it calls a function, for test_ctrl_c.

python -m tests.helpers.ctrl_c MODULE:FUNCTION VERB ...
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Any

from lightning_sft.main import console

if __name__ == "__main__":
    module, _, name = sys.argv.pop(1).partition(":")
    called = getattr(importlib.import_module(module), name)

    def interrupted(*args: Any, **settings: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return called(*args, **settings)

    setattr(importlib.import_module(module), name, interrupted)
    console()
