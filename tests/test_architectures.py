"""A dozen rows of docs/reference/models.md, measured again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_sft.model import probes
from tests.architectures import table
from tests.architectures.configs import ARCHITECTURES, save
from tests.architectures.measured import error, fit, in_float64, plain, rated, reference
from tests.architectures.table import COLUMNS, PAGE, measured, outcome, page, written
from tests.helpers.pinned import with_pinned
from tests.helpers.slow import slow_but

DOZEN = (
    *("gemma3_text", "gpt2", "bloom", "cohere2"),
    *("qwen3_moe", "gpt_oss", "ernie4_5_moe", "llama4_text"),
    *("qwen3_next", "falcon_h1", "mamba"),
    "qwen2_5_vl",
)
TEXT = PAGE.read_text(encoding="utf-8")
ROWS = written(TEXT)


@pytest.mark.parametrize("name", slow_but(["gemma3_text", "qwen3_moe", "falcon_h1", "qwen2_5_vl"], DOZEN))
def test_a_row_of_the_page_is_what_is_measured(name: str) -> None:
    found, written = ({column: outcome(row[column]) for column in COLUMNS} for row in (measured(name), ROWS[name]))
    assert found == written, f"run: python -m tests.architectures {name}"


def test_the_page_has_all_architectures_and_no_cell_is_wrong() -> None:
    assert ROWS.keys() == {name for group in ARCHITECTURES.values() for name in group}
    assert len(ROWS) >= 60
    cells = [(name, column, cell) for name, row in ROWS.items() for column, cell in row.items()]
    assert not [cell for cell in cells if cell[2].startswith(("wrong", "fails"))]


@with_pinned("transformers", "torch", "lightning", "peft")
def test_the_page_is_written_by_its_command() -> None:
    assert page(TEXT, ROWS) == TEXT, "run: python -m tests.architectures"


def test_documents_that_see_each_other_are_a_wrong_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrained = save("opt", tmp_path, torch.float64)
    with in_float64():
        wanted = reference(plain(pretrained))
        assert rated(error(fit(pretrained)[0].gradients[0], wanted)).startswith("exact")
        monkeypatch.setattr(probes, "_isolates", lambda *_: True)
        leaking, _ = fit(pretrained, {"attn_implementation": "sdpa"})
    assert error(leaking.gradients[0], wanted) > 1e-3


def test_a_process_that_crashes_or_hangs_is_the_outcome_of_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert table.measured("nowhere")["loads"].startswith("fails: ")
    monkeypatch.setattr(table, "TIMEOUT", 0.1)
    assert set(table.measured("llama").values()) == {"fails: no end after 0.1 s", "–"}
