"""Memory that glibc takes from the system for a sequence of allocations, including fragmentation.

It runs as a program in a separate, fresh process. Blocks are never written to, so they take next to no memory, however
large.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from array import array
from collections.abc import Iterable, Mapping

Event = tuple[int, int]
"""Index of a block with its size in bytes if it is allocated, or with -1 if it is freed."""

_ALIGNMENT = 64  # of torch's tensors on the CPU
_LARGE = 1 << 16  # smaller blocks do not move the peak
_RECORDS = (96, 240, 40)  # bytes of torch's bookkeeping per tensor: small blocks that fragment the heap


def footprint(events: Iterable[Event], settings: Mapping[int, int] | None = None) -> int | None:
    """Peak bytes held by the allocator under this process's environment; ``None`` without glibc's ``mallinfo2``.

    Args:
        events: Allocations and frees in order.
        settings: Arguments of ``mallopt``, as in :mod:`lightning_sft.machine.allocators`.

    >>> footprint([(0, 1000), (1, 1 << 30), (1, -1), (0, -1)]) in (None, *range(1 << 30, (1 << 30) + (1 << 20)))
    True
    """
    flat = array("q", (number for event in events for number in event))
    command = [sys.executable, "-I", __file__, *(str(number) for pair in (settings or {}).items() for number in pair)]
    done = subprocess.run(command, input=flat.tobytes(), capture_output=True, check=False)
    return int(done.stdout) if done.returncode == 0 else None


class _Info(ctypes.Structure):
    """``struct mallinfo2`` of glibc."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    ]


def _main() -> None:
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Info
    libc.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]

    given = [int(number) for number in sys.argv[1:]]
    for parameter, value in zip(given[::2], given[1::2], strict=True):
        libc.mallopt(parameter, value)

    def held() -> int:
        info = libc.mallinfo2()
        return int(info.arena + info.hblkhd)

    flat = array("q", sys.stdin.buffer.read())
    blocks: dict[int, list[ctypes.c_void_p]] = {}
    start = most = held()
    for number, size in zip(flat[::2], flat[1::2], strict=True):
        if size < 0:
            for pointer in blocks.pop(number):
                libc.free(pointer)
            continue
        block = ctypes.c_void_p()
        records = [libc.malloc(record) for record in _RECORDS]
        if libc.posix_memalign(ctypes.byref(block), _ALIGNMENT, max(1, size)):
            sys.exit("More address space than there is.")
        blocks[number] = [block, *records]
        if size >= _LARGE:
            most = max(most, held())
    print(most - start)


if __name__ == "__main__":
    _main()
