"""Host memory of each rank while a model is loaded under `fsdp2`.

    python -m benchmarks.sharded_loading [--parameters 1.5e9] [--processes 2 4] [--precision 32-true] [--whole]

A random model with the shape of Llama-3.2-1B and as many layers as it takes is saved in bfloat16 in a temporary folder
and loaded on CPUs over gloo. Printed are a rank's shard; by how much its memory (the kernel's count of resident pages)
has grown once it is loaded and at its peak; and the peak of the whole process beyond the shard. `--whole` has each
rank load the whole model first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from benchmarks.environments import ROOT
from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.demos import tiny_tokenizer
from lightning_sft.types import InputError

GIB = 2**30
SHAPE: dict[str, Any] = {"vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64} | {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
ROWS = [{"prompt": f"{i}", "completion": "yes"} for i in range(8)]


def save(folder: Path, parameters: float) -> int:
    """Write a random model of about so many parameters, a layer to each file, and return their number."""
    with torch.device("meta"):
        none, one = (LlamaForCausalLM(LlamaConfig(num_hidden_layers=n, **SHAPE)).num_parameters() for n in (0, 1))
        layers = round((parameters - none) / (one - none))
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SHAPE))
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        files.setdefault("-".join(["model", *name.split(".")[1:3]]), {})[name] = parameter.shape
    for file, shapes in files.items():
        tensors = {name: torch.randn(shape, dtype=torch.bfloat16) * 0.02 for name, shape in shapes.items()}
        save_file(tensors, folder / f"{file}.safetensors", {"format": "pt"})
    listed = {name: f"{file}.safetensors" for file, names in files.items() for name in names}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": listed}), encoding="utf-8")
    return model.num_parameters()


def memory() -> dict[str, int]:
    """Bytes that this process has in memory, now and at its peak."""
    lines = (line.split() for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    found = {words[0]: int(words[1]) * 1024 for words in lines if words and words[0] in ("VmRSS:", "VmHWM:")}
    return {"loaded": found["VmRSS:"], "peak": found["VmHWM:"]}


class Measured(SFTModule):
    """Prints what loading has taken, and ends."""

    def configure_model(self) -> None:
        """Load the model as any fit does."""
        before = memory()["loaded"]
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is that from here on
        super().configure_model()
        grown = {name: bytes_ - before for name, bytes_ in memory().items()}
        local: list[Any] = [parameter.data.to_local() for parameter in self.parameters()]  # type: ignore[operator]
        print(json.dumps({"shard": sum(tensor.nbytes for tensor in local), "process": before} | grown), flush=True)
        torch.distributed.barrier()
        os._exit(0)


def rank(folder: str, precision: Any, whole: bool) -> None:
    """One process of a fit that ends when the model is loaded."""
    world = int(os.environ["WORLD_SIZE"])
    trainer = Trainer(
        accelerator="cpu", devices=world, strategy="fsdp2", precision=precision, max_steps=1, logger=False
    )
    empty = "lightning_sft.model.tuning.tuning.loading.empty_model"
    with patch(empty, side_effect=InputError("asked for")) if whole else nullcontext():
        trainer.fit(Measured(folder), SFTDataModule(train=ROWS))


def measured(folder: str, processes: int, precision: str, whole: bool) -> list[dict[str, int]]:
    """What each rank has printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launcher, "-m", "benchmarks.sharded_loading", "--rank", folder, "--precision", precision]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *(["--whole"] if whole else [])],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    """Save a model, load it with each number of processes, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1.5e9)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        rank(given.rank, given.precision, given.whole)
        return
    table = Table(
        "processes", "shard", "loaded", "peak", "all of it, beyond the shard", title="GiB of the largest rank"
    )
    with TemporaryDirectory() as temporary:
        count = save(Path(temporary), given.parameters)
        for processes in given.processes:
            found = measured(temporary, processes, given.precision, given.whole)
            largest = max(found, key=lambda one: one["peak"] - one["shard"])
            beyond = largest["process"] + largest["peak"] - largest["shard"]
            values = [largest["shard"], largest["loaded"], largest["peak"], beyond]
            table.add_row(str(processes), *(f"{value / GIB:.2f}" for value in values))
    console = Console()
    console.print(table)
    console.print(
        f"{count:,} parameters, {given.precision}; a process takes {largest['process'] / GIB:.2f} GiB before."
    )


if __name__ == "__main__":
    main()
