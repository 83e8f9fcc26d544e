"""Attention of one layer over a pack of documents, forward and backward: stock (a T x T mask) and ours, in alternation.

python benchmarks/attention.py --lengths 1024 2048 4096 --document 160

Memory is what a process of its own holds at its peak above what it held before.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lightning_sft.model.attention.documents import Documents
from lightning_sft.model.attention.per_document import attend


class Layer(torch.nn.Module):
    """What stock attention asks a layer for: three query heads share one of keys and values, as in SmolLM2-135M."""

    num_key_value_groups, is_causal = 3, True


def seconds(lengths: list[int], ours: bool) -> float:
    """Of one forward and backward pass, with the mask made before."""
    size, layer = sum(lengths), Layer().train()
    query, key, value = (torch.randn(1, heads, size, 64, requires_grad=True) for heads in (9, 3, 3))
    mask: Documents | Tensor = Documents(lengths)
    if not ours:
        number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        mask = (number[:, None] == number).tril()[None, None]
    start = time.perf_counter()
    if isinstance(mask, Documents):
        out, _ = attend("sdpa", layer, query, key, value, mask, scaling=0.125)
    else:
        out, _ = sdpa_attention_forward(layer, query, key, value, mask, scaling=0.125)
    out.sum().backward()
    return time.perf_counter() - start


def growth_of_memory(lengths: list[int], ours: bool) -> int:
    """Of this process by one pass, in bytes; it must not have done one before. Linux alone tells."""
    seconds([8, 8], ours)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak so far is forgotten: imports had it
    before = _peak()
    seconds(lengths, ours)
    return _peak() - before


def _peak() -> int:
    """Most resident memory of this process; `ru_maxrss` would count its parent's too."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def main() -> None:
    """Print a table of the shortest times, and of memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096], help="tokens of a pack")
    parser.add_argument("--document", type=int, default=160, help="tokens of a document")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    head = ["tokens in a pack", "documents", "stock, ms", "ours, ms", "times as fast", "stock, MB", "ours, MB"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    processes = multiprocessing.get_context("spawn")
    for size in given.lengths:
        lengths = [given.document] * (size // given.document) + [size % given.document] * (size % given.document > 0)
        rounds = [(seconds(lengths, ours=False), seconds(lengths, ours=True)) for _ in range(given.rounds)]
        stock, ours = (1000 * min(times) for times in zip(*rounds, strict=True))
        with processes.Pool(2, maxtasksperchild=1) as pool:
            of_stock, of_ours = pool.starmap(growth_of_memory, [(lengths, False), (lengths, True)], chunksize=1)
        memory = f"{of_stock / 1e6:,.0f} | {of_ours / 1e6:,.0f}"
        times = f"{stock:,.1f} | {ours:,.1f} | {stock / ours:.1f}"
        print(f"| {size:,} | {len(lengths)} | {times} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
