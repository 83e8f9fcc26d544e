"""An entry is used again exactly if nothing that it depends on has changed, and is whole or not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from pyarrow import ipc

import lightning_sft
from lightning_sft.data.rows.messages import Reading
from lightning_sft.data.rows.sources import files_behind
from lightning_sft.data.tokens import cache as caching
from lightning_sft.data.tokens.cache import cached
from lightning_sft.data.tokens.dataset import load_split
from lightning_sft.data.tokens.encode_rows import Chunk, EncodingConfig
from lightning_sft.data.tokens.examples import save, to_record_batch
from lightning_sft.data.tokens.row_report import RowReport
from lightning_sft.data.tokens.template_config import TemplateConfig
from lightning_sft.demos import CHATML, tiny_tokenizer
from lightning_sft.types import Example, InputError

RECIPE = EncodingConfig(tiny_tokenizer())


def key_of(source: Any, recipe: EncodingConfig) -> str | None:
    return caching.key_of(files_behind(source), recipe)


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "_SMALL", 0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Say {i}", "completion": "Yo", "id": i}) + "\n" for i in range(9)))
    return path


def count_builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    builds: list[int] = []
    build = caching._build
    monkeypatch.setattr(caching, "_build", lambda *args: (builds.append(1), build(*args)))
    return builds


def test_an_entry_depends_on_all_files_that_decide_what_a_row_becomes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digested: list[Path] = []
    digest = caching._digest
    monkeypatch.setattr(caching, "_digest", lambda file: (digested.append(Path(file)), digest(file))[1])
    key_of(str(path), RECIPE)
    package = Path(lightning_sft.__file__).parent
    needed = {package / "objective.py", package / "types.py", *(package / "data").rglob("*.py")}
    assert len(needed) > 30
    assert set(digested) == {*needed, path}


def test_a_second_start_reads_what_the_first_has_encoded(path: Path, tmp_path: Path, monkeypatch: Any) -> None:
    builds, folder = count_builds(monkeypatch), tmp_path / "cache"
    fresh = load_split("train", str(path), RECIPE)
    for _ in range(2):
        split = load_split("train", str(path), RECIPE, cache=folder)
        assert [list(e.input_ids) for e in split.examples] == [list(e.input_ids) for e in fresh.examples]
        assert [list(e.target_weights) for e in split.examples] == [list(e.target_weights) for e in fresh.examples]
        assert [e.provenance for e in split.examples] == [e.provenance for e in fresh.examples]
        assert split.account == fresh.account
    assert builds == [1]


@pytest.mark.parametrize(
    "changed",
    [
        {"normalize": "sequence"},
        {"max_length": 300},
        {"overflow": "truncate"},
        {"weight": 0.5},
        {"reading": Reading(format="prompt-completion")},
        {"reading": Reading(columns={"prompt": "prompt"})},
        {"reading": Reading(train_on="last")},
        {"template": TemplateConfig({"enable_thinking": False})},
        {"template": TemplateConfig(thoughts="mask")},
        {"tokenizer": tiny_tokenizer(CHATML + " ")},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_another_setting_or_template_is_another_entry(path: Path, changed: dict[str, Any]) -> None:
    assert key_of(str(path), replace(RECIPE, **changed)) != key_of(str(path), RECIPE)


def test_another_vocabulary_or_special_token_is_another_entry(path: Path) -> None:
    for change in (lambda t: t.add_tokens(["zzz"]), lambda t: t.add_special_tokens({"pad_token": "<|im_end|>"})):
        change(tokenizer := tiny_tokenizer())
        assert key_of(str(path), EncodingConfig(tokenizer)) != key_of(str(path), RECIPE)


def test_another_content_or_name_is_another_entry_and_another_time_is_not(path: Path) -> None:
    first = key_of(str(path), RECIPE)
    os.utime(path, (1, 1))
    assert key_of(str(path), RECIPE) == first
    copy = path.with_name("b.jsonl")
    copy.write_bytes(path.read_bytes())
    assert key_of(str(copy), RECIPE) != first  # the places of its rows have another name
    path.write_text(path.read_text().replace("Yo", "Ye"))
    assert key_of(str(path), RECIPE) != first


def test_our_own_code_and_the_frozen_date_are_in_the_key(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = key_of(str(path), RECIPE)
    with monkeypatch.context() as patch:
        patch.setattr(caching, "_code", lambda: [path])  # other code
        assert key_of(str(path), RECIPE) != first
    dated = "{% set now = strftime_now %}{{ now('%Y') }}" + CHATML
    first = key_of(str(path), EncodingConfig(tiny_tokenizer(dated)))
    with monkeypatch.context() as patch:
        patch.setattr("lightning_sft.data.tokens.template.FROZEN_DATE", date(2025, 1, 1))
        assert key_of(str(path), EncodingConfig(tiny_tokenizer(dated))) != first


def test_rows_in_memory_and_small_files_have_no_entry(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert key_of([{"prompt": "Hi", "completion": "Yo"}], RECIPE) is None
    monkeypatch.setattr(caching, "_SMALL", 10**6)
    assert key_of(str(path), RECIPE) is None


def chunks(count: int = 3, seconds: float = 0.0) -> Iterator[Chunk]:
    for i in range(count):
        time.sleep(seconds)
        yield Chunk(to_record_batch([Example([i], [0.0], f"a:{i}")]), RowReport(num_rows=1))


def test_of_many_that_want_an_entry_at_once_one_builds_it(tmp_path: Path) -> None:
    builds: list[int] = []

    def build() -> Iterator[Chunk]:
        builds.append(1)
        return chunks(seconds=0.05)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: cached(tmp_path, "key", build), range(4)))
    assert [len(examples) for examples, _ in results] == [3] * 4
    assert len(builds) == 1


def test_a_build_that_fails_leaves_nothing_and_the_next_one_builds(tmp_path: Path) -> None:
    def fails() -> Iterator[Chunk]:
        yield from chunks()
        raise InputError("no")

    with pytest.raises(InputError):
        cached(tmp_path, "key", fails)
    assert not list(tmp_path.iterdir())
    assert len(cached(tmp_path, "key", chunks)[0]) == 3


def test_a_process_that_is_killed_while_it_builds_spoils_nothing(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from lightning_sft.data.tokens.cache import cached;"
        "from tests.data.tokens.test_cache import chunks; print('begun', flush=True);"
        "cached(Path(sys.argv[1]), 'key', lambda: chunks(1000, 0.02))"
    )
    killed = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert killed.stdout is not None
    killed.stdout.readline()
    while not list(tmp_path.glob(".key.*/key.arrow")):
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    killed.stdout.close()
    assert {path.name.partition(".")[2].partition(".")[0] for path in tmp_path.iterdir()} == {"key", "claim"}
    assert len(cached(tmp_path, "key", chunks)[0]) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"key.arrow", "key.json"}


def _cut_at_a_batch(data: Path) -> None:
    """The same stream of Arrow with its last batch missing."""
    with ipc.open_stream(data.read_bytes()) as whole:
        save(list(whole)[:-1], data)


def _cut_at_a_batch_with_its_size(data: Path) -> None:
    _cut_at_a_batch(data)
    account = data.with_suffix(".json")
    account.write_text(json.dumps(json.loads(account.read_text()) | {"bytes": data.stat().st_size}))


@pytest.mark.parametrize(
    "damage",
    [
        _cut_at_a_batch,
        _cut_at_a_batch_with_its_size,
        lambda data: data.write_bytes(data.read_bytes()[:-100]),
        lambda data: data.write_bytes(b""),
        lambda data: data.write_bytes(bytes(data.stat().st_size)),
        lambda data: data.unlink(),
        lambda data: data.with_suffix(".json").write_text('{"num_'),
        lambda data: data.with_suffix(".json").write_text("[]"),
        lambda data: data.with_suffix(".json").write_text('{"bytes": 5}'),
        lambda data: data.with_suffix(".json").write_bytes(b"\xff"),
    ],
)
def test_a_damaged_entry_is_built_again_and_said_in_one_line(tmp_path: Path, damage: Any) -> None:
    fresh, account = cached(tmp_path, "key", chunks)
    del fresh
    damage(tmp_path / "key.arrow")
    is_there = (tmp_path / "key.arrow").exists()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        again, its_account = cached(tmp_path, "key", chunks)
    assert [e.input_ids.tolist() for e in again] == [[0], [1], [2]]
    assert its_account == account
    assert [("is damaged" in str(w.message), "\n" in str(w.message)) for w in said] == [(True, False)] * is_there
    assert len(cached(tmp_path, "key", chunks)[0]) == 3


def test_an_entry_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    monkeypatch.setattr(caching, "sync", lambda paths: steps.extend(f"sync {path.name}" for path in paths))
    replace_file = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append(f"name {b.name}"), replace_file(a, b)))
    cached(tmp_path, "key", chunks)
    files = ["key.arrow", "key.json"]
    assert steps == [*(f"sync {name}" for name in files), *(f"name {name}" for name in files), f"sync {tmp_path.name}"]


def test_a_cache_that_cannot_be_written_warns_and_encodes(path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match=r"cannot be kept in .* Set data.cache to another folder"):
        assert len(load_split("train", str(path), RECIPE, cache=tmp_path / "file" / "cache").examples) == 9
