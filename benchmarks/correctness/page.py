"""The answers as tables and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.correctness.rows import DIALECTS
from benchmarks.table import write_page

NAMES = {"ours": "lightning_sft", "trl": "TRL", "litgpt": "LitGPT", "llamafactory": "LLaMA-Factory"}
_KINDS = {"right": "#2a9d5c", "wrong": "#c8403a", "refused": "#b0b4ba"}


def markdown(results: Mapping[str, Any]) -> str:
    """The three tables.

    Args:
        results: As the scoreboard keeps them.
    """
    lines: list[str] = []
    for template, found in results["targets"].items():
        lines += [
            f"Rows with the right targets under the template `{template}`, of {results['settings']['rows']} of each "
            "dialect (in brackets: wrong, refused):",
            "",
            f"| system | {' | '.join(name.replace('_', '-') for name in DIALECTS)} | all |",
            "|---" * (len(DIALECTS) + 2) + "|",
        ]
        for system, own in found.items():
            counts = [[own[name].get(kind, 0) for kind in _KINDS] for name in DIALECTS]
            total = [sum(column) for column in zip(*counts, strict=True)]
            lines.append(f"| {NAMES[system]} | {' | '.join(map(_cell, counts))} | {total[0] / sum(total):.1%} |")
        lines += ["", *_reasons(found), ""]
    lines += ["| system | a step in micro-batches | a run that was killed and resumed |", "|---|---|---|"]
    for system in dict.fromkeys([*results["step"], *results["resumed"]]):
        cells = [_share(results[question].get(system)) for question in ("step", "resumed")]
        lines.append(f"| {NAMES[system]} | {' | '.join(cells)} |")
    for system, why in results["missing"].items():
        lines.append(f"\n{NAMES[system]} could not be installed: {why}")
    return "\n".join(lines)


def rewritten(page: str, results: Mapping[str, Any]) -> str:
    """The page of the documentation with these results, and the picture that is drawn of them beside it.

    Args:
        page: Its text so far.
        results: As the scoreboard keeps them.
    """
    picture = "![Rows with the right targets, by dialect and system](correctness.png)"
    return write_page(page, "results", f"{markdown(results)}\n\n{picture}")


def _cell(counts: list[int]) -> str:
    right, *others = counts
    return str(right) if not any(others) else f"{right} ({', '.join(map(str, others))})"


def _share(found: Mapping[str, Any] | None) -> str:
    if found is None or "error" in found:
        return "not measured" if found is None else f"failed: {' '.join(found['error'].split())[-120:]}"
    return "the same bit for bit" if not found["unlike"] else f"{found['share']:.1e}"


def _reasons(found: Mapping[str, Any]) -> list[str]:
    """What was wrong most often: the dialects of a system that it is said of, together."""
    said: dict[tuple[str, int, str], list[str]] = {}
    for system, own in found.items():
        for dialect, counts in own.items():
            for reason, count in counts["reasons"][:1]:
                short = " ".join(reason.split())[:220].replace("`", "")
                said.setdefault((NAMES[system], count, short), []).append(dialect.replace("_", "-"))
    lines = [
        f"- {system}, {', '.join(dialects)}: {count} times{' each' * (len(dialects) > 1)}: `{reason}`"
        for (system, count, reason), dialects in said.items()
    ]
    return ["What was found most often:", "", *lines] if lines else []


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Rows that are right, wrong and refused, as a bar for each system in each dialect.

    Args:
        results: As the scoreboard keeps them.
        path: The PNG to write.
    """
    figure = Figure(figsize=(11, 1.4 + 2.1 * len(results["targets"])), layout="constrained")
    parts = figure.subfigures(len(results["targets"]), 1, squeeze=False)[:, 0]
    for part, (template, found) in zip(parts, results["targets"].items(), strict=True):
        part.suptitle(template, x=0.01, ha="left", fontsize=11)
        all_axes = part.subplots(1, len(DIALECTS), sharey=True)
        for axes, dialect in zip(all_axes, DIALECTS, strict=True):
            left = [0.0] * len(found)
            for kind, color in _KINDS.items():
                counts = [own[dialect] for own in found.values()]
                shares = [own.get(kind, 0) / sum(own.get(k, 0) for k in _KINDS) for own in counts]
                axes.barh(range(len(found)), shares, left=left, color=color, label=kind)
                left = [a + b for a, b in zip(left, shares, strict=True)]
            axes.set_title(dialect.replace("_", "-"), fontsize=10)
            axes.set_xlim(0, 1)
            axes.set_xticks([0, 1], ["0", "100 %"])
            axes.set_yticks(range(len(found)), [NAMES[system] for system in found])
            axes.spines[["top", "right", "left"]].set_visible(False)
        all_axes[0].invert_yaxis()
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)
