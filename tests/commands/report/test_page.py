"""The report of real runs, in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from lightning_sft.callbacks import DriftMonitor, SampleGenerations
from lightning_sft.commands.report.page import _text, write_report
from lightning_sft.commands.report.run import Run
from lightning_sft.main import main
from lightning_sft.types import InputError
from tests.callbacks.test_record import fit

EVIL = "</pre></script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


@pytest.fixture(scope="module")
def made(pretrained: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "run"
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    more = [DriftMonitor(2), SampleGenerations([EVIL, "Why?"], 4, console=False)]
    fit(partial(Trainer, **quiet), pretrained, folder, max_epochs=6, num_sanity_val_steps=-1, more=more)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A run with everything that a report can have, and an attacker among its texts."""
    return shutil.copytree(made, tmp_path / "run")


def test_the_report_has_all_parts_loads_nothing_and_texts_are_never_markup(run: Path) -> None:
    page = main(["report", str(run)])
    assert page == run / "report.html"
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(|\{\{""", text)
    assert "default-src 'none'" in text
    assert text.count("<script") == text.count("</script>") == 1
    assert "<img" not in text
    titles = re.findall(r"<h2[^>]*>(.*?)</h2>", text)
    parts = ["Training", "Drift", "Samples", "Data", "Settings", "How to reproduce"]
    assert [title for title in titles if title in parts] == [*parts[:4], "Data", *parts[4:]]
    charts = {
        "Loss",
        "Token accuracy",
        "Entropy",
        "Gradient norm",
        "Learning rate",
        "Throughput",
        "KL to the pretrained model",
    }
    assert charts <= set(titles)
    assert "at step 0</span>" in text  # the validation before the training
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert f"<b>{last['val/loss']:.3g}</b>" in text
    assert "lightning==" in text


def test_each_start_of_a_run_has_its_command_and_time_adds_up(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    record["starts"].append({**record["starts"][0], "step": 40, "command": ["lightning-sft", "fit", "a b"]})
    (run / "run.json").write_text(json.dumps(record))
    lines = [json.dumps({"step": s, "seconds": t, "train/loss": 1.0}) for s, t in ((1, 5.0), (2, 9.0), (3, 2.0))]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert Run.read(run).seconds == 11
    text = write_report(str(run), str(run / "other" / "page.html")).read_text(encoding="utf-8")
    assert "lightning-sft fit &#x27;a b&#x27;" in text
    assert "resumed once" in text


def test_the_newest_run_below_a_folder_is_found_and_no_run_is_an_error(run: Path, tmp_path: Path) -> None:
    assert Run.read(tmp_path).folder == run
    with pytest.raises(InputError, match=r"There is no run\.json in"):
        Run.read(tmp_path / "nowhere")


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_in_a_browser_curves_are_seen_in_both_schemes_and_figures_are_read_by_pointing(
    run: Path, browser: Any, scheme: str, dark: bool, tmp_path: Path
) -> None:
    browser.show(write_report(str(run)).as_uri(), scheme)
    assert browser.value("document.title") == "Fine-tuning of llama"
    ground, text = (
        browser.value(f"getComputedStyle(document.body).{name}.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)")
        for name in ("backgroundColor", "color")
    )
    assert (ground < 150 < 600 < text) if dark else (text < 150 < 600 < ground)
    boxes = browser.value(
        "JSON.stringify([...document.querySelectorAll('svg path.line')].map(p => p.getBoundingClientRect().width))"
    )
    assert len(json.loads(boxes)) >= 10
    assert min(json.loads(boxes)) > 100
    strokes = browser.value(
        "[...document.querySelectorAll('path.line')].filter(p => getComputedStyle(p).stroke === 'none').length"
    )
    assert strokes == 0
    browser.point("svg[data-chart]", x=20)
    assert re.fullmatch(r"step \d+\ntraining [\d.]+\nvalidation [\d.]+", browser.text("#tip"))
    browser.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 50_000
    browser.show(write_report(str(run)).as_uri(), scheme, width=390)
    assert browser.value("document.documentElement.scrollWidth") <= 390


def test_an_answer_of_line_breaks_alone_is_seen() -> None:
    assert _text("\n\n").count("⏎") == 2
    assert "a\nb" in _text("a\nb")
    assert "&lt;U+200B&gt;" in _text("a\u200b")
