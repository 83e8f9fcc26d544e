"""What fails on one rank is told by all of them, and ends them all."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tests.helpers.failing import ENDS, POISON
from tests.helpers.full_disk import CASES, FILES, FULL, HOW
from tests.helpers.processes import torchrun
from tests.helpers.slow import slow_but

LAUNCHES = [["ddp", "fsdp2", "fsdp2_lora", "tensor", "context"]]
SECONDS = 60  # after the NaN, in which all ranks have to have ended, on a busy machine too
if importlib.util.find_spec("deepspeed"):
    LAUNCHES.append(["deepspeed1", "deepspeed2", "deepspeed3"])


@pytest.mark.parametrize("names", slow_but(LAUNCHES[:1], LAUNCHES), ids="+".join)
def test_a_nan_on_one_rank_names_its_row_on_all_of_them(
    names: list[str], pretrained_for_two: str, tmp_path: Path
) -> None:
    torchrun("tests.helpers.failing", pretrained_for_two, str(tmp_path), *names, timeout=200)
    told = {path.stem: path.read_text() for path in tmp_path.glob("*.txt")}
    verbs = [(name, verb) for name in names for verb in ("fit", "validate") if name != "deepspeed3" or verb == "fit"]
    assert told.keys() == {f"{name}-{verb}-{rank}" for name, verb in verbs for rank in (0, 1)}
    for text in told.values():
        assert f"Samples: {POISON}." in text
    for name, verb in verbs:
        began, ended = ([float(path.read_text()) for path in tmp_path.glob(f"{name}-{verb}-*.{end}")] for end in ENDS)
        assert len(ended) == 2
        assert max(ended) - min(began) < SECONDS, (name, verb)


def test_a_disk_that_is_full_on_one_rank_is_one_message_on_all_of_them(pretrained_for_two: str, tmp_path: Path) -> None:
    torchrun("tests.helpers.full_disk", pretrained_for_two, str(tmp_path), timeout=100)
    for name in (f"{case} {how}" for case in CASES for how in HOW):
        for rank in (0, 1):
            told = (tmp_path / f"{name} {rank}.txt").read_text()
            assert re.fullmatch(rf"The checkpoint .*ckpt\S* cannot be written: .*{FULL}\. Those .* intact\.", told), (
                told
            )
        assert not list((tmp_path / name).glob("*.ckpt"))
    for name in FILES:
        for rank in (0, 1):
            told = (tmp_path / f"{name} {rank}.txt").read_text()
            assert re.search(rf"{name} cannot be written: .*{FULL}", told), told
