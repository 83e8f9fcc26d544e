"""Peak memory of a step against the tokens of its row, on one CPU: `python -m benchmarks.length [--quick] [--publish]`.

Models are random, float32; documents have 512 tokens, of which the last 32 are trained, so that attention takes little
time: its memory depends on the row alone. Each point is a process of its own, whose peak is counted from before the
step. It writes length.json, length.md and length.png to build/bench, and with --publish docs/reference/memory.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.environments import BUILD, ROOT
from benchmarks.table import write_page

PAGE = ROOT / "docs" / "reference" / "memory.md"
MIB = 2.0**20
HIDDEN, DOCUMENT, TARGETS, TILE = 128, 512, 32, 1024
SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": 4 * HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 2**20,
}
CURVES: dict[str, dict[str, Any]] = {
    "4 layers": {},
    "4 layers, `gradient_checkpointing: true`": {"gradient_checkpointing": True},
    "4 layers, and `mlp_tile_size: 1024`": {"gradient_checkpointing": True, "mlp_tile_size": TILE},
    "8 layers, and `mlp_tile_size: 1024`": {"gradient_checkpointing": True, "mlp_tile_size": TILE},
}
LENGTHS = [8192, 16_384, 32_768, 65_536, 131_072]
MOST_UNCHECKED = 32_768  # tokens without checkpointing: more would not fit the machine


def peak_of_step(num_layers: int, tokens: int, settings: dict[str, Any]) -> float:
    """Bytes that a forward and a backward pass take at their peak beside what the process had before."""
    import torch

    from lightning_sft import SFTModule
    from lightning_sft.commands.plan.device import resident
    from lightning_sft.data.batches.collate import collate
    from lightning_sft.types import Example

    module = SFTModule("random", hf_config=SHAPE | {"num_hidden_layers": num_layers}, **settings)
    module.configure_model()
    module.train()
    weights = [0.0] * (DOCUMENT - TARGETS) + [1.0] * TARGETS

    def step(tokens: int) -> None:
        documents = [Example(torch.randint(1000, (DOCUMENT,)).numpy(), weights) for _ in range(tokens // DOCUMENT)]
        module(collate(documents, 1.0)).total.neg().backward()
        module.zero_grad()

    step(2 * TILE)  # what the first step alone allocates
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident()
    step(tokens)
    status = Path("/proc/self/status").read_text()
    most = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(most) * 1024 - before


def measured(curve: str, tokens: int) -> float:
    """The same in a process of its own that returns freed memory at once."""
    arguments = [int(curve[0]), tokens, CURVES[curve]]
    code = f"from benchmarks.length import peak_of_step; print(peak_of_step(*{arguments!r}))"
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{curve}, {tokens:,} tokens failed:\n{done.stderr[-3000:]}")
    return float(done.stdout.split()[-1])


def slope(points: list[tuple[int, float]]) -> float:
    """Bytes that another token takes, between the two longest rows."""
    (less, before), (more, after) = points[-2:]
    return (after - before) / (more - less)


def markdown(found: dict[str, list[tuple[int, float]]]) -> str:
    """A table of the peaks in MiB, and what a token and a layer take."""
    lengths = sorted({tokens for points in found.values() for tokens, _ in points})
    lines = ["| tokens | " + " | ".join(found) + " |", "|---" * (1 + len(found)) + "|"]
    for tokens in lengths:
        peaks = [dict(points).get(tokens) for points in found.values()]
        lines.append(f"| {tokens:,} | {' | '.join('' if p is None else f'{p / MIB:,.0f}' for p in peaks)} |")
    slopes = [slope(points) for points in found.values()]
    lines.append(f"| bytes a token | {' | '.join(f'{own:,.0f}' for own in slopes)} |")
    of_layer = (slopes[-1] - slopes[-2]) / 4
    text = f"Another layer takes {of_layer:,.0f} bytes a token; its input is {HIDDEN} · 4 = {4 * HIDDEN:,}."
    return "\n".join([*lines, "", text])


def draw(found: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """The curves, and the inputs of 4 layers alone."""
    figure = Figure(figsize=(8, 5), layout="tight")
    axes = figure.subplots()
    for curve, points in found.items():
        axes.plot(
            *zip(*((tokens, peak / MIB) for tokens, peak in points), strict=True), "o-", label=curve.replace("`", "")
        )
    lengths = sorted({tokens for points in found.values() for tokens, _ in points})
    inputs = [4 * 4 * HIDDEN * tokens / MIB for tokens in lengths]
    axes.plot(lengths, inputs, "--", color="grey", label="the inputs of 4 layers")
    axes.set(xscale="log", yscale="log", xlabel="tokens of the row", ylabel="MiB at the peak of a step")
    axes.set_xticks(lengths, [f"{tokens:,}" for tokens in lengths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> dict[str, list[tuple[int, float]]]:
    """Measure the curves, and return their points."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the two shortest rows")
    parser.add_argument("--out", type=Path, default=BUILD)
    parser.add_argument("--publish", action="store_true", help="write the page and its picture")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[tuple[int, float]]] = {}
    for curve, settings in CURVES.items():
        lengths = [n for n in LENGTHS if settings or n <= MOST_UNCHECKED][: 2 if given.quick else None]
        found[curve] = [(tokens, measured(curve, tokens)) for tokens in lengths]
        print(curve, {tokens: round(peak / MIB) for tokens, peak in found[curve]}, flush=True)
    (given.out / "length.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    text = markdown(found)
    (given.out / "length.md").write_text(text + "\n", encoding="utf-8")
    draw(found, given.out / "length.png")
    if given.publish:
        new = f"{text}\n\n![The curves](length.png)"
        PAGE.write_text(write_page(PAGE.read_text(encoding="utf-8"), "length", new), encoding="utf-8")
        shutil.copy(given.out / "length.png", PAGE.with_name("length.png"))
    print(text)
    return found


if __name__ == "__main__":
    main()
