from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_sft.checkpoints.run_files import cut_off, line_of, record_of, refuse_anew, refuse_finished
from lightning_sft.types import InputError


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """The folder of a run that has taken steps 1 to 3 by its ledger and 1 to 5 by its metrics."""

    def make(*checkpoints: str, saved: bool = False, **contents: Any) -> Path:
        lines = [json.dumps({"step": step}) + "\n" for step in range(1, 6)]
        (tmp_path / "samples.jsonl").write_text("".join(lines[:3]))
        (tmp_path / "metrics.jsonl").write_text("".join(lines))
        (tmp_path / "run.json").write_text(json.dumps({"saved": saved}))
        (tmp_path / "checkpoints").mkdir()
        for name in checkpoints:
            torch.save({"global_step": 3, **contents}, tmp_path / "checkpoints" / name)
        return tmp_path

    return make


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        refuse_finished(folder, [folder / "checkpoints"])
    return str(error.value)


def test_a_finished_run_is_refused_with_its_last_step_and_the_checkpoint_to_resume_from(
    run: Callable[..., Path],
) -> None:
    said = refused(run("a.ckpt", callbacks={}))
    assert "has finished step 5, and this one would start at step 0" in said
    assert "Resume it from " in said
    assert "a.ckpt (--ckpt_path last)" in said


def test_weights_alone_are_to_be_exported_not_resumed_from(run: Callable[..., Path]) -> None:
    said = refused(run("best.ckpt"))
    assert "best.ckpt has only the weights" in said
    assert "--ckpt_path last" not in said


def test_a_run_whose_checkpoints_are_gone_is_refused_if_it_has_ever_saved_one(run: Callable[..., Path]) -> None:
    assert "No readable checkpoint of it is left" in refused(run(saved=True))


def test_a_run_that_has_saved_nothing_or_has_no_lines_may_begin_again(run: Callable[..., Path]) -> None:
    folder = run()
    refuse_finished(folder, [folder / "checkpoints"])
    torch.save({"callbacks": {}, "global_step": 0}, folder / "checkpoints" / "a.ckpt")
    for name in ("samples.jsonl", "metrics.jsonl"):
        (folder / name).write_text("")
    refuse_finished(folder, [folder / "checkpoints"])
    (folder / "samples.jsonl").unlink()
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    assert "has finished step 1," in refused(folder)


@pytest.mark.parametrize("kept_in", ["checkpoints", "elsewhere"])
def test_a_run_that_starts_at_step_0_is_refused_and_one_that_resumes_is_not(
    run: Callable[..., Path], kept_in: str
) -> None:
    folder = run("a.ckpt", callbacks={})
    (folder / "checkpoints").rename(folder / kept_in)
    trainer: Any = SimpleNamespace(
        callbacks=[], global_step=0, checkpoint_callbacks=[SimpleNamespace(dirpath=folder / "elsewhere")]
    )
    with pytest.raises(InputError, match=rf"Resume it from .*{kept_in}/a.ckpt"):
        refuse_anew(trainer, folder)
    trainer.global_step = 5
    refuse_anew(trainer, folder)


def test_a_ledger_is_cut_after_the_step_and_one_without_earlier_steps_takes_the_next_free_name(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    assert cut_off(path, 3) == 0
    assert not path.exists()
    lines = [json.dumps({"step": step, "é": "ü"}, ensure_ascii=False) + "\n" for step in (2, 3, 3, 4)]
    path.write_text("".join(lines), encoding="utf-8")
    assert cut_off(path, 4) == 4
    assert cut_off(path, 3) == 3
    assert path.read_text(encoding="utf-8") == "".join(lines[:3])
    (tmp_path / "samples.1.jsonl").touch()
    assert cut_off(path, 1) == 0
    assert (tmp_path / "samples.2.jsonl").read_text(encoding="utf-8") == "".join(lines[:3])
    assert not path.exists()


def test_a_record_is_a_dictionary_or_empty(tmp_path: Path) -> None:
    assert record_of(tmp_path) == {}
    for text in ('{"starts": [', "[1]"):
        (tmp_path / "run.json").write_text(text)
        with pytest.warns(UserWarning, match=r"run.json: it is damaged, not a JSON object"):
            assert record_of(tmp_path) == {}
    (tmp_path / "run.json").write_text('{"saved": true}')
    assert record_of(tmp_path) == {"saved": True}


def test_the_first_line_of_a_step_is_its_line_and_an_empty_ledger_has_none(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.touch()
    with pytest.raises(InputError, match=r"has no step 2. It has none"):
        line_of(path, 2)
    path.write_text('{"step": 2, "loss": 1}\n{"step": 2, "loss": 2}\n{"step": 5}\n{"step": "6"}\n')
    assert line_of(path, 2)["loss"] == 1
    with pytest.raises(InputError, match=r"has no step 4. It has 2 to 5"):
        line_of(path, 4)
