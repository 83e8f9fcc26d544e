"""Several runs on one page: what they differ in, what came of it, and their curves over each other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from html import escape
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from lightning_sft.commands.report.charts import line_chart
from lightning_sft.commands.report.parts import card, section, table
from lightning_sft.commands.report.run import Run
from lightning_sft.io.words import counted
from lightning_sft.types import InputError

_MOST = 8  # colors of the page
_PLACES = (
    "default_root_dir",
    "dirpath",
    "save_dir",
    "version",
    "ckpt_path",
    "folder",
)  # where a run is, not what it does
_OF_CLASS = re.compile(r"^(model|data)\.init_args\.")  # of a class of the user's own
_CHARTS = {
    "val/loss": "Validation loss",
    "train/loss": "Training loss",
    "val/token_accuracy": "Token accuracy in validation",
    "train/gradient_norm": "Gradient norm before clipping",
    "lr": "Learning rate",
    "train/tokens_per_second": "Tokens per second",
}


def comparison(runs: Sequence[Run]) -> Iterator[str]:
    """The sections of the page.

    Args:
        runs: Two to eight runs.

    Raises:
        InputError: When there are more, or a run is given twice.
    """
    if len(runs) > _MOST:
        raise InputError(f"report compares at most {_MOST} runs, got {len(runs)}. Give fewer.")
    names = names_of(runs)
    found = dict(zip(names, runs, strict=True))
    different = differences({name: _settings(run) for name, run in found.items()})
    results = [[name, *map(figure, runs)] for name, figure in _RESULTS.items()]
    shown = [row for row in results if any(cell != "–" for cell in row[1:])]
    cards = [_card("Results", names, shown, _not_comparable(found))]
    if different:
        rows = [[key, *(of[name] for name in names)] for key, of in different.items()]
        cards.append(_card("Settings that differ", names, rows))
    yield section("Runs", "charts", cards)
    own = [name for run in runs for name in run.own_metrics]
    titles = _CHARTS | {name: name for name in dict.fromkeys(own)}
    curves = {key: {name: run.metrics.get(key, []) for name, run in found.items()} for key in titles}
    yield section("Curves", "charts", [line_chart(title, curves[key]) for key, title in titles.items()])


def names_of(runs: Sequence[Run]) -> list[str]:
    """A short name for each run: the part of its path that is not the same in all.

    Raises:
        InputError: When a run is given twice.
    """
    folders = [str(run.folder.resolve()) for run in runs]
    if twice := sorted({folder for folder in folders if folders.count(folder) > 1}):
        raise InputError(f"The run in {twice[0]} is given twice. Give each folder once.")
    paths = [Path(folder).parts for folder in folders]
    before = _num_shared(paths)
    ends = [path[before:] for path in paths]
    after = _num_shared([end[::-1] for end in ends])
    return ["/".join(end[: len(end) - after]) or "." for end in ends]


def _num_shared(paths: Sequence[Sequence[str]]) -> int:
    """How many parts at their beginning all paths share."""
    return sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))


def differences(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """The settings that are not the same in all runs, by key, then by run; ``–`` where a run has no such setting.

    >>> differences({"a": {"lr": 1, "seed": 0}, "b": {"lr": 2, "seed": 0, "r": 8}})
    {'lr': {'a': '1', 'b': '2'}, 'r': {'a': '–', 'b': '8'}}
    """
    keys = dict.fromkeys(key for own in settings.values() for key in own)
    rows = {key: {name: str(own.get(key, "–")) for name, own in settings.items()} for key in keys}
    return {key: row for key, row in rows.items() if len(set(row.values())) > 1}


def _settings(run: Run) -> dict[str, Any]:
    """The settings of a run by their full key, from its config, or else from what is known without one."""
    config, facts = run.record["config"], run.record["facts"]
    known = yaml.safe_load(config) if config else {"pretrained": run.record["pretrained"], **facts}
    wanted = {key: known[key] for key in known if key not in ("step", "epoch", "metrics")}
    flat = {_OF_CLASS.sub(r"\1.", key): value for key, value in _flat(wanted)}
    return {key: value for key, value in flat.items() if key.rpartition(".")[2] not in _PLACES}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _last(name: str) -> Callable[[Run], str]:
    def figure(run: Run) -> str:
        value = run.last(name)
        return "–" if value is None else f"{value:.5g}"

    return figure


def _best(run: Run) -> str:
    points = [(value, step) for step, value in run.metrics.get("val/loss", [])]
    return "–" if not points else f"{min(points)[0]:.5g} at step {min(points)[1]:,.0f}"


_RESULTS: dict[str, Callable[[Run], str]] = {
    "lowest validation loss": _best,
    "last validation loss": _last("val/loss"),
    "last training loss": _last("train/loss"),
    "targets seen": _last("train/targets_seen"),
    "tokens per second": _last("train/tokens_per_second"),
    "GiB of peak memory": _last("train/peak_memory_gib"),
    "steps": lambda run: f"{run.num_steps:,}",
    "time": lambda run: str(timedelta(seconds=round(run.seconds))),
    "ended": lambda run: run.ended,
}


def _not_comparable(runs: Mapping[str, Run]) -> Iterator[str]:
    """Notes on losses that are of different kinds; nothing is known of runs recorded by earlier versions."""
    losses = {name: run.record["loss"] for name, run in runs.items() if run.record.get("loss")}
    if len({loss["of"] for loss in losses.values()}) > 1:
        of = ", ".join(f"{name} on {loss['of']}" for name, loss in losses.items())
        yield f"The training losses are of different kinds: {of}. The validation losses are −log Pr."
    if len({loss["normalize"] for loss in losses.values()}) > 1:
        of = ", ".join(f"{name} by {loss['normalize']}" for name, loss in losses.items())
        yield f"The losses are not comparable: they are normalized otherwise ({of}). Compare perplexities."
    val = {name: run.record["facts"].get("data", {}).get("val", {}) for name, run in runs.items()}
    if len({_rows_of(data) for data in val.values() if data}) > 1:
        of = ", ".join(f"{name} on {_rows_of(data)}" for name, data in val.items() if data)
        yield f"The validation losses are of different data: {of}."


def _rows_of(data: Mapping[str, Any]) -> str:
    """The rows of a split, as a checkpoint records them."""
    parts = [(part.get("source"), part.get("rows", 0)) for part in data.get("parts", ())]
    return " and ".join(f"{counted(rows, 'row')} of {source or 'memory'}" for source, rows in parts)


def _card(title: str, names: Sequence[str], rows: Sequence[Sequence[str]], notes: Iterable[str] = ()) -> str:
    said = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return card(title, f'<div class="scroll wrapped">{table([["", *names], *rows])}</div>{said}', "wide")
