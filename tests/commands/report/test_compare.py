"""Several runs on one page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import RunRecord
from lightning_sft.commands.report.compare import names_of
from lightning_sft.commands.report.page import write_comparison, write_report
from lightning_sft.commands.report.run import Run
from lightning_sft.main import main
from lightning_sft.types import InputError


class Own(SFTModule):
    """With metrics of the user's own, in training and in validation."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("train/length", float(batch.input_ids.shape[1]))
        self.log("<b>steps</b>", float(self.trainer.global_step))
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.log("val/length", 7.0)


@pytest.fixture(scope="module")
def runs(pretrained: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    from lightning.pytorch import Trainer

    root = tmp_path_factory.mktemp("runs")
    rows = [{"prompt": f"Say {i}", "completion": f"{i} it is"} for i in range(12)]
    for number, epochs in enumerate((1, 2)):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        record = RunRecord(root / str(number) / "record")
        trainer = Trainer(max_epochs=epochs, callbacks=[record], enable_checkpointing=False, **quiet)
        trainer.fit(Own(pretrained), SFTDataModule(train=rows, val=rows[:3], tokens_per_batch=50 * (number + 1)))
    return [root / "0" / "record", root / "1" / "record"]


def test_results_and_settings_stand_side_by_side_and_curves_over_each_other(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = main(["report", *map(str, runs)])
    assert page == Path("comparison.html")
    text = page.read_text(encoding="utf-8")
    assert "<h1>2 runs: 0, 1</h1>" in text
    cells = {row[0]: row[1:] for row in (re.findall(r"<td>(.*?)</td>", line) for line in text.split("<tr>")) if row}
    first, second = map(Run.read, runs)
    assert cells["steps"] == [str(first.num_steps), str(second.num_steps)]
    assert cells["last validation loss"] == [f"{run.last('val/loss'):.5g}" for run in (first, second)]
    assert cells["ended"] == ["trainer.max_epochs=1 reached", "trainer.max_epochs=2 reached"]
    assert cells["data_module.tokens_per_batch"] == ["50", "100"]
    assert cells["trainer.max_epochs"] == ["1", "2"]
    assert "trainer.precision" not in cells
    [curves] = [json.loads(data) for data in _charts(text, "Validation loss")]
    assert [name for name, _ in curves["curves"]] == ["0", "1"]
    assert curves["curves"][1][1] == [list(point) for point in second.metrics["val/loss"]]


def test_a_class_of_the_users_own_differs_in_what_it_is_and_has_alone(runs: list[Path], tmp_path: Path) -> None:
    record = json.loads((runs[0] / "run.json").read_text())
    model = {"pretrained": "tiny", "schedule": "cosine"}
    own = {"class_path": "losses.Smooth", "init_args": {**model, "smoothing": 0.1}}
    for name, section in (("plain", model), ("own", own)):
        record["config"] = yaml.safe_dump({"model": section})
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    text = write_comparison([tmp_path / "plain", tmp_path / "own"], tmp_path / "page.html").read_text(encoding="utf-8")
    cells = {row[0] for row in (re.findall(r"<td>(.*?)</td>", line) for line in text.split("<tr>")) if row}
    assert {cell for cell in cells if cell.startswith("model.")} == {"model.class_path", "model.smoothing"}


class Squared(SFTModule):
    def target_loss(self, logits: Any, targets: Any, *inputs: Any) -> Any:
        return super().target_loss(logits, targets) ** 2


def test_losses_of_different_kinds_are_said(pretrained: str, runs: list[Path], tmp_path: Path) -> None:
    from lightning.pytorch import Trainer

    def run(name: str, module: SFTModule, num_val: int = 3) -> Path:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        record = RunRecord(tmp_path / name)
        trainer = Trainer(max_epochs=1, callbacks=[record], enable_checkpointing=False, **quiet)
        rows = [{"prompt": f"Say {i}", "completion": f"{i} it is"} for i in range(6)]
        trainer.fit(module, SFTDataModule(train=rows, val=rows[:num_val]))
        return tmp_path / name

    def notes(*folders: Path) -> list[str]:
        text = write_comparison(folders, tmp_path / "page.html").read_text(encoding="utf-8")
        return re.findall(r"<p>(The .*?)</p>", text)

    plain, other = run("plain", SFTModule(pretrained)), run("squared", Squared(pretrained))
    assert notes(plain, run("same", SFTModule(pretrained))) == []
    assert notes(plain, other) == [
        "The training losses are of different kinds: plain on −log Pr, squared on Squared.target_loss. The validation "
        "losses are −log Pr."
    ]
    [said] = notes(plain, run("sequences", SFTModule(pretrained, normalize="sequence")))
    assert "not comparable: they are normalized otherwise (plain by token, sequences by sequence)" in said
    [said] = notes(plain, run("data", SFTModule(pretrained), num_val=2))
    assert said == "The validation losses are of different data: plain on 3 rows of memory, data on 2 rows of memory."
    record = json.loads((plain / "run.json").read_text())
    del record["loss"]  # of an earlier version
    (plain / "run.json").write_text(json.dumps(record))
    assert notes(plain, other) == []


def _charts(text: str, title: str) -> list[str]:
    cards = [card for card in text.split('<section class="card chart">') if f"<h2>{title}</h2>" in card]
    return [re.search(r'data-chart="(.*?)"', card)[1].replace("&quot;", '"') for card in cards]  # type: ignore[index] # each has one


def test_metrics_of_the_users_own_are_drawn_and_ours_are_no_such(runs: list[Path], tmp_path: Path) -> None:
    run = Run.read(runs[0])
    assert sorted(run.own_metrics) == ["<b>steps</b>", "train/length", "val/length"]
    assert [value for _, value in run.metrics["<b>steps</b>"]] == list(map(float, range(run.num_steps)))
    text = write_report(runs[0], tmp_path / "page.html").read_text(encoding="utf-8")
    [curves] = [json.loads(data) for data in _charts(text, "length")]
    assert [name for name, _ in curves["curves"]] == ["training", "validation"]
    assert "<h2>&lt;b&gt;steps&lt;/b&gt;</h2>" in text
    assert "<h2><b>" not in text


def test_it_says_why_a_run_ended_and_how_it_is_repeated(runs: list[Path], tmp_path: Path) -> None:
    record = json.loads((runs[0] / "run.json").read_text())
    record["starts"][0]["command"] = ["/somewhere/bin/lightning-sft", "fit", "--config", "a b.yaml"]
    record["facts"]["versions"]["torch"] = "2.13.0+cpu"
    (tmp_path / "run.json").write_text(json.dumps(record))
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Ended: trainer.max_epochs=1 reached." in text
    assert "\nlightning-sft fit --config &#x27;a b.yaml&#x27;" in text
    pins = re.search(r"pip install (.*)", text)
    assert pins is not None
    assert "torch==2.13.0 " in pins[1]
    assert "lightning-sft==" in pins[1]
    del record["starts"][0]["end"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert "Ended: not yet, or it was killed." in write_report(tmp_path).read_text(encoding="utf-8")


def test_what_cannot_be_compared_is_refused(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is given twice"):
        write_comparison([runs[0], runs[0]])
    with pytest.raises(InputError, match="at most 8 runs, got 9"):
        write_comparison([_copy(runs[0], tmp_path / str(number)) for number in range(9)])
    with pytest.raises(InputError, match=r"There is no run\.json"):
        write_comparison([runs[0], tmp_path / "nowhere"])


def _copy(run: Path, to: Path) -> Path:
    to.mkdir()
    (to / "run.json").write_bytes((run / "run.json").read_bytes())
    return to


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["/r/a", "/r/b"], ["a", "b"]),
        (["/r/a/logs/version_0", "/r/b/logs/version_0"], ["a", "b"]),
        (["/r/a", "/r/a/b"], ["", "b"]),
    ],
)
def test_names_are_what_differs(folders: list[str], names: list[str]) -> None:
    assert names_of([Run(Path(folder), {}, {}, 0.0, []) for folder in folders]) == [name or "." for name in names]


def test_values_below_the_curves_tell_runs_apart_that_differ_in_the_third_decimal(
    runs: list[Path], tmp_path: Path
) -> None:
    text = write_comparison(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    for run in map(Run.read, runs):
        assert f"<td>{run.last('val/loss'):.6g}</td>" in text
