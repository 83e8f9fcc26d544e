"""Tables of a prediction for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from lightning_sft.commands.plan.device import GIB
from lightning_sft.commands.plan.prediction import LOADING, Prediction
from lightning_sft.commands.plan.remedies import Remedy
from lightning_sft.io.words import memory
from lightning_sft.machine.terminal import Console


def show_prediction(prediction: Prediction, steps: Mapping[str, Any], console: Console) -> None:
    """Print the parameters, steps and memory of a fit."""
    rehearsal = prediction.rehearsal
    trained, total = rehearsal.sizes.trained, rehearsal.num_parameters
    rows = {"parameters": f"{total:,}", "trained": f"{trained:,} ({trained / total:.1%})"}
    if rehearsal.num_adapters:
        rows["of adapters"] = f"{rehearsal.num_adapters:,}"
    if rehearsal.num_quantized:
        rows["quantized"] = f"{rehearsal.num_quantized:,}"
    console.print(_table(["Model", ""], *([name, value] for name, value in rows.items())))
    console.print(_table(["Steps", ""], *([name, _figure(value)] for name, value in steps.items())))
    console.print(f"\nMemory of each {prediction.device.name}, in GiB: {prediction.layout.name}", style="bold")
    console.print(_moments(prediction))
    console.print(verdict(prediction), highlight=False, style="bold" if prediction.fits else "bold red")
    if prediction.host:
        console.print(f"Host memory of each process for what is offloaded: {memory(prediction.host)}.", highlight=False)


def show_remedies(remedies: Sequence[Remedy], console: Console) -> None:
    """Print the suggested changes, each including those before it."""
    if not remedies:
        console.print("No known change reduces the memory: use a smaller model or a larger device.")
        return
    console.print("Suggested changes, each line includes those above it:", highlight=False)
    width = max(len(remedy.settings[-1]) for remedy in remedies)
    for remedy in remedies:
        fits = ": fits" if remedy.prediction.fits else ""
        console.print(f"  {remedy.settings[-1]:{width}}  {memory(remedy.prediction.peak)}{fits}", highlight=False)


def verdict(prediction: Prediction) -> str:
    """A sentence that states whether the fit fits."""
    device = prediction.device
    of_all = f"{memory(prediction.peak)} on each {device.name} at the peak"
    if device.capacity is None:
        return f"{of_all}; the memory of a {device.name} is not known here: set --memory."
    fits = "fits into" if prediction.fits else "does not fit into"
    return f"{of_all}; it {fits} {memory(device.capacity)}."


def _moments(prediction: Prediction) -> Table:
    """Table of the memory at the peak of each phase."""
    names = list(dict.fromkeys(kind for parts in prediction.moments.values() for kind, size in parts.items() if size))
    rows = [["process before it", *[""] * len(names), _figure_of(prediction.device.base)]]
    for moment, parts in prediction.moments.items():
        holes = 0.0 if moment == LOADING else prediction.holes
        total = prediction.device.base + holes + sum(parts.values())
        rows.append([moment, *(_figure_of(parts.get(name, 0.0)) for name in names), _figure_of(total)])
    if prediction.holes:
        rows.append(["holes of the allocator", *[""] * len(names), _figure_of(prediction.holes)])
    return _table(["at the peak of", *names, "all"], *rows)


def _figure_of(size: float) -> str:
    return f"{size / GIB:,.2f}" if size else ""


def _figure(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(head: Sequence[str], *rows: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table
