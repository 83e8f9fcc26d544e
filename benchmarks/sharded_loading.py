"""Host memory of each rank while a model is loaded under `fsdp2`, or exported.

    python -m benchmarks.sharded_loading [load|whole|export] [--parameters 1.5e9] [--processes 2 4] [--precision P]
                                         [--quantize 4bit]

A random model with the shape of Llama-3.2-1B and as many layers as it takes is saved in bfloat16 in a temporary folder
and loaded on CPUs over gloo. Printed are a rank's shard, and the memory of its process (the kernel's count of resident
pages) before, after and at its peak. With `whole` each rank loads the whole model first; with `export` it is exported
from shards, in files of 500 MB, and compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
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
from lightning_sft.callbacks import HFExport
from lightning_sft.demos import tiny_tokenizer
from lightning_sft.model.tuning.adapters import Lora
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
    return {"after": found["VmRSS:"], "peak": found["VmHWM:"]}


class Measured(SFTModule):
    """Prints what a part of a fit has taken, and ends."""

    exports = False

    def configure_model(self) -> None:
        """Load the model as any fit does."""
        self._measure(super().configure_model, ends=not self.exports)

    def on_train_start(self) -> None:
        """Export the model before the first step."""
        export = HFExport(Path(self.pretrained) / f"of-{self.trainer.world_size}", max_shard_size="500MB")
        export._begin(self.trainer)
        self._measure(lambda: export._export(self.trainer, self, "now"))

    def _measure(self, work: Callable[[], object], ends: bool = True) -> None:
        before = memory()["after"]
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is that from here on
        if (error := work()) is not None:
            raise RuntimeError(str(error))
        if ends:
            local: list[Any] = [tensor.to_local() for tensor in self.parameters() if hasattr(tensor, "to_local")]
            distinct = {tensor.data_ptr(): tensor.nbytes for tensor in local}  # without tied ones
            print(json.dumps({"shard": sum(distinct.values()), "before": before} | memory()), flush=True)
            torch.distributed.barrier()
            os._exit(0)


def rank(folder: str, precision: Any, mode: str, quantize: Any) -> None:
    """One process of a fit that ends when the model is loaded or exported."""
    trainer = Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy="fsdp2",
        precision=precision,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
    )
    Measured.exports = mode == "export"
    empty = "lightning_sft.model.tuning.tuning.loading.empty_model"
    with patch(empty, side_effect=InputError("asked for")) if mode == "whole" else nullcontext():
        lora = None if quantize is None else Lora(r=16)
        trainer.fit(Measured(folder, lora=lora, quantize=quantize), SFTDataModule(train=ROWS))


def measured(folder: str, processes: int, precision: str, mode: str, quantize: str | None) -> list[dict[str, int]]:
    """What each rank has printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launcher, "-m", "benchmarks.sharded_loading", mode, "--rank", folder, "--precision", precision]
    command += [] if quantize is None else ["--quantize", quantize]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    """Save a model, load or export it with each number of processes, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["load", "whole", "export"], nargs="?", default="load")
    parser.add_argument("--parameters", type=float, default=1.5e9)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--quantize", choices=["4bit", "8bit"], help="quantize the model, under adapters")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        rank(given.rank, given.precision, given.mode, given.quantize)
        return
    columns = ["processes", "shard", "before", "after", "at the peak", "at the peak, beyond the shard"]
    table = Table(*columns, title="GiB of the process that takes most")
    with TemporaryDirectory() as temporary:
        count = save(Path(temporary), given.parameters)
        for processes in given.processes:
            of_ranks = measured(temporary, processes, given.precision, given.mode, given.quantize)
            largest = max(of_ranks, key=lambda one: one["peak"])
            shown = [largest[name] for name in ("shard", "before", "after", "peak")]
            shown.append(largest["peak"] - largest["shard"])
            table.add_row(str(processes), *(f"{value / GIB:.2f}" for value in shown))
    console = Console()
    console.print(table)
    console.print(f"{count:,} parameters, {given.quantize or given.precision}, {given.mode}")


if __name__ == "__main__":
    main()
