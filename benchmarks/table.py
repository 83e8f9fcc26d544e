"""From what the runs have recorded to the figures, the tables, and the page that has them between its marks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.cases import EQUAL, SAME, SHIPPED
from benchmarks.limits import Work

Result = dict[str, Any]
"""A run as it is kept in JSON: name, kind, system, round and the fields of :class:`benchmarks.measure.Run`."""


def figures(runs: Sequence[Result], work: Work, limit: float, pairs_per_token: float, warmup: int) -> dict[str, Any]:
    """The figures of a case over its rounds: medians over all steps after the warm-up of each round.

    Args:
        runs: Those of one case that have not failed.
        work: What the model needs.
        limit: Operations a second that the machine could do.
        pairs_per_token: Of the data, see :class:`~benchmarks.limits.Work`.
        warmup: Steps at the beginning of each run that do not count; at least 1, for the first has no beginning.

    >>> def line(at, tokens):
    ...     return {"at": at, "loss": 1.0, "tokens": tokens, "targets": 5, "positions": 20, "device_bytes": 0}
    >>> run = {"began": 0.0, "peak_bytes": 7, "lines": [line(9.0, 10), line(11.0, 10), line(12.0, 10)]}
    >>> found = figures([run], Work(6.0, 2.0, 0.0), limit=140.0, pairs_per_token=1.0, warmup=1)
    >>> found["tokens_per_second"], found["targets_per_second"], found["share"], found["first_step_seconds"]
    (7.5, 3.75, 0.375, 9.0)
    """
    steps = [
        (after["at"] - before["at"], after)
        for run in runs
        for before, after in zip(run["lines"][warmup - 1 :], run["lines"][warmup:], strict=False)
    ]
    operations = [work.of_step(step["tokens"], step["targets"], pairs_per_token) for _, step in steps]
    return {
        "steps": len(steps),
        "step_seconds": median(seconds for seconds, _ in steps),
        "tokens_per_second": median(step["tokens"] / seconds for seconds, step in steps),
        "targets_per_second": median(step["targets"] / seconds for seconds, step in steps),
        "share": median(n / seconds / limit for n, (seconds, _) in zip(operations, steps, strict=True)),
        "fill": sum(step["tokens"] for _, step in steps) / sum(step["positions"] for _, step in steps),
        "first_step_seconds": median(run["lines"][0]["at"] - run["began"] for run in runs),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "device_bytes": max(line["device_bytes"] for run in runs for line in run["lines"]),
        "losses": [line["loss"] for line in runs[0]["lines"]],
    }


def largest_difference(these: Sequence[float], those: Sequence[float]) -> float:
    """Between the losses of two runs, step by step.

    >>> largest_difference([1.0, 2.0], [1.0, 2.5])
    0.5
    """
    return max(abs(a - b) for a, b in zip(these, those, strict=True))


def all_figures(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The figures of every case, in the order in which they first ran, with how many times as fast ours is there."""
    work = Work(**results["work"])
    limit = median(rates[results["settings"]["precision"]] for rates in results["limits"])
    found: list[dict[str, Any]] = []
    for kind, name in dict.fromkeys((run["kind"], run["name"]) for run in results["runs"]):
        runs = [run for run in results["runs"] if (run["kind"], run["name"]) == (kind, name)]
        case = {"kind": kind, "name": name, "system": runs[0]["system"]}
        errors = [run["error"] for run in runs if run["error"]]
        if errors:
            found.append(case | {"error": errors[0]})
            continue
        found.append(
            case | figures(runs, work, limit, results["data"]["pairs_per_token"], results["settings"]["warmup"])
        )
    for case in found:
        own = [c for c in found if c["kind"] == case["kind"] and c["system"] == "ours" and "error" not in c]
        if own and case["system"] != "ours" and "error" not in case:
            case["ours_is"] = own[0]["tokens_per_second"] / case["tokens_per_second"]
            case["ours_needs"] = own[0]["peak_bytes"] / case["peak_bytes"]
    return found


def markdown(results: Mapping[str, Any]) -> str:
    """All tables."""
    found, settings, data = all_figures(results), results["settings"], results["data"]
    machine, rates = results["machine"], results["limits"]
    product = ", ".join(f"{median(r[d] for r in rates) / 1e9:,.1f} in {d}" for d in ("float32", "bfloat16"))
    on_device = any(case.get("device_bytes") for case in found)
    lines = [
        f"{machine['cpu']}, {settings['threads']} threads; device: {rates[0]['device']}; torch {rates[0]['torch']}. "
        f"Best matmul rate, GFLOP/s: {product}. {settings['model']}, {settings['precision']}, "
        f"{settings['rows']}: {data['rows']:,} rows, {data['tokens'] / data['rows']:.0f} tokens a row, "
        f"{data['targets'] / data['tokens']:.0%} of them targets. {settings['note']}".strip(),
    ]
    head = ["", "steps", "real tokens/s", "targets/s", "ours is", "of the limit", "packing efficiency", "peak memory"]
    head += ["on the device"] * on_device + ["first step after", "loss of the first and the last step"]
    for kind in (SHIPPED, EQUAL):
        lines += ["", f"Settings {kind}:", "", _row(head), "|---" * len(head) + "|"]
        lines += [_row(_cells(case, on_device)) for case in found if case["kind"] == kind]
    lines += _same_batches(found) + _preprocessing(results["preprocessing"])
    return "\n".join(lines)


def _cells(case: Mapping[str, Any], on_device: bool) -> list[str]:
    if "error" in case:
        return [case["name"], "failed"]
    return [
        case["name"],
        str(case["steps"]),
        f"{case['tokens_per_second']:,.1f}",
        f"{case['targets_per_second']:,.1f}",
        f"{case['ours_is']:.2f} × as fast" if "ours_is" in case else "",
        f"{case['share']:.1%}",
        f"{case['fill']:.1%}",
        f"{case['peak_bytes'] / 1e9:.2f} GB" + (f" (ours: {case['ours_needs']:.2f} ×)" if "ours_needs" in case else ""),
        *([f"{case['device_bytes'] / 1e9:.2f} GB"] if on_device else []),
        f"{case['first_step_seconds']:.0f} s",
        f"{case['losses'][0]:.4f}, {case['losses'][-1]:.4f}",
    ]


def _same_batches(found: Sequence[Mapping[str, Any]]) -> list[str]:
    cases = [case for case in found if case["kind"] == SAME and "error" not in case]
    if len(cases) != 2:
        return []
    losses = [case["losses"] for case in cases]
    lines = ["", f"The same batches in float32, {len(losses[0])} steps; the loss of each:", ""]
    lines += [_row(["step", *(case["name"] for case in cases), "difference"]), "|---|---|---|---|"]
    for number, (a, b) in enumerate(zip(*losses, strict=True), 1):
        lines.append(_row([str(number), f"{a:.5f}", f"{b:.5f}", f"{abs(a - b):.1e}"]))
    return [*lines, "", f"Largest difference: {largest_difference(*losses):.1e}."]


def _preprocessing(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(run["name"] for run in runs if not run["error"])
    rates = {n: median(r["lines"][0]["rows"] / r["lines"][0]["seconds"] for r in runs if r["name"] == n) for n in names}
    if not rates:
        return []
    lines = ["", "From rows to packs, rows a second:", "", _row(["", "rows/s", "ours is"]), "|---|---|---|"]
    own = next(iter(rates.values()))
    return lines + [_row([name, f"{rate:,.0f}", f"{own / rate:.2f} × as fast"]) for name, rate in rates.items()]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_page(text: str, name: str, new: str) -> str:
    r"""The page with another text between its marks ``<!-- name -->`` and ``<!-- end name -->``.

    Raises:
        ValueError: When it has no such marks.

    >>> write_page("a <!-- x -->old<!-- end x --> b", "x", "new")
    'a <!-- x -->\n\nnew\n\n<!-- end x --> b'
    """
    pattern = f"(<!-- {name} -->).*?(<!-- end {name} -->)"
    if not re.search(pattern, text, re.DOTALL):
        raise ValueError(f"The page has no marks {name}.")
    return re.sub(pattern, lambda found: f"{found[1]}\n\n{new}\n\n{found[2]}", text, flags=re.DOTALL)
