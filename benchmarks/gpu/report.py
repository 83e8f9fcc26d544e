"""The results of a run as Markdown: targets, checks, figures, profiles, and what has failed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.gpu import kinds
from benchmarks.gpu.parts import CORRECTNESS, KERNELS_KEY, RESUME, SMOKE
from benchmarks.gpu.targets import TARGETS

Result = dict[str, Any]

_MFU_TOLERANCE = 0.02  # between the share of peak that is logged and the one that is computed here


@dataclass(frozen=True)
class Check:
    """Something that has to be so.

    Args:
        part: Where it was checked.
        name: What was checked.
        passed: Whether it is so.
        detail: Figures, or the error.
    """

    part: str
    name: str
    passed: bool
    detail: str


def checks(results: Sequence[Result]) -> list[Check]:
    """All checks of a run; a case that recorded nothing, or not all that it had to, has failed."""
    found: list[Check] = []
    for result in results:
        part, case, lines, error = (result[name] for name in ("part", "case", "lines", "error"))
        if part in (CORRECTNESS, KERNELS_KEY):
            found += [Check(part, f"{case}, {line['precision']}", line["passed"], _detail(line)) for line in lines]
        elif part in (RESUME, SMOKE) and not error:
            found += [Check(part, case, line["passed"], _flags(line)) for line in lines]
        elif lines and lines[-1].get("logged", {}).get("mfu") and lines[-1]["mfu"]:
            logged, own = lines[-1]["logged"]["mfu"], lines[-1]["mfu"]
            detail = f"logged {logged:.3f}, computed {own:.3f}"
            found.append(Check("mfu", f"{part}, {case}", abs(logged / own - 1) <= _MFU_TOLERANCE, detail))
        if part in (CORRECTNESS, KERNELS_KEY, RESUME, SMOKE) and error:
            found.append(Check(part, case, False, _last_line(error)))
    return found


def _detail(line: Mapping[str, Any]) -> str:
    if "error" in line:
        return str(line["error"])
    texts = [
        f"{name} {line['found'][name]:.1e} (eager, document by document: {line['stock'][name]:.1e}; "
        f"allowed {line['bounds'][name]:.1e})"
        for name in ("loss", "gradient")
    ]
    return f"{', '.join(texts)}; {line['attention'].partition(':')[0]}"


def _flags(line: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}: {'yes' if value is True else 'no'}" for name, value in line.items() if value in (True, False)
    )


def _last_line(error: str) -> str:
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    if error.startswith("It was"):
        return lines[0]
    return " ".join(lines[-2:])[-300:]


def markdown(run: Mapping[str, Any]) -> str:
    """All tables of a run."""
    results: list[Result] = run["results"]
    facts, versions = run["facts"], run["facts"]["versions"]
    names = ("transformers", "lightning", "trl", "liger-kernel", "flash-attn")
    others = ", ".join(f"{name} {versions[name]}" for name in names if versions.get(name))
    lines = [
        f"{facts['card']}, driver {facts['driver']}, CUDA {facts['cuda']}; torch {versions['torch']}, {others}; "
        f"commit {facts['commit']}, {facts['date']}. {facts['note']}".strip(),
    ]
    lines += _targets(results) + _checks(results) + _figures(results) + _profiles(results) + _failures(results)
    return "\n".join(lines) + "\n"


def _targets(results: Sequence[Result]) -> list[str]:
    lines = ["", "## Targets", "", "One H100, bf16-mixed, GSM8K's lengths; ours is the default.", ""]
    lines += [_row(["shape", "target", "reached", "met"]), _rule(4)]
    for target in TARGETS:
        reached = target.reached(results)
        text = "not measured" if reached is None else f"{reached:,.2f}" if reached < 100 else f"{reached:,.0f}"
        met = "" if reached is None else "yes" if target.is_met(reached) else "no"
        lines.append(_row([target.shape, str(target), text, met]))
    return lines


def _checks(results: Sequence[Result]) -> list[str]:
    found = checks(results)
    if not found:
        return ["", "## Checks", "", "None was run."]
    passed = sum(check.passed for check in found)
    lines = ["", "## Checks", "", f"{passed} of {len(found)} passed.", ""]
    lines += [_row(["part", "check", "passed", "detail"]), _rule(4)]
    ordered = sorted(found, key=lambda check: check.passed)
    return lines + [_row([c.part, c.name, "yes" if c.passed else "**no**", _cell(c.detail)]) for c in ordered]


def _measured(results: Sequence[Result]) -> Iterator[tuple[Result, Mapping[str, Any]]]:
    for result in results:
        if result["lines"] and "tokens_per_second" in result["lines"][-1]:
            yield result, result["lines"][-1]


def _figures(results: Sequence[Result]) -> list[str]:
    head = ["part", "case", "tokens/s", "targets/s", "TFLOP/s", "MFU", "allocated, GiB", "reserved, GiB"]
    head += ["step, ms", "first step, s", "tokens of a step", "attention"]
    rows = []
    for result, line in _measured(results):
        mfu = "" if line["mfu"] is None else f"{line['mfu']:.1%}"
        rows.append(
            [
                result["part"],
                result["case"],
                f"{line['tokens_per_second']:,.0f}",
                f"{line['targets_per_second']:,.0f}",
                f"{line['tflops']:,.1f}",
                mfu,
                *(f"{line[name]:.1f}" if name in line else "" for name in ("allocated_gib", "reserved_gib")),
                f"{median(line['step_ms']):,.1f}",
                f"{line['first_step_seconds']:,.1f}",
                f"{line['tokens_per_step']:,.0f}",
                _cell(str(line["attention"]).partition(":")[0]),
            ]
        )
    return ["", "## Figures", "", *_table(head, rows)] if rows else []


def _profiles(results: Sequence[Result]) -> list[str]:
    rows, tops = [], []
    for result, line in _measured(results):
        if "profile" in line:
            found = line["profile"]["kinds"]
            total, number = (sum(found[kind][unit] for kind in kinds.KINDS) for unit in ("ms", "kernels"))
            shares = [f"{found[kind]['ms'] / total:.0%}" if total else "" for kind in kinds.KINDS]
            rows.append([result["part"], result["case"], f"{total:,.1f}", f"{number:,.0f}", *shares])
            top = [[t["kind"], f"{t['ms']:.2f}", f"`{_cell(t['name'])}`"] for t in line["profile"]["top"][:8]]
            tops += ["", f"{result['part']}, {result['case']}:", "", *_table(["kind", "ms", "kernel"], top)]
    head = ["part", "case", "kernels, ms a step", "kernels a step", *kinds.KINDS]
    return ["", "## Profile of a step", "", *_table(head, rows), *tops] if rows else []


def _failures(results: Sequence[Result]) -> list[str]:
    failed = [result for result in results if result["error"]]
    lines = ["", "## Cases that ended with an error", ""] if failed else []
    for result in failed:
        text = result["error"].strip().splitlines()
        end = "\n".join(
            text if len(text) <= 12 else [*text[:1], *text[-11:]] if text[0].startswith("It was") else text[-12:]
        )
        lines += [f"{result['part']}, {result['case']}, after {result['seconds']:.0f} s:", "", "```", end, "```", ""]
    return lines


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_row(head), _rule(len(head)), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(columns: int) -> str:
    return "|" + "---|" * columns


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
