from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import PredictionWriter
from lightning_sft.evaluation.generation import Sampling
from lightning_sft.main import main
from tests.helpers.processes import run


def flags(pretrained: str, path: str, out: Path) -> list[str]:
    keys = {"model.pretrained": pretrained, "data.predict": path, "model.max_new_tokens": 2, "trainer.logger": "false"}
    keys |= {"trainer.accelerator": "cpu", "trainer.default_root_dir": str(out), "data.predict_batch_size": 2}
    return [text for key, value in keys.items() for text in (f"--{key}", str(value))]


def test_two_processes_write_every_row_once_in_the_order_of_the_input(
    pretrained: str, jsonl: Any, tmp_path: Path
) -> None:
    path = jsonl([{"prompt": "a" * n, "completion": str(n)} for n in (3, 9, 1, 4, 7)])
    two = ["--trainer.devices", "2"]
    main(["predict", *flags(pretrained, path, tmp_path / "one")])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]  # the real one
    run([*torchrun, "-m", "lightning_sft", "predict", *flags(pretrained, path, tmp_path / "two"), *two])
    one, two = ((tmp_path / name / "predictions.jsonl").read_text() for name in ("one", "two"))
    assert [json.loads(line)["reference"] for line in one.splitlines()] == ["3", "9", "1", "4", "7"]
    assert one == two


class KilledError(RuntimeError):
    pass


@pytest.mark.parametrize("place", [0, 1, 2], ids=["key", "first row", "second row"])
def test_damaged_lines_of_a_killed_predict_are_named_and_their_rows_are_answered_again(
    pretrained: str, jsonl: Any, tmp_path: Path, place: int
) -> None:
    path = jsonl([{"prompt": "a" * n, "completion": str(n)} for n in (3, 9, 1)])
    main(["predict", *flags(pretrained, path, tmp_path / "whole")])
    out, kept = tmp_path / "killed" / "predictions.jsonl", []

    class Kept(PredictionWriter):
        def on_predict_end(self, *args: Any) -> None:
            kept.append(self._file.read_bytes().splitlines(keepends=True))
            super().on_predict_end(*args)

    def predict() -> None:
        trainer = Trainer(accelerator="cpu", logger=False, callbacks=[Kept(str(out))], enable_progress_bar=False)
        trainer.predict(SFTModule(pretrained, max_new_tokens=2), SFTDataModule(predict=path, predict_batch_size=2))

    predict()
    lines = kept.pop()
    lines[place] = b"\0\0\0\n"  # as after a power failure
    part = out.with_name(".predictions.jsonl.rank0.partial")
    part.write_bytes(b"".join(lines))
    with pytest.warns(UserWarning, match=rf"Skipping line {place + 1} of .*rank0.partial: it is damaged"):
        predict()
    assert out.read_text() == (tmp_path / "whole" / "predictions.jsonl").read_text()
    assert list(out.parent.iterdir()) == [out]


def test_a_predict_that_is_killed_goes_on_and_has_the_rows_of_one_that_was_not(
    pretrained: str, jsonl: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = jsonl([{"prompt": "a" * n, "completion": str(n)} for n in (3, 9, 1, 4, 7)])
    drawn = ["--model.sampling.temperature", "1.0"]
    main(["predict", *flags(pretrained, path, tmp_path / "whole"), *drawn])
    calls: list[int] = []

    class Counted(PredictionWriter):
        def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
            super().on_predict_batch_end(*args, **kwargs)
            calls.append(len(args[2]))
            if len(calls) == 2:
                raise KilledError

    def predict(temperature: float = 1.0) -> None:
        trainer = Trainer(accelerator="cpu", logger=False, callbacks=[Counted(str(out))], enable_progress_bar=False)
        module = SFTModule(pretrained, max_new_tokens=2, sampling=Sampling(temperature))
        trainer.predict(module, SFTDataModule(predict=path, predict_batch_size=2), weights_only=True)

    out = tmp_path / "killed" / "predictions.jsonl"
    with pytest.raises(KilledError):
        predict()
    [part] = out.parent.iterdir()
    with part.open("a", encoding="utf-8") as file:
        file.write('{"number": 4, "row": {"source": "cut sho')
    predict()
    assert calls == [2, 2, 1]
    assert out.read_text() == (tmp_path / "whole" / "predictions.jsonl").read_text()
    assert list(out.parent.iterdir()) == [out]
    calls.clear()
    with pytest.raises(KilledError):
        predict()
    predict(temperature=0.5)  # of other settings, nothing is taken
    assert calls == [2, 2, 2, 2, 1]
