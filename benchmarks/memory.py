"""Memory at its peak: what `lightning-sft plan` predicts, and what `fit` then takes, on this CPU in float32.

    python -m benchmarks.memory train.jsonl --model FOLDER [--prompt question --completion answer] [--out build/memory]
        [--only configs|sizes] [--trl]

First the files of configs/ with the model given; then small random models, over pack lengths and vocabularies. With
`--trl`, TRL's SFTTrainer packs to the same lengths in an environment of its own and is measured too.
Peaks are the kernel's own count of the process (`ru_maxrss`); with two processes, of the larger.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from benchmarks import environments
from benchmarks.environments import ROOT
from benchmarks.record import rows_of

MIB = 2**20
STEPS = 3
LENGTHS, VOCABULARIES = (1024, 2048, 4096, 8192), (49_152, 128_256, 256_000)
ON_CPU = ["--trainer.precision", "32-true", "--trainer.accelerator", "cpu"]


@dataclass
class Result:
    """One fit.

    Args:
        name: What it is.
        predicted: Bytes that plan says.
        measured: Bytes that fit took.
        trl: Bytes that TRL took, where it was asked.
    """

    name: str
    predicted: float
    measured: float
    trl: float | None = None

    @property
    def error(self) -> float:
        """How far the prediction is off, as a share of what was measured."""
        return self.predicted / self.measured - 1


def peak(command: Sequence[str], log: Path, cwd: Path) -> int:
    """Most resident memory of a process or of one that it starts, in bytes; it has to end well."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return usage.ru_maxrss * 1024  # of Linux, in KiB


def compare(name: str, flags: Sequence[str], folder: Path) -> Result:
    """Plan and fit."""
    folder.mkdir(parents=True, exist_ok=True)
    program = [sys.executable, "-m", "lightning_sft"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*program, "plan", *flags, "--memory", "10000", "--json"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-3000:]}")
    predicted = json.loads(done.stdout[done.stdout.index("{\n") :])["bytes"]["peak"]
    quiet = ["--trainer.enable_checkpointing", "false", "--trainer.logger", "false"]
    measured = peak([*program, "fit", *flags, *quiet], folder / "fit.log", folder)
    return Result(name, predicted, measured)


def of_configs(model: str, data: str, out: Path) -> Iterator[Result]:
    """The shipped ones, with this model and these rows."""
    parallel = {"ddp", "fsdp2"}
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        config, name = yaml.safe_load(path.read_text()), path.stem
        if name in ("deepspeed", "tensor_parallel"):  # a CPU has neither; the model's 3 heads cannot be shared by two
            continue
        config["trainer"] |= {"max_steps": STEPS, "num_sanity_val_steps": 0, "enable_progress_bar": False}
        config["model"]["pretrained"] = model
        own = config["data"] = {key: value for key, value in config["data"].items() if key in _KEPT}
        own |= {"train": _with_parts(own["train"], data), "val": None}
        if "tokens_per_batch" in own:
            own["max_length"] = own["tokens_per_batch"]  # longer rows are left out
        if name in parallel:
            config["trainer"]["devices"] = 2
            config["trainer"]["accumulate_grad_batches"] = 1
        if name == "fsdp2":
            del config["trainer"]["strategy"]["init_args"]["compute_dtype"]  # here, bfloat16 is a loop
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        yield compare(name, ["--config", "config.yaml", *ON_CPU], folder)


_KEPT = {"train", "tokens_per_batch", "streaming", "buffer_rows"}


def _with_parts(train: object, data: str) -> object:
    if not isinstance(train, dict):
        return data
    kept = {name: {key: part[key] for key in part if key != "columns"} for name, part in train["parts"].items()}
    return {**train, "parts": {name: {**part, "source": data} for name, part in kept.items()}}


def of_sizes(tokenizer: str, data: str, out: Path, trl: bool) -> Iterator[Result]:
    """Random models of four layers, over pack lengths and over vocabularies."""
    cases = [(length, VOCABULARIES[0]) for length in LENGTHS] + [(2048, size) for size in VOCABULARIES[1:]]
    for length, size in cases:
        name = f"4 layers, {length:,} tokens, vocabulary {size:,}"
        folder = out / f"{length}-{size}"
        small_model(folder / "model", tokenizer, size)
        flags = ["--model.pretrained", str(folder / "model"), "--data.train", data]
        flags += ["--data.tokens_per_batch", str(length), "--data.max_length", str(length), *ON_CPU]
        flags += ["--trainer.max_steps", str(STEPS), "--trainer.enable_progress_bar", "false"]
        result = compare(name, flags, folder)
        if trl:
            result.trl = peak_of_trl(str(folder / "model"), data, length, folder)
        yield result


def peak_of_trl(model: str, data: str, length: int, folder: Path) -> int:
    """The same of TRL's trainer, packed, without checkpointing."""
    config = {"packing": True, "max_length": length, "per_device_train_batch_size": 1, "gradient_checkpointing": False}
    given = {"task": "train", "model": model, "rows": data, "given": None, "seed": 0, "precision": "float32"}
    given |= {"steps": STEPS, "config": config, "out": str(folder / "trl.jsonl"), "folder": str(folder / "trl")}
    command = [str(environments.python("trl")), "-P", str(ROOT / "benchmarks" / "run_trl.py"), json.dumps(given)]
    return peak(command, folder / "trl.log", folder)


def small_model(folder: Path, tokenizer: str, vocabulary: int, num_layers: int = 4) -> None:
    """A random Llama with the sizes of SmolLM2-135M, but for layers and vocabulary."""
    config = AutoConfig.from_pretrained(tokenizer)
    config.update({"num_hidden_layers": num_layers, "vocab_size": vocabulary})
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def show(results: Sequence[Result]) -> None:
    """Print a table."""
    table = Table("fit", "predicted", "measured", "off by", "TRL", title="Peak memory, MiB")
    for r in results:
        of_trl = "" if r.trl is None else f"{r.trl / MIB:,.0f} ({r.measured / r.trl:.2f})"
        table.add_row(r.name, f"{r.predicted / MIB:,.0f}", f"{r.measured / MIB:,.0f}", f"{r.error:+.1%}", of_trl)
    Console().print(table)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--prompt", default="prompt")
    parser.add_argument("--completion", default="completion")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "memory")
    parser.add_argument("--only", choices=("configs", "sizes"))
    parser.add_argument("--trl", action="store_true", help="measure TRL too, in build/bench/trl, which is made")
    given = parser.parse_args()
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    names = {"prompt": given.prompt, "completion": given.completion}
    rows = ({name: row[column] for name, column in names.items()} for row in rows_of(given.data))
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data, model = str(out / "rows.jsonl"), str(Path(given.model).resolve())
    results = []
    if given.trl:
        environments.make("trl")
    if given.only != "sizes":
        results += _shown(of_configs(model, data, out))
    if given.only != "configs":
        results += _shown(of_sizes(model, data, out, given.trl))
    show(results)
    found = [asdict(result) | {"error": result.error} for result in results]
    (out / "memory.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _shown(results: Iterator[Result]) -> list[Result]:
    """With a line on each as it comes."""
    found = []
    for result in results:
        sizes = {"predicted": result.predicted, "measured": result.measured, "of TRL": result.trl}
        told = ", ".join(f"{size / MIB:,.0f} {name}" for name, size in sizes.items() if size is not None)
        print(f"{result.name}: {told}", flush=True)
        found.append(result)
    return found


if __name__ == "__main__":
    main()
