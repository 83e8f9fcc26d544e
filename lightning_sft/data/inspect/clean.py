"""The usable rows of a split in the normal form, as a file that can be trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lightning_sft.data.rows.messages import Converter, Reading
from lightning_sft.data.rows.mixture import Mixture, Part
from lightning_sft.data.rows.sources import Source, files_behind, leaves, parsed
from lightning_sft.data.tokens.dataset import Split
from lightning_sft.io.disk import whole
from lightning_sft.types import IGNORE, Conversation, Example, InputError

_JSONL = (".jsonl", ".ndjson")
_UNSAFE = r"[^\w.-]"  # in the name of a file


def clean_files(
    path: str | Path, mixture: Mixture, sources: Iterable[Source] = (), overwrite: bool = False
) -> list[Path]:
    """The files that :func:`write_clean` writes, one for each data set, and that are free.

    Args:
        path: Path of the JSONL file; with several data sets, each has a file, with its name before the suffix.
        mixture: The data sets.
        sources: Data that are read, none of which may be written over.
        overwrite: Whether other files may be.

    Raises:
        InputError: When the name is none of a JSONL file, or there is a file already.

    >>> [str(file) for file in clean_files("new/out.jsonl", Mixture({"maths": "a.jsonl", "chat": "b.jsonl"}))]
    ['new/out.maths.jsonl', 'new/out.chat.jsonl']
    """
    path, found = Path(path), list[Path]()
    if path.suffix.lower() not in _JSONL:
        raise InputError(f"clean={path} gets lines of JSON: give a name that ends in {' or '.join(_JSONL)}.")
    for name in mixture.names or [""]:
        own = path.with_name(f"{path.stem}.{re.sub(_UNSAFE, '_', name)}{path.suffix}") if name else path
        taken = own in found  # by a part whose name differs in characters that no file should have
        found.append(own.with_stem(f"{own.stem}.{len(found) + 1}") if taken else own)
    given = [file for source in sources for _, files in files_behind(source) or () for file in files]
    for own in filter(Path.exists, found):
        if any(isinstance(file, Path) and file.samefile(own) for file in given):
            raise InputError(
                f"clean={own} is one of the files that are read, and the rows that are refused would be lost. Give "
                "another file."
            )
        if not overwrite:
            raise InputError(f"{own} already exists. Give another file (--clean), or --overwrite true.")
    return found


def write_clean(path: str | Path, splits: Sequence[Split], reading: Reading) -> dict[Path, int]:
    """Write the rows of splits that have a sequence, one line of JSON each; their files and numbers of rows.

    Messages are in the normal form, with their weights and tools. Trained with the same settings, but for
    ``data.format`` and ``data.columns``, the file gives the same sequences as the data it was made from.

    Args:
        path: Path of the JSONL file, see :func:`clean_files`; a file of that name is replaced.
        splits: Splits of the same data, whose rows are written: that for training, and one that is held out of it.
        reading: How its rows are read.
    """
    written = dict[Path, int]()
    mixture = splits[0].mixture
    files = clean_files(path, mixture, overwrite=True)
    for number, (part, own) in enumerate(zip(mixture.of_name.values(), files, strict=True)):
        used = {place for split in splits for place in _places(split, number)}
        own.parent.mkdir(parents=True, exist_ok=True)
        with whole(own) as [hidden], hidden.open("w", encoding="utf-8") as file:
            for row in _rows(part, used, reading.of(part)):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                written[own] = written.get(own, 0) + 1
    return written


def left_out(splits: Sequence[Split]) -> tuple[int, int]:
    """How many rows are refused, and how many have no sequence that is short enough.

    Args:
        splits: Splits of the same data.
    """
    refused = {reason for split in splits for reason in split.account.refused}
    too_long = {place.rpartition(" (")[0] for split in splits for place in split.account.too_long}
    used = {example.provenance for split in splits for example in split.examples}
    return len(refused), len(too_long - used)


def _places(split: Split, number: int) -> Iterator[str]:
    """The rows of a data set of a split that have a sequence."""
    begin = sum(split.part_sizes[:number])
    return (example.provenance for example in split.examples[begin : begin + split.part_sizes[number]])


def _rows(part: Part, used: set[str], reading: Reading) -> Iterator[dict[str, Any]]:
    """The used rows of a data set, with the variables of the chat template that are their own."""
    convert = Converter(replace(reading, chat_template_kwargs=None))
    for leaf in leaves(part.source):
        for row, provenance in leaf():
            if provenance in used:
                read = convert.read(parsed(row, provenance), provenance)
                yield of_tokens(read) if isinstance(read, Example) else of_conversation(read, reading.train_on == "all")


def of_conversation(conversation: Conversation, omits_defaults: bool = True) -> dict[str, Any]:
    """A conversation as a row.

    Args:
        conversation: The conversation.
        omits_defaults: Whether weights are left out that are those of a message without one.

    >>> of_conversation(Conversation([{"role": "user", "content": "Hi"}], weights=[1.0]))
    {'messages': [{'role': 'user', 'content': 'Hi', 'weight': 1.0}]}
    """
    [first, *_], weights = conversation.messages, conversation.weights
    if first["role"] == "text":
        return {"text": first["content"]} | ({} if weights[0] == 1 else {"weight": weights[0]})
    messages = []
    for message, weight in zip(conversation.messages, weights, strict=True):
        is_default = omits_defaults and weight == float(message["role"] == "assistant")
        messages.append(message if is_default else {**message, "weight": weight})
    variables = {"chat_template_kwargs": dict(conversation.template_kwargs)} if conversation.template_kwargs else {}
    return {"messages": messages} | ({"tools": conversation.tools} if conversation.tools else {}) | variables


def of_tokens(example: Example) -> dict[str, Any]:
    """A row of token ids: with labels, or with a mask where weights are other than 0 and 1.

    >>> of_tokens(Example([5, 6, 7], [0.0, 0.0, 1.0]))
    {'input_ids': [5, 6, 7], 'labels': [-100, -100, 7]}
    """
    ids, weights = np.asarray(example.input_ids), np.asarray(example.target_weights)
    if np.isin(weights, (0, 1)).all():
        return {"input_ids": ids.tolist(), "labels": np.where(weights > 0, ids, IGNORE).tolist()}
    return {"input_ids": ids.tolist(), "loss_mask": weights.tolist()}
