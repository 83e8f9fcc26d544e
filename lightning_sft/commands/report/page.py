"""``lightning-sft report``: a run as one self-contained HTML page that works offline."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from html import escape
from pathlib import Path
from typing import Any

from lightning_sft.commands.report.charts import Series, bar_chart, line_chart, short
from lightning_sft.commands.report.compare import comparison, names_of
from lightning_sft.commands.report.parts import card, pairs, pre, section, table
from lightning_sft.commands.report.run import Run
from lightning_sft.data.inspect.token_text import visible
from lightning_sft.io.disk import write

_TEMPLATE, _STYLE = Path(__file__).with_name("report.html"), Path(__file__).parents[1] / "page.css"
_ANSWERED = 24  # rows of samples on the page


def report(runs: list[str], out: str | None = None) -> Path:
    """Write the report of a run as one HTML page, or a comparison of several runs.

    Args:
        runs: Folders of runs: ``trainer.default_root_dir``, or the logger's folder. Two to eight are compared.
        out: Path of the HTML file; by default ``report.html`` in the folder of the run, or ``comparison.html`` here.
    """
    return write_report(runs[0], out) if len(runs) == 1 else write_comparison(runs, out)


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run: curves, drift, samples before and after, data, settings, and how to reproduce it.

    Args:
        run: Folder of the run: ``trainer.default_root_dir``, or the logger's folder.
        out: Path of the HTML file; by default ``report.html`` in the folder of the run.

    Returns:
        Path of the HTML file.

    Raises:
        InputError: When there is no run, or its record is damaged.
    """
    found = Run.read(run)
    title = f"Fine-tuning of {Path(str(found.record['pretrained'])).name}"
    parts = [_head(found, title), _charts(found), _drift(found), _samples(found.samples), _data(found.record["data"])]
    parts += [_settings(found.record), _reproduce(found.record)]
    return _write(title, parts, Path(out) if out else found.folder / "report.html")


def write_comparison(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write a comparison of runs: their results, the settings that differ, and their curves over each other.

    Args:
        runs: Folders of two to eight runs.
        out: Path of the HTML file; by default ``comparison.html`` in the current folder.

    Returns:
        Path of the HTML file.

    Raises:
        InputError: When there is no run in a folder, its record is damaged, or a run is given twice.
    """
    found = [Run.read(run) for run in runs]
    title = f"{len(found)} runs: {', '.join(names_of(found))}"
    return _write(title, [f"<h1>{escape(title)}</h1>", *comparison(found)], Path(out or "comparison.html"))


def _write(title: str, parts: Sequence[str], path: Path) -> Path:
    page = _TEMPLATE.read_text(encoding="utf-8").replace("{{ style }}", _STYLE.read_text(encoding="utf-8"))
    write(path, page.replace("{{ title }}", escape(title)).replace("{{ body }}", "\n".join(parts)))
    return path


def _head(run: Run, title: str) -> str:
    record = run.record
    trained = f"{short(record['trained'])} of {short(record['parameters'])} parameters trained"
    started = f"{record['starts'][0]['time'].replace('T', ' ').split('+')[0]} UTC"
    more = len(record["starts"]) - 1
    times = "" if more == 0 else ", resumed once" if more == 1 else f", resumed {more} times"
    about = f"{run.num_steps:,} optimizer steps in {timedelta(seconds=round(run.seconds))}, started {started}{times}"
    cards = "".join(_cards(run))
    return (
        f"<h1>{escape(title)}</h1><p>{escape(about)}. Ended: {escape(run.ended)}.</p>"
        f'<p class="dim">{escape(trained)} on '
        f'{escape(record["starts"][-1]["device"])}</p><section class="grid" id="cards">{cards}</section>'
    )


def _cards(run: Run) -> Iterator[str]:
    shown: list[tuple[str, str, str]] = [
        ("val/loss", "validation loss", ""),
        ("val/perplexity", "perplexity", ""),
        ("val/bits_per_byte", "bits per byte", ""),
        ("val/token_accuracy", "token accuracy", "%"),
        ("train/loss", "training loss", ""),
        ("train/targets_seen", "targets seen", ""),
        ("train/tokens_per_second", "tokens per second", ""),
        ("train/mfu", "MFU", "%"),
        ("train/packing_efficiency", "packing efficiency", "%"),
        ("train/peak_memory_gib", "GiB of peak memory", ""),
        ("drift/all", "distance from the pretrained weights", "%"),
        ("drift/kl", "nats of KL to the pretrained model", ""),
    ]
    for key, name, unit in shown:
        points = run.metrics.get(key)
        if points:
            last, first = (_figure(points[i][1], unit) for i in (-1, 0))
            changes = key.startswith("val/") and len(points) > 1
            before = f'<span class="dim change">{first} at step {points[0][0]:,}</span>' if changes else ""
            yield f'<div class="card"><b>{last}</b><span class="dim">{name}</span>{before}</div>'


def _charts(run: Run) -> str:
    def pair(name: str) -> dict[str, Series]:
        found = {"training": run.metrics.get(f"train/{name}", []), "validation": run.metrics.get(f"val/{name}", [])}
        return {kind: points for kind, points in found.items() if points}

    by_position, by_turn = run.curves("val/loss_position/"), run.curves("val/loss_turn/")
    of_parts = {f"{kind}: {n}": c for kind in ("train", "val") for n, c in run.curves(f"{kind}/loss/").items()}
    speeds = {"tokens": run.metrics.get("train/tokens_per_second", [])}
    speeds["targets"] = run.metrics.get("train/targets_per_second", [])
    charts = [
        line_chart("Loss", pair("loss"), "nats per target token, over all micro-batches and ranks of a step"),
        line_chart("Token accuracy", pair("token_accuracy"), "share of targets that are the most likely token"),
        line_chart("Entropy", pair("entropy"), "of the prediction of a target token, in nats"),
        line_chart("Gradient norm", {"before clipping": run.metrics.get("train/gradient_norm", [])}),
        line_chart("Learning rate", {"learning rate": run.metrics.get("lr", [])}, smooth=False),
        line_chart("Throughput", speeds, "per second, over all ranks; mean of ten steps", from_zero=True),
        line_chart("Loss by data set", of_parts) if of_parts else "",
        line_chart("Validation loss by place in the answer", by_position, "number of the token in its answer"),
        line_chart("Validation loss by turn", by_turn, "number of the answer in its conversation"),
        *(line_chart(name, curves) for name, curves in _own_curves(run).items()),
    ]
    return section("Training", "charts", charts)


def _own_curves(run: Run) -> dict[str, dict[str, Series]]:
    """Metrics of the user's own by title; those of training and validation with the same name are drawn together."""
    curves: dict[str, dict[str, Series]] = {}
    for name in run.own_metrics:
        kind, _, rest = name.partition("/")
        known = {"train": "training", "val": "validation"}.get(kind)
        curves.setdefault(rest if known else name, {})[known or name] = run.metrics[name]
    return curves


def _drift(run: Run) -> str:
    found = run.curves("drift/")
    layers = {name: points for name, points in found.items() if name.startswith("layer_")}
    others: dict[str, Series] = {n: found[n] for n in ("all", "embeddings", "head", "other") if n in found}
    last = [(f"layer {int(name.removeprefix('layer_'))}", points[-1][1]) for name, points in sorted(layers.items())]
    kl = {"KL": found.get("kl", [])}
    charts = [
        line_chart(
            "Distance from the pretrained weights", others, "‖θ − θ̂‖ / ‖θ̂‖ of trained parameters", from_zero=True
        ),
        line_chart("KL to the pretrained model", kl, "nats per target, on held-out answers", from_zero=True),
        bar_chart("Distance by layer, at the end", last, "‖θ − θ̂‖ / ‖θ̂‖"),
    ]
    return section("Drift", "charts", charts)


def _text(text: str) -> str:
    """A text with its invisible characters; line breaks are marked where there is nothing else."""
    shown = visible(text)
    return pre(shown.replace("⏎\n", "\n") if text.strip() else shown)


def _samples(rows: Sequence[Mapping[str, Any]]) -> str:
    """First and last answer to each prompt, and the answers between."""
    of_source: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        of_source.setdefault((row["source"], row["prompt"]), []).append(row)
    cards = []
    for (source, prompt), own in list(of_source.items())[:_ANSWERED]:
        first, last = own[0], own[-1]
        columns = [(f"Before, step {first['step']:,}", first["prediction"], "")]
        if last is not first:
            columns.append((f"After, step {last['step']:,}", last["prediction"], "after"))
        if last["reference"] is not None:
            columns.append(("Reference", last["reference"], ""))
        cells = "".join(f'<div class="{kind}"><h3>{name}</h3>{_text(text)}</div>' for name, text, kind in columns)
        between = "".join(f"<h3>Step {row['step']:,}</h3>{_text(row['prediction'])}" for row in own[1:-1])
        more = f"<details><summary>{len(own) - 2} between</summary>{between}</details>" if between else ""
        head = f'<div class="prompt"><h3>{escape(source)}</h3>{_text(prompt)}</div>'
        cards.append(f'<article class="card"><div class="sample">{head}{cells}</div>{more}</article>')
    return section("Samples", "samples", cards)


def _data(data: Mapping[str, Any] | None) -> str:
    if data is None:
        return ""
    splits: Mapping[str, Mapping[str, str]] = data["splits"]
    first = next(iter(splits.values()))
    rows = [[name, *(of[name] for of in splits.values())] for name in first]
    cards = [card("Data", table([["", *splits], *rows]))]
    if "histogram" in data:
        bars = [(f"{low}–{high} tokens", float(count)) for low, high, count in data["histogram"]]
        ends = (f"{data['histogram'][0][0]:,}", f"{data['histogram'][-1][1]:,} tokens")
        cards.append(bar_chart("Lengths of sequences in train", bars, data["targets"], axis=ends))
    if data.get("mixture"):
        cards.append(card("Mixture", table(data["mixture"]), "wide"))
    notes = [data[key] for key in ("epoch",) if data.get(key)] + list(data["remarks"])
    if notes:
        cards.append(card("Remarks", "".join(f"<p>{escape(note)}</p>" for note in notes), "wide"))
    return section("Data", "charts", cards)


def _settings(record: Mapping[str, Any]) -> str:
    facts = record["facts"]
    groups = {"Optimizer": facts["optimizer"], "Trainer": facts["trainer"], "Data module": facts["data_module"]}
    cards = [card(name, pairs(group)) for name, group in groups.items() if group]
    if record["config"]:
        shown = f"<details><summary>config.yaml, every key</summary>{pre(record['config'])}</details>"
        cards.append(card("Configuration", shown, "wide"))
    return section("Settings", "charts", cards)


def _reproduce(record: Mapping[str, Any]) -> str:
    versions = record["facts"]["versions"]
    pins = " ".join(f"{name}=={version.partition('+')[0]}" for name, version in versions.items())
    commands = "\n".join(f"# from step {s['step']:,}, {s['time']}\n{_command(s['command'])}" for s in record["starts"])
    again = "lightning-sft fit --config config.yaml" if record["config"] else "the command above"
    text = f"pip install {pins}\n\n{commands}"
    note = (
        f"To repeat the run: {again}, with the same data, seeds and number of devices. The samples of each step are in "
        "samples.jsonl; lightning-sft replay recomputes a step."
    )
    commands = card("Commands", f'{pre(text)}<p class="dim">{escape(note)}</p>', "wide")
    return section("How to reproduce", "charts", [commands, card("Versions", pairs(versions))])


def _command(arguments: Sequence[str]) -> str:
    """A command as it is typed, whatever folder the program was in.

    >>> [_command([name, "fit"]) for name in ("/env/bin/lightning-sft", "/lib/lightning_sft/__main__.py", "train.py")]
    ['lightning-sft fit', 'python -m lightning_sft fit', 'python train.py fit']
    """
    program = Path(arguments[0])
    if program.name == "__main__.py":
        start = ["python", "-m", program.parent.name]
    else:
        start = ["python", arguments[0]] if program.suffix == ".py" else [program.name]
    return shlex.join([*start, *arguments[1:]])


def _figure(value: float, unit: str) -> str:
    return f"{100 * value:.1f} %" if unit == "%" else short(value)
