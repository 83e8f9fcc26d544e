"""Ours, TRL and LitGPT side by side: `make bench`, or `python -m benchmarks` in the environment build/bench/ours.

The same model, rows, seed, precision and threads; one process at a time, all systems in turn, round after round. It
writes results.json, results.md and results.png to build/bench, and with --publish docs/reference/benchmarks.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from benchmarks import environments
from benchmarks.cases import EQUAL, SHIPPED, Case, cases, same_batches
from benchmarks.environments import BUILD, ROOT
from benchmarks.limits import Work
from benchmarks.measure import Scripts
from benchmarks.plot import draw
from benchmarks.table import markdown, write_page
from lightning_sft.demos.data import command_rows
from lightning_sft.demos.pretrained import fetch_demo_model

PAGE = ROOT / "docs" / "reference" / "benchmarks.md"


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The settings of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hugging Face folder; the demo model by default")
    parser.add_argument("--data", type=Path, help="JSONL; the project's demo data by default")
    parser.add_argument("--prompt", default="prompt", help="the data's column for the prompt")
    parser.add_argument("--completion", default="completion")
    parser.add_argument("--systems", nargs="+", default=["ours", "trl", "litgpt"])
    parser.add_argument("--kinds", nargs="+", default=[SHIPPED, EQUAL], choices=[SHIPPED, EQUAL])
    parser.add_argument("--length", type=int, default=2048, help="tokens of a pack and a step, where made equal")
    parser.add_argument("--steps", type=int, default=3, help="of a run; slow systems take fewer")
    parser.add_argument("--warmup", type=int, default=1, help="of these, those that do not count")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--same-steps", type=int, default=20, help="on the same batches; 0 leaves them out")
    parser.add_argument("--same-rows", type=int, default=2, help="rows of each of them")
    parser.add_argument("--preprocessing-rows", type=int, default=7473, help="most rows; 0 leaves it out")
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=BUILD)
    parser.add_argument("--python", type=Path, help="one interpreter that has all systems, instead of environments")
    parser.add_argument("--note", default="", help="what a reader of the table has to know")
    parser.add_argument("--publish", action="store_true", help="write the page and its picture")
    return parser.parse_args(arguments)


class Bench:
    """One benchmark under way.

    Args:
        given: Its settings.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.out = given, given.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.model = str(Path(given.model or fetch_demo_model()).resolve())
        self.rows, self.batches = self.out / "rows.jsonl", self.out / "batches.jsonl"
        self.common: dict[str, Any] = {"model": self.model, "rows": str(self.rows), "seed": given.seed, "given": None}
        self.common |= {"length": given.length, "converted": str(self.out / "converted" / Path(self.model).name)}
        self.script = Scripts(self.out / "runs", given.threads, given.python, self.common)
        self.results: dict[str, Any] = {"runs": [], "preprocessing": [], "limits": []}

    def prepare(self) -> None:
        """Environments, rows, and what is to be known beforehand."""
        given = self.given
        shutil.rmtree(self.out / "runs", ignore_errors=True)
        if given.python is None:
            for name in {"ours", *given.systems}:
                environments.make(name)
        rows = (
            command_rows(4000, given.seed) if given.data is None else map(json.loads, given.data.open(encoding="utf-8"))
        )
        keys = (given.prompt, given.completion)
        lines = [json.dumps({"prompt": row[keys[0]], "completion": row[keys[1]]}) + "\n" for row in rows]
        self.rows.write_text("".join(lines), encoding="utf-8")
        limits = self.script("limits", "limits").lines[0]
        fast = limits["bfloat16"] > limits["float32"]
        precision = given.precision if given.precision != "auto" else "bfloat16" if fast else "float32"
        self.common["precision"] = precision
        size = {"batches": str(self.batches), "steps": given.same_steps, "rows_per_step": given.same_rows}
        data = self.script("ours", "data", task="batches", **size).lines[0]
        if "litgpt" in given.systems and not Path(self.common["converted"], "lit_model.pth").is_file():
            self.script("litgpt", "convert", task="convert")
        names = ("length", "steps", "warmup", "rounds", "threads", "seed", "note")
        settings = {name: getattr(given, name) for name in names}
        settings |= {
            "model": Path(self.model).name,
            "rows": given.data.name if given.data else "the project's demo data",
        }
        self.results["settings"] = settings | {"precision": precision}
        self.results |= {"data": data, "machine": machine(), "work": dataclasses.asdict(Work.of(self.model))}

    def train(self, case: Case, number: int, **settings: Any) -> None:
        """Run a case once."""
        steps = max(self.given.warmup + 1, round(self.given.steps * case.share))
        settings = {"task": "train", "steps": steps, **case.settings, **settings}
        done = self.script(case.system, f"{case.slug}-{number}", environment=case.environment, **settings)
        if not done.error and len(done.lines) <= self.given.warmup:
            done.error = "It took fewer steps than the warm-up has."
        named = {"name": case.name, "kind": case.kind, "system": case.system, "round": number}
        self.results["runs"].append(named | dataclasses.asdict(done))
        self.save()

    def round(self, number: int) -> None:
        """Every case once, and the limit of the machine, which others may be using."""
        self.results["limits"].append(self.script("limits", f"limits-{number}").lines[0])
        data = self.results["data"]
        rows_per_step = max(1, round(self.given.length * data["rows"] / data["tokens"]))
        for case in cases(self.given.length, rows_per_step):
            if case.system in self.given.systems and case.kind in self.given.kinds:
                self.train(case, number)

    def same(self) -> None:
        """The same batches for two systems, in float32, so that a difference is not one of rounding."""
        given = self.given
        for case in same_batches(given.same_rows) if given.same_steps else []:
            if case.system in given.systems:
                size = {"steps": given.same_steps, "rows_per_step": given.same_rows, "precision": "float32"}
                self.train(case, 0, given=str(self.batches), **size)

    def preprocess(self, number: int) -> None:
        """Rows to packs, by each system."""
        rows = self.out / "some_rows.jsonl"
        lines = self.rows.read_text(encoding="utf-8").splitlines(keepends=True)
        rows.write_text("".join(lines[: self.given.preprocessing_rows]), encoding="utf-8")
        names = {"ours": "lightning_sft", "trl": "TRL", "litgpt": "LitGPT (in each epoch anew)"}
        for system in self.given.systems if self.given.preprocessing_rows else []:
            done = self.script(
                system, f"preprocessing-{system}-{number}", task="preprocess", rows=str(rows), workers=None
            )
            self.results["preprocessing"].append({"name": names[system], **dataclasses.asdict(done)})
        self.save()

    def save(self) -> None:
        """Keep what there is so far."""
        (self.out / "results.json").write_text(json.dumps(self.results, indent=1), encoding="utf-8")


def machine() -> dict[str, str]:
    """What ran it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.processor(), "system": platform.platform()}


def publish(out: Path) -> None:
    """Put what a benchmark has written on the page."""
    table = (out / "results.md").read_text(encoding="utf-8")
    text = f"{table}\n![Tokens a second, memory, and the losses on the same batches]({PAGE.stem}.png)"
    PAGE.write_text(write_page(PAGE.read_text(encoding="utf-8"), "results", text), encoding="utf-8")
    shutil.copy(out / "results.png", PAGE.with_suffix(".png"))
    shutil.copy(out / "results.json", PAGE.with_suffix(".json"))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmark, and return its results."""
    given = parsed(arguments)
    bench = Bench(given)
    bench.prepare()
    for number in range(given.rounds):
        bench.preprocess(number)
        bench.round(number)
    bench.same()
    text = markdown(bench.results)
    (bench.out / "results.md").write_text(text + "\n", encoding="utf-8")
    draw(bench.results, bench.out / "results.png")
    if given.publish:
        publish(bench.out)
    print(text)
    return bench.results


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without the process that is being measured
    main()
