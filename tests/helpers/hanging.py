"""One rank of its arguments fails, and all others hang; with none, each says who it is. For test_processes."""

from __future__ import annotations

import os
import sys
import time


def waits_for_ever() -> None:
    time.sleep(100)


if __name__ == "__main__":
    if sys.argv[1] == "none":
        print(os.environ["RANK"], sys.argv[1:], __name__)
    else:
        print("said before", flush=True)
        if os.environ["RANK"] == sys.argv[1]:
            raise SystemExit(3)
        waits_for_ever()
