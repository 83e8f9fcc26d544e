"""``lightning-sft init``: inspects model, data and machine, and writes a commented YAML config for ``fit``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.prompt import Prompt

from lightning_sft.commands.init_size import Schedule, size_of_data
from lightning_sft.commands.init_yaml import Machine, Method, as_yaml
from lightning_sft.data.rows.formats import find_format, likely_columns
from lightning_sft.data.rows.messages import Converter, Reading
from lightning_sft.data.rows.sources import leaves, parsed
from lightning_sft.data.tokens.held_out import share_of
from lightning_sft.data.tokens.outliers import outlier_remark
from lightning_sft.io.arguments import Count, check_arguments, plain
from lightning_sft.io.words import counted
from lightning_sft.machine.terminal import Console, printable
from lightning_sft.model.pretrained import context_length, load_tokenizer
from lightning_sft.types import InputError

_LOOKED_AT = 200  # rows inspected


def init(
    model: str | Path | None = None,
    data: str | Path | None = None,
    val: str | Path | None = None,
    method: Method | None = None,
    devices: Count | None = None,
    columns: dict[str, str] | None = None,
    chat_template: str | Path | None = None,
    out: str | Path = "config.yaml",
    overwrite: bool = False,
) -> Path:
    """Write a complete, commented YAML for ``lightning-sft fit --config``. On a terminal, asks for what is not given.

    Args:
        model: The pretrained model: a hub name, a folder, or a GGUF file.
        data: The training data: a file, a folder, a glob, or hf:owner/name:split.
        val: The validation data, or a share of the training data, such as 5%.
        method: Training method: the whole model, or low-rank adapters.
        devices: Number of devices; by default all of this machine.
        columns: Column of the data for each key of the format: {prompt: question, completion: answer}.
        chat_template: A Jinja file, for a model without a chat template.
        out: The file to write.
        overwrite: Whether to overwrite an existing file.

    Raises:
        InputError: When the model or the data cannot be used, or the file already exists.
    """
    check_arguments(init, locals())
    val, chat_template, out = plain(val), plain(chat_template), str(out)
    path, ask = Path(out), _Asker(sys.stdin.isatty())
    if path.exists() and not overwrite:
        raise InputError(f"{out} already exists. Give another file (--out), or --overwrite true.")
    model = str(model or ask("Pretrained model (a hub name, a folder, or a GGUF file)", "--model"))
    tokenizer, context = load_tokenizer(model, chat_template), context_length(model)
    data = str(data or ask("Training data (a file, a folder, a glob, or hf:owner/name:split)", "--data"))
    seen = look_at(data, columns, ask)
    console = Console(stderr=True, soft_wrap=True)
    console.print(f"Data: format {seen.format}; columns {', '.join(seen.keys)}.", highlight=False)
    size = size_of_data(data, seen.columns, tokenizer, context)
    if not size.lengths:
        raise InputError(f"No row can be trained on with the chat template of {model}: {size.problem}")
    if size.problem is not None:
        console.print(f"fit will stop at rows that cannot be used, such as this: {size.problem}", highlight=False)
    if val is None and ask.is_possible:
        val = ask("Validation data, or a share of the training data such as 5% (empty for none)", "--val", "") or None
    if (share := share_of(val, data)) is not None:
        size.trained -= share
    elif val is not None:
        look_at(str(val), seen.columns, ask)
    method = method or ask("Train the whole model or adapters", "--method", "full", ["full", "lora"])
    machine = Machine.here(devices)
    kind = f"{seen.format} rows with {', '.join(seen.keys)}"
    given = {"train": (data, kind), "val": val, "columns": seen.columns, "chat_template": chat_template}
    schedule = Schedule.of(size, machine.devices, machine.accelerator == "gpu")
    text = as_yaml(model, context, given, size, schedule, method, machine, out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    if count := len(size.too_long):
        console.print(
            f"Of the first {size.num_encoded:,} rows, {counted(count, 'sequence', 'are')} longer than the model's "
            f"context of {context:,} tokens and left out (data.overflow): {size.too_long[0]}.",
            highlight=False,
        )
    if remark := outlier_remark(size.lengths, size.places.__getitem__):
        console.print(remark, highlight=False)
    steps = counted(schedule.num_steps, "optimizer step")
    console.print(f"{size.rows_make} about {steps}.", highlight=False)
    console.print(f"Wrote {out}. See what will be trained on:  lightning-sft show --config {out}", highlight=False)
    console.print(f"Train:  lightning-sft fit --config {out}", highlight=False)
    return path


class _Asker:
    """Asks on a terminal; elsewhere uses defaults, and names the missing flag if there is none."""

    def __init__(self, is_possible: bool) -> None:
        self.is_possible = is_possible

    def __call__(self, question: str, flag: str, default: str | None = None, choices: Any = None) -> Any:
        if self.is_possible:
            answer = Prompt.ask(question, default=default, choices=choices)
            if answer or default is not None:
                return answer
        elif default is not None:
            return default
        raise InputError(f"init needs {flag}: {question[0].lower()}{question[1:]}.")


@dataclass(frozen=True)
class Seen:
    """Format and contents of the first rows of the data.

    Args:
        format: Name of the format.
        keys: Keys of the first row.
        columns: Column for each key of the format if the names differ, or ``None``.
    """

    format: str
    keys: list[str]
    columns: dict[str, str] | None


def look_at(data: str, columns: dict[str, str] | None, ask: _Asker) -> Seen:
    """Determine format and columns from the first rows of the data.

    Args:
        data: Data source, as for ``data.train``.
        columns: Column for each key of the format, if known.
        ask: Asker for columns that cannot be inferred.

    Raises:
        InputError: When no row can be used.
    """
    problem: InputError | None = None
    rows: list[tuple[Any, str]] = []
    for row, provenance in islice((row for leaf in leaves(data) for row in leaf()), _LOOKED_AT):
        try:
            rows.append((parsed(row, provenance), provenance))
        except InputError as error:
            problem = problem or error
    if problem is not None and not rows:
        raise problem
    first = rows[0][0] if rows else {}
    keys = list(first) if isinstance(first, dict) else []
    try:
        find_format({"messages": first} if isinstance(first, list) else first, None, columns)
    except InputError as error:
        if columns or not keys:
            raise
        columns = likely_columns(keys)
        if columns is None:
            if not ask.is_possible:
                raise
            Console(stderr=True).print(f"{data}: {error}", highlight=False)
            names = printable(", ".join(keys))
            question = ask(f"Which column is the question ({names})", "--columns '{prompt: …, completion: …}'")
            answer = ask(f"Which column is the answer ({names})", "--columns '{prompt: …, completion: …}'")
            columns = {"prompt": question, "completion": answer}
    convert, is_usable = Converter(Reading(columns=columns)), False
    for row, provenance in rows:
        try:
            convert(row, provenance)
            is_usable = True
        except InputError as error:
            problem = problem or error
    if not is_usable:
        raise problem or InputError(f"{data} has no rows.")
    whole = {"messages": first} if isinstance(first, list) else first
    return Seen(find_format(whole, None, columns).name, keys or ["a list of messages"], columns)
