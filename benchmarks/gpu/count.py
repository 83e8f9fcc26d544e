"""Kernels and bytes of a training step, counted without a GPU: in a layer, in the likelihood, in the optimizer.

    python -m benchmarks.gpu count --out now.json
    PYTHONPATH=/path/to/older/checkout:. python -P -m benchmarks.gpu count --out before.json
    python -m benchmarks.gpu count --compare before.json now.json

What `lightning_sft` on `PYTHONPATH` does is counted, as it would run on a GPU in bf16-mixed: a layer is what a step
with two layers has more than one with one. Bytes are those of every operator's arguments and results: what stays in the
caches of a device counts too, so they are an upper bound. Compiled layers are counted in inductor's scheduled graphs.
"""

from __future__ import annotations

import argparse
import inspect
import json
import struct
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import lightning_sft
from benchmarks.gpu import kinds
from benchmarks.gpu.correctness import Batches
from benchmarks.gpu.counting import LARGE, Counting, Counts, added, difference, inductor_graphs
from benchmarks.gpu.facts import commit
from benchmarks.gpu.shapes import SHAPES, Shape, built_config
from benchmarks.gpu.throughput import quiet
from lightning_sft import SFTModule, objective
from lightning_sft.data.batches.collate import collate
from lightning_sft.demos import tiny_tokenizer
from lightning_sft.types import Example

_TARGETS = 0.58  # of the tokens, as in GSM8K
_GPU_CHUNK = 4096  # targets whose logits are there at a time on a GPU with room for them

_MEMORY = "all but matmul and attention"

BEFORE_UPDATE, UPDATE = "forward and backward", "update"


class _Phases(Callback):
    """Counts the second step of a fit: the first makes the optimizer's state."""

    def __init__(self, counting: Counting) -> None:
        self.counting = counting

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The probes are done."""
        self.counting.value = 1.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The step begins."""
        self.counting.phase = BEFORE_UPDATE if batch_idx == 1 else None

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """The gradients are complete."""
        self.counting.phase = self.counting.phase and UPDATE

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The step has ended."""
        self.counting.phase = None


def batch(tokens: int) -> Any:
    """A pack that is one document of random tokens."""
    random = Random(0)
    weights = [0.0] + [float(random.random() < _TARGETS) for _ in range(tokens - 1)]
    return collate([Example([random.randrange(3, 250) for _ in range(tokens)], weights)], sum(weights))


def module_for(shape: Shape, layers: int, folder: Path, compiled: bool, chunk_size: int | None) -> SFTModule:
    """The module of a shape with so many layers, whatever commit of the library it is."""
    config = built_config({**shape.config, "num_hidden_layers": layers}, tiny_tokenizer())
    known = inspect.signature(SFTModule).parameters
    settings: dict[str, Any] = {"attn_implementation": "sdpa", "schedule": "constant", "warmup": 0.0}
    if "kernels" in known:
        settings["kernels"] = "compiled" if compiled else "none"
    else:
        settings["compile_layers"] = compiled
    if chunk_size is not None:
        settings["chunk_size"] = chunk_size
    elif known["chunk_size"].default is None:
        settings["chunk_size"] = _GPU_CHUNK
    write_zeros(folder, config)
    if shape.lora:
        settings["lora"] = {"r": shape.lora}
    else:
        settings["hf_config"] = json.loads(config.to_json_string(use_diff=False))
    return SFTModule(str(folder), **settings)


def write_zeros(folder: Path, config: Any) -> None:
    """A checkpoint of zeros in bfloat16, as a sparse file: it takes no room on the disk."""
    tiny_tokenizer().save_pretrained(folder)
    config.save_pretrained(folder)
    with torch.device("meta"):
        weights = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    header: dict[str, Any] = {}
    end = 0
    for name, weight in weights.items():
        begin, end = end, end + 2 * weight.numel()
        header[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + end)


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """The likelihood takes a chunk's logits in one kernel where it has one, and multiplies 16 bits into float32.

    CPUs do both in blocks that their caches hold. Commits up to 5560a4a have neither, and a name for the block.
    """
    with ExitStack() as stack:
        stack.enter_context(patch.object(objective, "_BLOCK", 2**62, create=True))
        stack.enter_context(patch.object(objective, "fuses", lambda raw: raw.numel() >= LARGE, create=True))
        if find_spec("lightning_sft.head.chunks"):
            stack.enter_context(patch("lightning_sft.head.chunks._multiply", _multiply_into))
        yield


def _multiply_into(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: int) -> None:
    if max(x.numel() for x in (total, a, b)) >= LARGE:  # counted, and not computed
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, beta=beta, out=total)
    else:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)


def step(shape: Shape, layers: int, chunk_size: int | None) -> Counting:
    """Count a step of eager layers."""
    counting = Counting()
    counting.targets = round(batch(shape.length).normalizer)
    with tempfile.TemporaryDirectory() as folder, counting, _as_on_a_gpu(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _fit(module_for(shape, layers, Path(folder), False, chunk_size), shape.length, 2, _Phases(counting))
    return counting


def compiled_layer(shape: Shape) -> Counts:
    """Count a compiled layer, forward and backward; the vocabulary, which is outside of it, is small here."""
    small = Shape(shape.name, {**shape.config, "vocab_size": 264}, shape.length, shape.lora)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), inductor_graphs() as graphs:
        warnings.simplefilter("ignore")
        _fit(module_for(small, 1, Path(folder), True, None), small.length, 1)
    total: Counts = {}
    for counts in graphs:
        total = added(total, counts)
    return total


def _fit(module: Any, tokens: int, steps: int, *callbacks: Callback) -> None:
    loader = DataLoader(Batches(*[batch(tokens) for _ in range(steps)]), batch_size=None)
    settings = {"precision": "bf16-mixed", "max_steps": steps, "log_every_n_steps": 1, "callbacks": list(callbacks)}
    Trainer(**quiet("cpu"), **settings).fit(module, loader)


def counted(shape: Shape, chunk_size: int | None, compiled: bool) -> dict[str, Any]:
    """All counts of a shape: of a layer, eager and compiled, of what is outside of layers, and of the update."""
    one, two = (step(shape, layers, chunk_size) for layers in (1, 2))
    layer = difference(two.counts[BEFORE_UPDATE], one.counts[BEFORE_UPDATE])
    found: dict[str, Any] = {
        "tokens": shape.length,
        "layers": shape.config["num_hidden_layers"],
        "targets": one.targets,
        "layer": layer,
        "outside": difference(one.counts[BEFORE_UPDATE], layer),
        "update": difference(two.counts[UPDATE], one.counts[UPDATE]),
    }
    if compiled:
        try:
            found["compiled layer"] = compiled_layer(shape)
        except Exception as error:  # as without a compiler for C++
            found["compiled error"] = f"{type(error).__name__}: {error}"[:300]
    return found


def markdown(runs: list[dict[str, Any]]) -> str:
    """The tables of one or several commits, side by side."""
    lines = []
    for shape in runs[0]["shapes"]:
        lines += _of_shape(shape, [(run["commit"], run["shapes"][shape]) for run in runs if shape in run["shapes"]])
    return "\n".join(lines)


def _of_shape(shape: str, found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    first = found[0][1]
    lines = [f"### {shape}, packs of {first['tokens']:,} tokens, {first['targets']:,} of them targets", ""]
    columns = [(f"layer, {name}", counts["layer"], counts["tokens"]) for name, counts in found]
    columns += [
        (f"layer, compiled, {name}", counts["compiled layer"], counts["tokens"])
        for name, counts in found
        if "compiled layer" in counts
    ]
    columns += [(f"outside of layers, {name}", counts["outside"], counts["targets"]) for name, counts in found]
    head = [
        "kind",
        *(f"{name}: kernels | bytes a {'target' if 'outside' in name else 'token'}" for name, _, _ in columns),
    ]
    lines += [f"| {' | '.join(head)} |", "|---" * (1 + 2 * len(columns)) + "|"]
    for kind in [*kinds.KINDS, "all", _MEMORY]:
        cells = []
        for _, counts, size in columns:
            number, moved = _sum(counts, kind)
            cells += [f"{number:,}", f"{moved / size:,.0f}"]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    for name, counts in found:
        for layer, how in (("layer", "eager"), ("compiled layer", "compiled")):
            if layer in counts:
                number = _sum(counts[layer], "all")[0] * counts["layers"] + _sum(counts["outside"], "all")[0]
                moved = _sum(counts[layer], _MEMORY)[1] * counts["layers"] + _sum(counts["outside"], _MEMORY)[1]
                text = f"{name}, {how} layers, forward and backward: {number:,} kernels; those that are neither matmul "
                lines += ["", f"{text}nor attention move {moved / 2**30:,.0f} GiB."]
        if "compiled error" in counts:
            lines += ["", f"{name}: compiled layers were not counted: {counts['compiled error']}"]
    return [*lines, ""]


def _sum(counts: Any, kind: str) -> tuple[int, int]:
    left_out = {"all": (), _MEMORY: (kinds.MATMUL, kinds.ATTENTION)}.get(kind)
    chosen = [v for k, v in counts.items() if (k == kind if left_out is None else k not in left_out)]
    return sum(number for number, _ in chosen), sum(moved for _, moved in chosen)


def main(arguments: list[str]) -> int:
    """Count and print, or print what was counted; returns 0."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("benchmarks.gpu count", description=__doc__, formatter_class=form)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--quick", action="store_true", help="tiny models, to try the command itself")
    parser.add_argument("--chunk-size", type=int, help="model.chunk_size; by default the library's own on a GPU")
    parser.add_argument("--no-compiled", action="store_true", help="do not compile layers")
    parser.add_argument("--out", type=Path, help="file for the counts, as JSON")
    parser.add_argument("--compare", type=Path, nargs="+", default=[], help="such files, instead of counting")
    given = parser.parse_args(arguments)
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in given.compare]
    if not runs:
        shapes = {name: SHAPES[name].tiny() if given.quick else SHAPES[name] for name in given.shapes}
        found = {name: counted(shape, given.chunk_size, not given.no_compiled) for name, shape in shapes.items()}
        runs = [{"commit": commit(Path(lightning_sft.__file__).parents[1]), "shapes": found}]
    if given.out:
        given.out.write_text(json.dumps(runs[0], indent=1), encoding="utf-8")
    print(markdown(runs))
    return 0
