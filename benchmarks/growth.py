"""How cost grows: tokens a second against the length of packs, of documents, the vocabulary, and ranks; and rows a
second against the size of the data. `make bench-growth`, or `python -m benchmarks.growth` after `python -m benchmarks`.

Models are random: two layers of the demo model's shape, with its tokenizer. One process at a time, systems in turn. It
writes growth.json, growth.md and growth.png to build/bench, and with --publish the page docs/reference/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.cases import EQUAL, cases
from benchmarks.environments import BUILD, ROOT
from benchmarks.measure import Scripts
from benchmarks.plot import draw_growth
from benchmarks.table import write_page
from lightning_sft.demos.pretrained import fetch_demo_model

PAGE = ROOT / "docs" / "reference" / "benchmarks.md"
DOCUMENT, VOCABULARY, LENGTH = 256, 49152, 2048  # where something else grows


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The settings of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hugging Face folder whose shape and tokenizer are used; the demo model")
    parser.add_argument("--quick", action="store_true", help="two points of each curve")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=["packs", "documents", "vocabulary", "ranks", "rows"],
        help="these curves; others keep what was measured before",
    )
    parser.add_argument("--systems", nargs="+", default=["ours", "trl"])
    parser.add_argument("--steps", type=int, default=4, help="of a run; the first does not count")
    parser.add_argument("--most-rows-of-peers", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=BUILD / "growth")
    parser.add_argument("--python", type=Path, help="one interpreter that has all systems, instead of environments")
    parser.add_argument("--publish", action="store_true", help="write the page and its picture")
    return parser.parse_args(arguments)


class Growth:
    """The curves.

    Args:
        given: The settings.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.out = given, given.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.source = str(given.model or fetch_demo_model())
        common = {"seed": 0, "given": None, "precision": "float32", "length": LENGTH}
        self.script = Scripts(self.out / "runs", given.threads, given.python, common)

    def model(self, vocabulary: int = VOCABULARY) -> str:
        """A folder with a random model; made once."""
        folder = self.out / f"model-{vocabulary}"
        if not (folder / "config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(self.source)
            size = {"num_hidden_layers": 2, "vocab_size": max(vocabulary, len(tokenizer))}
            config = AutoConfig.from_pretrained(self.source, max_position_embeddings=1 << 15, **size)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return str(folder)

    def data(self, rows: int, words: int) -> str:
        """A file of rows whose answers have so many words, each of them a token of the demo model's tokenizer."""
        path = self.out / f"rows-{rows}-{words}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for number in range(rows):
                file.write(
                    json.dumps({"prompt": f"Number {number}?", "completion": "the" + " the" * (words - 1)}) + "\n"
                )
        return str(path)

    def rate(
        self, system: str, length: int, document: int, vocabulary: int = VOCABULARY, ranks: int = 1
    ) -> float | None:
        """Median of the tokens a second of some steps of one pack; ``None`` where the run has failed."""
        steps = self.given.steps
        packs = steps * ranks + 2
        rows = self.data(max(8, packs * length // document), max(1, document - 40))  # 40 are the template's
        [case, *_] = [case for case in cases(length, 1) if case.kind == EQUAL and case.system == system]
        settings = dict(case.settings)
        if ranks > 1:
            settings["flags"] = settings["flags"] | {
                "--trainer.devices": ranks,
                "--trainer.strategy": "ddp",
                "--trainer.accelerator": "cpu",
            }
        folder = f"{system}-{length}-{document}-{vocabulary}-{ranks}"
        where = {"model": self.model(vocabulary), "rows": rows, "task": "train", "steps": steps, "rows_per_step": 1}
        threads = max(1, self.given.threads // ranks)
        done = self.script(system, folder, threads=threads, **where, **settings)
        if done.error or len(done.lines) < 2:
            return None
        return median(b["tokens"] / (b["at"] - a["at"]) for a, b in zip(done.lines, done.lines[1:], strict=False))

    def preprocessing(self, system: str, rows: int) -> float | None:
        """Rows a second; peers are not asked for the largest."""
        if system != "ours" and rows > self.given.most_rows_of_peers:
            return None
        where = {"model": self.model(), "rows": self.data(rows, 20), "task": "preprocess", "workers": None}
        done = self.script(system, f"{system}-{rows}-rows", **where)
        return None if done.error else done.lines[0]["rows"] / done.lines[0]["seconds"]

    def curves(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each as it has been measured: its title, axes and points."""
        quick, systems = self.given.quick, self.given.systems
        tokens = "tokens/s"
        plans: dict[str, tuple[str, str, str, list[int], Any]] = {
            "packs": (
                f"pack length (documents of {DOCUMENT})",
                "tokens of a pack",
                tokens,
                [1024, 4096] if quick else [1024, 2048, 4096, 8192, 16384],
                lambda system, x: self.rate(system, x, DOCUMENT),
            ),
            "documents": (
                f"document length (packs of {4096 if quick else 8192:,})",
                "tokens of a document",
                tokens,
                [128, 2048] if quick else [64, 256, 1024, 4096, 8192],
                lambda system, x: self.rate(system, 4096 if quick else 8192, x),
            ),
            "vocabulary": (
                f"vocabulary (packs of {LENGTH:,})",
                "tokens of the vocabulary",
                tokens,
                [49152, 131072] if quick else [49152, 131072, 262144],
                lambda system, x: self.rate(system, LENGTH, DOCUMENT, x),
            ),
            "ranks": (
                f"ranks (ddp, packs of {LENGTH:,})",
                "ranks",
                tokens,
                [1, 2],
                lambda system, x: self.rate(system, LENGTH, DOCUMENT, ranks=x),
            ),
            "rows": (
                "size of the data",
                "rows",
                "rows/s from file to packs",
                [1000, 10_000] if quick else [1000, 10_000, 100_000, 1_000_000],
                self.preprocessing,
            ),
        }
        for name, (title, x_name, y_name, places, measure) in plans.items():
            if not self.given.only or name in self.given.only:
                points: dict[str, list[tuple[int, float | None]]] = {}
                for place in places:
                    for system in systems if name != "ranks" else ["ours"]:
                        points.setdefault(system, []).append((place, measure(system, place)))
                yield title, {"x": x_name, "y": y_name, "systems": points}


def markdown(curves: dict[str, Any]) -> str:
    """A table a curve.

    >>> curve = {"x": "rows", "y": "rows/s", "systems": {"ours": [(10, 5.0), (20, None)]}}
    >>> print(markdown({"size": curve}))
    rows/s against size:
    <BLANKLINE>
    | rows | 10 | 20 |
    |---|---|---|
    | ours | 5 | not run |
    """
    parts = []
    for title, curve in curves.items():
        places = [x for x, _ in next(iter(curve["systems"].values()))]
        lines = [f"{curve['y']} against {title}:", "", f"| {curve['x']} | {' | '.join(f'{x:,}' for x in places)} |"]
        lines.append("|---" * (len(places) + 1) + "|")
        for system, points in curve["systems"].items():
            cells = ("not run" if y is None else f"{y:,.0f}" for _, y in points)
            lines.append(f"| {system} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure the curves, and return them."""
    growth = Growth(parsed(arguments))
    record = growth.out / "growth.json"
    curves: dict[str, Any] = {}
    if growth.given.only and record.is_file():  # the others stay as they were measured
        curves = json.loads(record.read_text(encoding="utf-8"))
    for title, curve in growth.curves():
        curves[title] = curve
        record.write_text(json.dumps(curves, indent=1), encoding="utf-8")
    text = markdown(curves)
    (growth.out / "growth.md").write_text(text + "\n", encoding="utf-8")
    draw_growth(curves, growth.out / "growth.png")
    if growth.given.publish:
        PAGE.write_text(
            write_page(PAGE.read_text(encoding="utf-8"), "growth", f"{text}\n\n![The curves](growth.png)"),
            encoding="utf-8",
        )
        shutil.copy(growth.out / "growth.png", PAGE.with_name("growth.png"))
    print(text)
    return curves


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without the process that is being measured
    main()
