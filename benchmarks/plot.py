"""The figures as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.cases import EQUAL, SAME, SHIPPED
from benchmarks.table import all_figures

_COLORS = {"ours": "#1f77b4", "trl": "#ff7f0e", "litgpt": "#2ca02c"}


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Speed and memory of every case as bars, and the losses on the same batches.

    Args:
        results: As the benchmark keeps them.
        path: The PNG to write.
    """
    found = [case for case in all_figures(results) if "error" not in case]
    bars = [case for kind in (EQUAL, SHIPPED) for case in reversed(found) if case["kind"] == kind]
    figure = Figure(figsize=(17, 1.6 + 0.45 * len(bars)), layout="tight")
    speed, memory, loss = figure.subplots(1, 3, width_ratios=[2, 2, 3])
    labels = [f"{case['name']}\n({case['kind']})" for case in bars]
    colors = [_COLORS[case["system"]] for case in bars]
    on_device = any(case["device_bytes"] for case in bars)
    key, unit = ("device_bytes", "GB on the device") if on_device else ("peak_bytes", "GB")
    for axes, title, form, values in (
        (speed, "tokens per second, without padding", "{:,.1f}", [case["tokens_per_second"] for case in bars]),
        (memory, f"peak memory, {unit}", "{:.2f}", [case[key] / 1e9 for case in bars]),
    ):
        drawn = axes.barh(range(len(bars)), values, color=colors)
        axes.bar_label(drawn, fmt=form, padding=3)
        axes.set_title(title)
        axes.set_xlim(0, 1.15 * max(values, default=1))
        axes.set_yticks(range(len(bars)), labels if axes is speed else [""] * len(bars))
        axes.spines[["top", "right"]].set_visible(False)
    for case, style in zip([case for case in found if case["kind"] == SAME], ("-", "--"), strict=False):
        steps = range(1, len(case["losses"]) + 1)
        loss.plot(steps, case["losses"], style, color=_COLORS[case["system"]], linewidth=2, label=case["name"])
        loss.legend(frameon=False)
    loss.xaxis.get_major_locator().set_params(integer=True)
    loss.set(title="loss on the same batches", xlabel="optimizer step")
    loss.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def draw_growth(curves: Mapping[str, Any], path: Path) -> None:
    """Each curve of growth in a picture of its own: rates against what grows.

    Args:
        curves: By title: the axis's name, and for each system pairs of what grows and a rate.
        path: The PNG to write.
    """
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows), layout="tight")
    all_axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in all_axes[len(curves) :]:
        axes.set_visible(False)
    for axes, (title, curve) in zip(all_axes, curves.items(), strict=False):
        for system, points in curve["systems"].items():
            measured = [(x, y) for x, y in points if y is not None]
            axes.plot(*zip(*measured, strict=True), "o-", color=_COLORS[system], label=system) if measured else None
        most = max((y for points in curve["systems"].values() for _, y in points if y is not None), default=1)
        places = sorted({x for points in curve["systems"].values() for x, _ in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [f"{x:,}" for x in places], rotation=40)
        axes.minorticks_off()
        axes.set_ylim(0, 1.1 * most)
        axes.set(title=title, xlabel=curve["x"], ylabel=curve["y"])
        axes.yaxis.set_major_formatter("{x:,.0f}")
        if len(curve["systems"]) > 1:
            axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
