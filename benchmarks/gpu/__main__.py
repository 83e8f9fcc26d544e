"""Checks and measures the library on a GPU, without a network: `make gpu`, or `python -m benchmarks.gpu`.

    python -m benchmarks.gpu                      all parts
    python -m benchmarks.gpu correctness smoke    some of them; --list names all
    python -m benchmarks.gpu stage FOLDER         a folder to carry to a machine without a network
    python -m benchmarks.gpu count                kernels and bytes of a step, counted without a GPU
    python -m benchmarks.gpu report RUN.json ...  the tables of one or several runs as one

Each part ends within four minutes: each case is a process that is killed when the time is up, and one that fails is a
result like the others. Results are written to --out after each case: results.json and results.md. The exit code is 1 if
a check has failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.environments import ROOT
from benchmarks.gpu.count import main as count
from benchmarks.gpu.facts import facts
from benchmarks.gpu.parts import Part, parts, run_part
from benchmarks.gpu.report import checks, markdown
from benchmarks.gpu.rows import write_rows, write_tokenizer
from benchmarks.gpu.stage import main as stage


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The settings of a run."""
    description, _, epilog = __doc__.partition("\n\n")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("benchmarks.gpu", description=description, epilog=epilog, formatter_class=form)
    parser.add_argument("parts", nargs="*", help="parts to run; all by default")
    parser.add_argument("--list", action="store_true", help="name all parts and their cases, and run nothing")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="only cases whose names have one of these texts in them"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny models, to try the command itself")
    parser.add_argument("--data", type=Path, help="JSONL; by default rows of random words with the lengths of GSM8K's")
    parser.add_argument("--prompt", default="prompt", help="the data's column for the prompt")
    parser.add_argument("--completion", default="completion", help="the data's column for the answer")
    parser.add_argument(
        "--tokenizer", type=Path, help="Hugging Face folder; that of the demo model if fetched, or of bytes"
    )
    parser.add_argument("--seconds", type=float, default=235.0, help="for each part")
    parser.add_argument("--threads", type=int, default=min(8, len(os.sched_getaffinity(0))))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="what a reader of the tables has to know")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu" / time.strftime("%Y%m%d-%H%M%S"))
    return parser.parse_args(arguments)


def chosen(given: argparse.Namespace) -> list[Part]:
    """The parts and the cases that are asked for.

    Raises:
        SystemExit: When there is no part of that name, or no case is left.
    """
    known = parts(given.device, given.quick)
    unknown = [name for name in given.parts if name not in known]
    if unknown:
        raise SystemExit(f"There is no part {', '.join(unknown)}; the parts are {', '.join(known)}.")
    found = [known[name] for name in given.parts or known]
    filtered = [Part(p.name, [c for c in p.cases if any(t in c.name for t in given.only)], p.at_once) for p in found]
    if not any(part.cases for part in filtered):
        raise SystemExit(f"No case has {' or '.join(given.only)} in its name; --list names all.")
    return [part for part in filtered if part.cases]


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Run the parts, and write and return their results."""
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(out / "tokenizer", given.tokenizer, given.quick)
    rows = write_rows(out / "rows", tokenizer, given.data, given.prompt, given.completion, given.quick)
    common = {"device": given.device, "quick": given.quick, "seed": given.seed, "tokenizer": tokenizer, "rows": rows}
    common |= {"models": str(out / "models"), "cache": str(out / "cache")}
    shown = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}
    run: dict[str, Any] = {"facts": facts(given.note), "settings": shown, "results": []}

    def done(result: dict[str, Any]) -> None:
        state = "failed" if result["error"] else "done"
        print(f"{result['part']}: {result['case']}: {state} after {result['seconds']:.0f} s", flush=True)
        run["results"].append(result)
        write(run, out)

    for part in chosen(given):
        shutil.rmtree(out / "cases" / part.name, ignore_errors=True)
        folder = out / "cases" / part.name
        run_part(part, common, folder, seconds=given.seconds, threads=given.threads, done=done)
    return run


def write(run: dict[str, Any], out: Path) -> None:
    """Keep what there is so far."""
    (out / "results.json").write_text(json.dumps(run, indent=1), encoding="utf-8")
    (out / "results.md").write_text(markdown(run), encoding="utf-8")


def merged(paths: list[str]) -> dict[str, Any]:
    """Several runs as one: of a case that is in more than one, the last counts; the facts are those of the last.

    Raises:
        SystemExit: When they are not of the same card and commit, and so have nothing to do with each other.
    """
    runs = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    different = {(run["facts"]["card"], run["facts"]["commit"]) for run in runs}
    if len(different) != 1:
        raise SystemExit(f"Runs of one card and one commit can be one table, got {sorted(different)}.")
    results = {(result["part"], result["case"]): result for run in runs for result in run["results"]}
    return {**runs[-1], "results": list(results.values())}


def main(arguments: list[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["stage"]:
        return stage(given[1:])
    if given[:1] == ["count"]:
        return count(given[1:])
    if given[:1] == ["report"]:
        run = merged(given[1:])
    else:
        settings = parsed(given)
        if settings.list:
            for part in chosen(settings):
                print(f"{part.name}: {'; '.join(case.name for case in part.cases)}")
            return 0
        run = measure(settings)
    print(markdown(run))
    return int(not all(check.passed for check in checks(run["results"])))


if __name__ == "__main__":
    sys.exit(main())
