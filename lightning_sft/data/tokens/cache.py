"""Encoded examples on disk, so that a second start does not encode again.

An entry's name is a digest of all that it depends on: the contents of the files, the tokenizer, the chat template with
its frozen date, the settings, our own code, and the versions of the libraries that have a say. So no entry is ever out
of date. It is written beside and renamed when it is complete, under a claim (:mod:`lightning_sft.io.claim`): of all
processes on all machines that see the folder one builds and the others wait, and what a killed one leaves behind is
never read. Its size and the number of its examples are kept beside it; an entry that has others is built again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_sft.data.rows.remote import File
from lightning_sft.data.rows.sources import Files, size_of
from lightning_sft.data.tokens.chat_template import ChatTemplate
from lightning_sft.data.tokens.encode_rows import Chunk, EncodingConfig
from lightning_sft.data.tokens.examples import Examples, save
from lightning_sft.data.tokens.row_report import RowReport
from lightning_sft.io.claim import Claim
from lightning_sft.io.disk import sync
from lightning_sft.types import InputError

_APART = ("tokenizer", "reading", "template", "side")
_LIBRARIES = ("transformers", "tokenizers", "jinja2")
_SMALL = _READ = 1 << 20  # bytes


def cached(
    folder: Path, key: str, build: Callable[[], Iterable[Chunk]], title: str = "the data"
) -> tuple[Examples, RowReport]:
    """The entry of a key, built if there is none.

    Args:
        folder: Folder of the cache entries.
        key: Key of the entry, see :func:`key_of`.
        build: Gives the chunks of a new entry.
        title: Name of the data, for processes that wait for another one.

    Returns:
        The examples, mapped from the file, and the account of the rows.
    """
    data, account = folder / f"{key}.arrow", folder / f"{key}.json"
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(InputError):
        return _opened(data, account)
    claim = Claim(folder / f"{key}.claim", title)
    try:
        while not claim.take():
            claim.wait()
            with suppress(InputError):
                return _opened(data, account)
        try:
            return _opened(data, account)  # somebody else has built it in the meantime
        except InputError as error:
            if data.exists():
                rank_zero_warn(f"{data} is damaged ({error}), so the data are encoded again.")
            _build(data, account, build(), claim)
    finally:
        claim.release()
    return _opened(data, account)


def key_of(files: Files | None, recipe: EncodingConfig) -> str | None:
    """The name of the entry of a source, from its files (:func:`lightning_sft.data.rows.sources.files_behind`).

    ``None`` where there is to be none: of rows in memory nobody knows what they are, nor of a tokenizer in Python, and
    less than a megabyte is encoded in a second.
    """
    backend = getattr(recipe.tokenizer, "backend_tokenizer", None)
    if files is None or backend is None or size_of(files) < _SMALL:
        return None
    template = ChatTemplate.of(recipe.tokenizer, recipe.template)
    depends_on = [
        [(library, version(library)) for library in _LIBRARIES],
        [_digest(file) for file in _code()],
        {field.name: getattr(recipe, field.name) for field in fields(recipe) if field.name not in _APART},
        asdict(recipe.reading),
        recipe.side and asdict(recipe.side),
        asdict(template.config),
        template.text,
        recipe.tokenizer.special_tokens_map,
        backend.to_str(),
        [(name, [(str(file), _digest(file)) for file in own]) for name, own in files],
    ]
    text = json.dumps(depends_on, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _code() -> list[Path]:
    """The files of the package that decide what a row becomes: all of ``data/``, and what it computes weights with."""
    data = Path(__file__).parents[1]
    return [*sorted(data.rglob("*.py")), *(data.with_name(name) for name in ("objective.py", "types.py"))]


def _opened(data: Path, account: Path) -> tuple[Examples, RowReport]:
    """An entry, if it is all there.

    Raises:
        InputError: When one of its files is missing, cannot be read, or does not have the size that was written.
    """
    try:
        found = json.loads(account.read_text(encoding="utf-8"))
        size = data.stat().st_size
        if size != found["bytes"]:
            raise ValueError(f"{size:,} of {found['bytes']:,} bytes")
        examples = Examples.open(data, found["built"])
        if len(examples) != found["examples"]:
            raise ValueError(f"{len(examples):,} of {found['examples']:,} examples")
        return examples, RowReport.of_json(found["account"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:  # Arrow has them all
        raise InputError(str(error)) from error


def _build(data: Path, account: Path, chunks: Iterable[Chunk], claim: Claim) -> None:
    total, count = RowReport(), 0

    def batches() -> Iterator[Any]:
        nonlocal count
        for chunk in chunks:
            total.add(chunk.account)
            count += len(chunk.records)
            claim.progress = f"{total.num_rows:,} rows"
            yield chunk.records

    for abandoned in data.parent.glob(f".{data.stem}.*"):  # of a process that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    own = Path(mkdtemp(prefix=f".{data.stem}.", dir=data.parent))  # whoever was paused meanwhile writes elsewhere
    try:
        examples, entry = own / data.name, own / account.name
        save(batches(), examples)
        written = {"examples": count, "bytes": examples.stat().st_size, "account": total.as_json()}
        entry.write_text(json.dumps(written | {"built": own.name}), encoding="utf-8")
        sync([examples, entry])
        examples.replace(data)
        entry.replace(account)
        sync([data.parent])
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _digest(path: File) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_READ):
            digest.update(block)
    return digest.hexdigest()
