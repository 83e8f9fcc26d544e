"""What the recipes of configs/recipes/ reach: those for a CPU are run, those for GPUs are planned.

    python -m benchmarks.recipes [NAME ...] [--model FOLDER] [--rows 64] [--page docs/reference/recipes.md]
    python -m benchmarks.recipes --data          # write the example data of the recipes to build/recipes, and stop

A recipe says in its first lines what it is, which data it takes, and what it is for. `For: a CPU` is run on this
machine with SmolLM2-135M-Instruct: loss and token accuracy on held-out rows before and after, seconds of CPU time, and
the kernel's own count of its peak memory. `For: 8 GPUs of 80 GB` is planned by `lightning-sft plan`, with the shape of
the model as it is published and SmolLM2's tokenizer. Results are kept beside the page as JSON, and the page is written
from them, so that a call with some names replaces their lines alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from benchmarks.environments import ROOT
from benchmarks.published import PUBLISHED
from lightning_sft.demos.data import command_rows
from lightning_sft.demos.pretrained import fetch_demo_model

RECIPES = ROOT / "configs" / "recipes"
BUILD = ROOT / "build" / "recipes"
NUM_VAL = 16
PAGE = """\
# Recipes

Configs by model and method. The first lines of each say what it is, which data it takes, and what it is for. Both
tables are written by `python -m benchmarks.recipes` ([benchmarks/recipes.py](../../benchmarks/recipes.py)). A
config for each family of models is in [families](families.md).

```bash
python -m benchmarks.recipes --data   # in a clone: the example data of the first table
lightning-sft fit --config configs/recipes/smollm2_lora.yaml
```

{described}

## Measured

SmolLM2-135M-Instruct in float32 (`--trainer.precision 32-true`) on a machine of two CPU cores that other work shared,
so this is CPU time and not the clock's: of the whole command, with imports, a validation before the training and one
after it. Loss and token accuracy before → after are those of {num_val} held-out rows (of the texts: of two handbooks).
There are few rows and one epoch: this checks that a recipe learns, and does not compare methods.

{measured}

## Planned

**Not run.** This is what [`lightning-sft plan`](../howto/memory.md) predicts, with the shape of the model as it is
published, and rows of about 1,000 tokens that fill the micro-batches. Learning rates are usual ones.

{planned}
"""


@dataclass(frozen=True)
class Recipe:
    """A file of configs/recipes, and what its first lines say.

    Args:
        path: Path of the YAML file.
        what: What it is, in a sentence.
        data: Which data it takes.
        machine: What it is for.
        config: The config.
    """

    path: Path
    what: str
    data: str
    machine: str
    config: dict[str, Any]

    @classmethod
    def of(cls, path: Path) -> Recipe:
        """Read a recipe.

        Raises:
            ValueError: The first lines are not as those of a recipe.
        """
        text = path.read_text(encoding="utf-8")
        found = re.match(r"# (.+)\n# Data: (.+)\n# For: (.+)\.\n", text)
        if found is None:
            raise ValueError(f"{path} begins otherwise than '# WHAT', '# Data: ...', '# For: ...'.")
        return cls(path, *found.groups(), config=yaml.safe_load(text))

    @property
    def name(self) -> str:
        """Name of the file without its ending."""
        return self.path.stem

    @property
    def gpu_memory(self) -> float | None:
        """GB of each GPU that it is for, or `None` for a CPU."""
        found = re.match(r"\d+ GPUs? of (\d+) GB", self.machine)
        return float(found[1]) if found else None


def recipes() -> list[Recipe]:
    """All recipes, by name."""
    return [Recipe.of(path) for path in sorted(RECIPES.glob("*.yaml"))]


def rows(kind: str, count: int) -> Iterator[dict[str, Any]]:
    """Rows of example data: ``home``, ``reasoning``, ``tools`` or ``texts``."""
    commands = command_rows(count * 40 if kind == "texts" else count)
    if kind == "texts":
        for begin in range(0, len(commands), 40):
            lines = (f"{row['prompt']}: {row['completion']}" for row in commands[begin : begin + 40])
            yield {"text": f"Handbook of a home, part {begin // 40 + 1}.\n" + "\n".join(lines)}
        return
    for row in commands:
        command = json.loads(row["completion"])
        name, arguments = command["do"], {key: value for key, value in command.items() if key != "do"}
        if kind == "home":
            yield row
        elif kind == "reasoning":
            said = ", ".join(f"{key} {value}" for key, value in arguments.items())
            yield row | {"reasoning_content": f"This is about {name}: {said}."}
        else:
            call = {"type": "function", "function": {"name": name, "arguments": arguments}}
            messages = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": "", "tool_calls": [call]},
            ]
            tool = {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
            yield {"messages": messages, "tools": [tool]}


def write_data(num_rows: int) -> None:
    """Write train and val files of all kinds to build/recipes; they share no requests."""
    BUILD.mkdir(parents=True, exist_ok=True)
    for kind in ("home", "reasoning", "tools", "texts"):
        train = max(4, num_rows // 16) if kind == "texts" else num_rows
        val = 2 if kind == "texts" else NUM_VAL
        lines = [json.dumps(row) + "\n" for row in rows(kind, train + val)]
        (BUILD / f"{kind}-train.jsonl").write_text("".join(lines[:train]), encoding="utf-8")
        (BUILD / f"{kind}-val.jsonl").write_text("".join(lines[train:]), encoding="utf-8")


def command(verb: str, recipe: Recipe, *flags: str) -> list[str]:
    """The command line that runs a verb on a recipe."""
    return [sys.executable, "-m", "lightning_sft", verb, "--config", str(recipe.path), *flags]


def run(words: list[str], log: Path) -> tuple[str, Any]:
    """What a process prints, and what it has used; it runs in the repository.

    Raises:
        SystemExit: It failed; with the end of its log.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with log.open("w") as errors:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode and "plan" not in words:  # plan ends with 1 where something does not fit
        raise SystemExit(f"{' '.join(words)} failed:\n{log.read_text()[-3000:]}")
    return printed, usage


def measured(recipe: Recipe, model: Path) -> dict[str, Any]:
    """Fit a recipe on this machine, from a whole validation to a whole validation."""
    folder = BUILD / "runs" / recipe.name
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    folder.mkdir(parents=True)
    flags = {"model.pretrained": model, "trainer.default_root_dir": folder, "trainer.num_sanity_val_steps": -1}
    flags |= {"trainer.accelerator": "cpu", "trainer.log_every_n_steps": 1, "ckpt_path": "last"}
    flags |= {"trainer.precision": "32-true"}  # many processors have no fast bfloat16
    begin = time.monotonic()
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    _, usage = run(command("fit", recipe, *words), folder / "errors.txt")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    validations = [line for line in lines if "val/loss" in line]
    record = json.loads((folder / "run.json").read_text())
    return {
        "loss": [validations[0]["val/loss"], validations[-1]["val/loss"]],
        "accuracy": [validations[0]["val/token_accuracy"], validations[-1]["val/token_accuracy"]],
        "steps": max(line["step"] for line in lines),
        "trained": record["trained"],
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "seconds": time.monotonic() - begin,
        "gib": usage.ru_maxrss / 2**20,
        "date": date.today().isoformat(),
    }


def planned(recipe: Recipe, tokenizer: Path) -> dict[str, Any]:
    """Plan a recipe for its GPUs, with rows that fill its micro-batches."""
    model = recipe.config["model"]["pretrained"]
    folder = PUBLISHED[model].write(BUILD / "shapes" / model.replace("/", "--"), tokenizer)
    flags = {
        "model.pretrained": folder,
        "memory": recipe.gpu_memory,
        "data.train": BUILD / "long.jsonl",
        "data.val": "null",
    }
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    printed, _ = run([*command("plan", recipe, *words), "--json"], BUILD / f"{recipe.name}.txt")
    found = json.loads(printed[printed.index("{\n") :])
    return {"model": model, "gib": found["bytes"]["peak"] / 2**30, "fits": found["fits"]}


def write_long_rows() -> None:
    """Rows of some 1,000 tokens, enough for a step of the largest recipe."""
    lines = [row["completion"] for row in command_rows(40)]
    text = "\n".join(lines)
    rows = ({"prompt": f"List all commands, {number}", "completion": text} for number in range(256))
    (BUILD / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def page(results: dict[str, Any]) -> str:
    """The page with both tables."""
    measured_rows, planned_rows = [], []
    for recipe in recipes():
        found = results.get(recipe.name)
        if recipe.gpu_memory is None:
            cells = ["not measured yet", *"–––––"] if found is None else measured_cells(found)
            measured_rows.append([link(recipe), recipe.data.partition(",")[0], *cells])
        else:
            cells = (
                ["not planned yet", "–"] if found is None else [f"{found['gib']:.1f}", "yes" if found["fits"] else "no"]
            )
            planned_rows.append([link(recipe), recipe.config["model"]["pretrained"], recipe.machine, *cells])
    described = [[link(recipe), recipe.what] for recipe in recipes()]
    return PAGE.format(
        measured=table(
            ["recipe", "data", "trained", "steps", "loss", "token accuracy", "CPU time [s]", "peak memory [GiB]"],
            measured_rows,
        ),
        planned=table(["recipe", "model", "for", "peak of a device [GiB]", "fits"], planned_rows),
        described=table(["recipe", "what it is"], described),
        num_val=NUM_VAL,
    )


def measured_cells(found: dict[str, Any]) -> list[str]:
    """Cells of a recipe that was run."""
    loss, accuracy = found["loss"], found["accuracy"]
    return [
        f"{found['trained'] / 1e6:,.1f} M",
        f"{found['steps']}",
        f"{loss[0]:.3f} → {loss[1]:.3f}",
        f"{accuracy[0]:.1%} → {accuracy[1]:.1%}",
        f"{found['cpu_seconds']:.0f}",
        f"{found['gib']:.1f}",
    ]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def link(recipe: Recipe) -> str:
    """A link from the page to a recipe."""
    return f"[{recipe.name}](../../configs/recipes/{recipe.path.name})"


def main() -> None:
    """Run or plan recipes, and write the page."""
    known = recipes()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="Recipes; by default all.")
    parser.add_argument("--model", type=Path, help="Folder of SmolLM2-135M-Instruct; fetched by default.")
    parser.add_argument("--rows", type=int, default=64, help="Number of training rows.")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "reference" / "recipes.md")
    parser.add_argument("--data", action="store_true", help="Write the example data, and stop.")
    arguments = parser.parse_args()
    write_data(arguments.rows)
    if arguments.data:
        return
    write_long_rows()
    model = (arguments.model or fetch_demo_model()).resolve()
    kept = arguments.page.with_suffix(".json")
    for recipe in known:
        if arguments.names and recipe.name not in arguments.names:
            continue
        found = measured(recipe, model) if recipe.gpu_memory is None else planned(recipe, model)
        print(recipe.name, json.dumps(found), flush=True)
        results = json.loads(kept.read_text()) if kept.is_file() else {}
        kept.write_text(json.dumps(results | {recipe.name: found}, indent=2) + "\n")
        arguments.page.write_text(page(results | {recipe.name: found}), encoding="utf-8")


if __name__ == "__main__":
    main()
