"""What `plan` says of each shipped config, and of one long document.

    python -m benchmarks.plans [NAME ...] [--publish]

Nothing is downloaded but SmolLM2: models are the published shapes of benchmarks/published.py with its tokenizer. Rows
fill the micro-batches of a step. Devices are GPUs of 80 GB, and `devices: auto` are eight of them; a config that does
not fit one is planned for `fsdp2` over more, too. Each plan is a process of its own. Results are kept in
docs/reference/plans.json, so that a call with some names replaces their lines alone; --publish writes
docs/reference/memory.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks import recipes
from benchmarks.environments import ROOT
from benchmarks.published import PUBLISHED
from benchmarks.table import write_page
from lightning_sft.demos.data import command_rows
from lightning_sft.demos.pretrained import fetch_demo_model

BUILD = ROOT / "build" / "plans"
CONFIGS = ROOT / "configs"
PAGE = ROOT / "docs" / "reference" / "memory.md"
GIB = 2.0**30
GPU: dict[str, Any] = {"trainer.accelerator": "gpu", "memory": 80}
ROOM = 0.95  # of a device; the rest is for what is not modeled
WIDER = (2, 4, 8, 16, 32, 64)  # numbers of devices to shard over what does not fit one
WITHOUT_SUGGESTIONS = """
import sys
from lightning_sft.commands.plan import command
from lightning_sft.main import main
command.remedies = lambda *_: []  # each is a plan of its own, and they are not used here
main(sys.argv[1:])
"""
LONG = 524_288  # tokens
LONG_MODEL = "meta-llama/Llama-3.2-1B"
_CHECKPOINTED: dict[str, Any] = {"model.gradient_checkpointing": "true"}
_OFFLOADED: dict[str, Any] = {"model.gradient_checkpointing": "offload"}
_ON_HOST: dict[str, Any] = {
    "trainer.strategy": "lightning_sft.strategies.FSDP2Strategy",
    "trainer.strategy.cpu_offload": "true",
}
LONG_SETTINGS: dict[str, dict[str, Any]] = {
    "`gradient_checkpointing: true`": _CHECKPOINTED,
    "and `mlp_tile_size: 8192`": _CHECKPOINTED | {"model.mlp_tile_size": 8192},
    "`gradient_checkpointing: offload`, `mlp_tile_size: 8192`": _OFFLOADED | {"model.mlp_tile_size": 8192},
    "`gradient_checkpointing: true`, `mlp_tile_size: 16384`, `fsdp2` with `cpu_offload`": (
        _CHECKPOINTED | {"model.mlp_tile_size": 16_384} | _ON_HOST
    ),
    "`gradient_checkpointing: offload`, `mlp_tile_size: 16384`, `fsdp2` with `cpu_offload`": (
        _OFFLOADED | {"model.mlp_tile_size": 16_384} | _ON_HOST
    ),
}


def configs() -> dict[str, Path]:
    """All shipped configs by name, but for recipes of which docs/reference/recipes.md says what they take."""
    figures = json.loads(PAGE.with_name("recipes.json").read_text(encoding="utf-8"))
    elsewhere = {recipe.path for recipe in recipes.recipes() if "gib" in figures.get(recipe.name, {})}
    paths = sorted(CONFIGS.rglob("*.yaml"), key=lambda path: (path.parent != CONFIGS, path))
    return {path.relative_to(CONFIGS).with_suffix("").as_posix(): path for path in paths if path not in elsewhere}


def model_of(config: Path) -> str:
    """Name of the published model that a config trains."""
    given: str = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["pretrained"]
    return given if given in PUBLISHED else f"HuggingFaceTB/{Path(given).name}"


def sources(value: Any) -> Iterator[str]:
    """The data files that a config names."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from sources(inner)
    elif isinstance(value, str) and value.endswith(".jsonl"):
        yield value.replace("*", "1")


def rows(path: Path, num_rows: int) -> Iterator[dict[str, Any]]:
    """Rows of a data file: those of its recipe or of the quickstart, or prompts and completions of 900 tokens."""
    if path.parent.name in ("recipes", "quickstart"):
        kind = path.stem.partition("-")[0] if path.parent.name == "recipes" else "home"
        yield from recipes.rows(kind, min(num_rows, 64))
        return
    text = "\n".join(row["completion"] for row in command_rows(40))
    prompt, completion = ("question", "answer") if "maths" in path.stem else ("prompt", "completion")
    for number in range(num_rows):
        yield {prompt: f"List all commands, {number}", completion: text}


def write_rows(config: Path, folder: Path, num_rows: int = 1024) -> None:
    """Write the files that a config names below a folder, where it finds the templates of configs/, too."""
    if not (folder / "configs").exists():
        (folder / "configs").symlink_to(CONFIGS)
    for name in sources(yaml.safe_load(config.read_text(encoding="utf-8"))["data"]):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows(path, num_rows))
        path.write_text(text, encoding="utf-8")


def plan(folder: Path, *words: str, **flags: Any) -> dict[str, Any]:
    """What `plan` prints as JSON.

    Args:
        folder: Folder in which it runs.
        words: The first words of its command line.
        flags: Flags with their values.

    Raises:
        SystemExit: It failed; with the end of its messages.
    """
    words = (*words, *(word for key, value in flags.items() for word in (f"--{key}", str(value))), "--json")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITHOUT_SUGGESTIONS, "plan", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if "{\n" not in done.stdout:  # it ends with 1 where something does not fit
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{\n") :])
    return {
        "layout": found["strategy"],
        "parameters": found["parameters"] - found["adapter_parameters"],
        "trained": found["trained_parameters"],
        "tokens": found["steps"].get("positions of a micro-batch"),
        "gib": found["bytes"]["peak"] / GIB,
        "host": found["bytes"]["host"] / GIB,
        "fits": found["fits"],
    }


def planned(config: Path, shape: Path, num_rows: int = 1024) -> dict[str, Any]:
    """What a rank takes with a config, and if that does not fit, on how many devices `fsdp2` does.

    Args:
        config: Path of the config.
        shape: Folder with the shape of its model.
        num_rows: Number of rows of its files.
    """
    folder = BUILD / "runs" / config.stem
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(config, folder, num_rows)
    flags = {"model.pretrained": shape, **GPU}
    if yaml.safe_load(config.read_text(encoding="utf-8"))["trainer"].get("devices") == "auto":
        flags["trainer.devices"] = 8
    found = plan(folder, "--config", str(config), **flags)
    if not found["fits"]:
        for number in WIDER:
            if found["gib"] / number > GPU["memory"]:
                continue
            wider = {"trainer.strategy": "fsdp2", "trainer.devices": number}
            found["instead"] = plan(folder, "--config", str(config), **flags | wider)
            if found["instead"]["fits"]:
                break
    return found


def planned_long(shape: Path, settings: Mapping[str, Any], tokens: int = LONG) -> dict[str, Any]:
    """What a rank takes with one document, of which all tokens are trained, and AdamW.

    Args:
        shape: Folder with the shape of the model.
        settings: Flags of the command line.
        tokens: Number of tokens of the document.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    ids = [5] * tokens
    (BUILD / "long.jsonl").write_text(json.dumps({"input_ids": ids, "labels": ids}) + "\n", encoding="utf-8")
    flags: dict[str, Any] = {"model.pretrained": shape, "data.train": "long.jsonl", "data.tokens_per_batch": tokens}
    flags |= {"trainer.precision": "bf16-mixed", "trainer.devices": 1, "trainer.max_epochs": 1, **GPU}
    return plan(BUILD, **flags | settings)


def table_of_configs(results: Mapping[str, Any]) -> str:
    """A table with a line for each config that has been planned."""
    lines = []
    for name, path in configs().items():
        if (found := results.get(name)) is None:
            continue
        model = model_of(path)
        cells = [f"[{name}](../../configs/{name}.yaml)", model.partition("/")[2], billions(found["parameters"])]
        cells += [f"{PUBLISHED[model].billions:.3g}", layout(found), f"{found['gib']:.1f}", fit(found)]
        lines.append(cells)
    head = ["config", "model", "parameters, 10⁹", "published", "layout, tokens of a pack", "GiB at the peak", "80 GB"]
    return recipes.table(head, lines)


def billions(number: int) -> str:
    """A number of parameters in billions, as exact as published ones are."""
    return f"{number / 1e9:.3g}"


def layout(found: Mapping[str, Any]) -> str:
    """The strategy, and the tokens of a micro-batch if they are known."""
    return found["layout"] + (f"; {found['tokens']:,}" if found["tokens"] else "; a stream")


def fit(found: Mapping[str, Any]) -> str:
    """Whether it fits, and what does instead."""
    if found["fits"]:
        return "fits" if found["gib"] <= ROOM * GPU["memory"] else "fits, tightly"
    other = found["instead"]
    does = "takes" if other["fits"] else "does not fit either:"
    return f"does not fit; {other['layout']} {does} {other['gib']:.1f}"


def table_of_long(results: Mapping[str, Any]) -> str:
    """A table with a line for each setting."""
    found = ((settings, results[settings]) for settings in LONG_SETTINGS if settings in results)
    lines = [
        [
            settings,
            f"{own['gib']:.1f}",
            f"{own['host']:.1f}" if own["host"] else "",
            "fits" if own["fits"] else "does not fit",
        ]
        for settings, own in found
    ]
    return recipes.table(["settings", "GiB at the peak", "on the host", "80 GB"], lines)


def page(text: str, results: Mapping[str, Any]) -> str:
    """The page with both tables."""
    text = write_page(text, "plans", table_of_configs(results))
    return write_page(text, "plans of a long row", table_of_long(results))


def main(arguments: list[str] | None = None) -> None:
    """Plan configs, all settings of the long row among them as `long`, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="Configs, such as models/llama3, or long.")
    parser.add_argument("--out", type=Path, default=PAGE.with_name("plans.json"))
    parser.add_argument("--publish", action="store_true", help="Write the page.")
    given = parser.parse_args(arguments)
    known = configs()
    if unknown := set(given.names) - {*known, "long"}:
        parser.error(f"no such config: {', '.join(sorted(unknown))}")
    tokenizer = fetch_demo_model().resolve()

    def keep(name: str, found: dict[str, Any]) -> None:
        print(name, json.dumps(found), flush=True)
        results = json.loads(given.out.read_text()) if given.out.is_file() else {}
        given.out.write_text(json.dumps(results | {name: found}, indent=2) + "\n", encoding="utf-8")

    def shape(model: str) -> Path:
        return PUBLISHED[model].write(BUILD / "shapes" / model.replace("/", "--"), tokenizer)

    for name, path in known.items():
        if not given.names or name in given.names:
            keep(name, planned(path, shape(model_of(path))))
    if not given.names or "long" in given.names:
        for settings, flags in LONG_SETTINGS.items():
            keep(settings, planned_long(shape(LONG_MODEL), flags))
    if given.publish:
        new = page(PAGE.read_text(encoding="utf-8"), json.loads(given.out.read_text(encoding="utf-8")))
        PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
