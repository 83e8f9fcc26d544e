from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_sft.data.rows.messages import to_conversation
from lightning_sft.demos.data import command_rows, write_demo_data
from lightning_sft.types import InputError


def test_training_and_held_out_rows_do_not_overlap_and_are_enough(tmp_path: Path) -> None:
    train, test = ([json.loads(line) for line in path.read_text().splitlines()] for path in write_demo_data(tmp_path))
    assert len(train) >= 500
    assert len(test) >= 100
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}


def test_every_answer_is_strict_json_of_a_known_command() -> None:
    for row in command_rows(300):
        to_conversation(row)
        assert json.loads(row["completion"])["do"] in {"light", "heat", "alarm", "timer", "message", "buy"}
        assert json.dumps(json.loads(row["completion"])) == row["completion"]


def test_the_seed_decides() -> None:
    with pytest.raises(InputError, match=r"no 25,000 different requests; ask for 15,000 rows at most"):
        command_rows(25_000)
    assert command_rows(20, seed=1) == command_rows(20, seed=1) != command_rows(20, seed=2)
