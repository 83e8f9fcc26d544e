"""The harness of the benchmarks: its arithmetic, its tables and pictures, and all of it on a tiny model."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from benchmarks import data_growth, epoch_plan, length, precision
from benchmarks.__main__ import main
from benchmarks.cases import EQUAL, SAME, SHIPPED
from benchmarks.growth import main as growth_main
from benchmarks.limits import Work
from benchmarks.measure import _peak_bytes, run
from benchmarks.plot import draw, draw_growth
from benchmarks.table import all_figures, figures, markdown, write_page
from lightning_sft.demos import tiny_pretrained

GENTLE = ["--threads", "1", "--python", sys.executable]


@pytest.mark.parametrize("module", ["table", "limits", "growth"])
def test_what_docstrings_say_is_so(module: str) -> None:
    assert doctest.testmod(import_module(f"benchmarks.{module}")).failed == 0


def test_operations_of_a_step_are_those_that_torch_counts(tmp_path: Path) -> None:
    """Of dense logits and attention of every token to every token: torch's counter knows no mask."""
    work = Work.of(tiny_pretrained(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ids = torch.arange(200)[None]
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    assert work.of_step(tokens=200, targets=200, pairs_per_token=200) == pytest.approx(
        counter.get_total_flops(), rel=0.01
    )


def steps(*ends: tuple[float, int]) -> list[dict[str, float]]:
    return [
        {"at": at, "tokens": tokens, "targets": tokens // 2, "positions": 100, "loss": 1 / at, "device_bytes": 0}
        for at, tokens in ends
    ]


def result(name: str, system: str, kind: str, lines: list[Any], **others: Any) -> dict[str, Any]:
    return {
        "name": name,
        "system": system,
        "kind": kind,
        "began": 0.0,
        "seconds": 9.0,
        "peak_bytes": 10**9,
        "lines": lines,
        "error": None,
        **others,
    }


def results() -> dict[str, Any]:
    fast, slow = steps((5.0, 80), (6.0, 80), (7.0, 80)), steps((9.0, 50), (11.0, 50), (13.0, 50))
    return {
        "runs": [
            *(result("lightning_sft", "ours", kind, fast) for kind in (SHIPPED, EQUAL, SAME)),
            *(result("TRL", "trl", kind, slow, peak_bytes=2 * 10**9) for kind in (SHIPPED, EQUAL, SAME)),
            result("LitGPT", "litgpt", EQUAL, [], error="no such thing"),
        ],
        "preprocessing": [
            {"name": name, "error": None, "lines": [{"rows": 10, "seconds": seconds}]}
            for name, seconds in (("lightning_sft", 1.0), ("TRL", 4.0))
        ],
        "limits": [{"float32": 1000.0, "bfloat16": 10.0, "device": "CPU", "torch": "2"}],
        "data": {"rows": 10, "tokens": 100, "targets": 50, "pairs_per_token": 5.0},
        "machine": {"cpu": "a machine"},
        "work": {"per_token": 6.0, "per_target": 2.0, "per_pair": 0.0},
        "settings": {
            "precision": "float32",
            "warmup": 1,
            "threads": 2,
            "model": "tiny",
            "rows": "rows.jsonl",
            "note": "On a busy machine.",
        },
    }


def test_a_case_s_rate_is_the_median_over_the_steps_of_all_its_rounds_and_none_of_a_warm_up() -> None:
    rounds = [
        result("x", "ours", EQUAL, steps((50.0, 10), (51.0, 10), (53.0, 10))),  # 10 and 5 a second
        result("x", "ours", EQUAL, steps((70.0, 10), (70.5, 10)), peak_bytes=7),  # 20 a second
    ]
    found = figures(rounds, Work(1.0, 0.0, 0.0), limit=100.0, pairs_per_token=0.0, warmup=1)
    assert (found["steps"], found["tokens_per_second"], found["share"]) == (3, 10.0, 0.1)
    assert (found["first_step_seconds"], found["peak_bytes"]) == (60.0, 10**9)


def test_tables_compare_with_ours_of_the_same_kind_and_show_what_has_failed() -> None:
    trl = next(case for case in all_figures(results()) if case["name"] == "TRL")
    assert (trl["ours_is"], trl["ours_needs"]) == (80 / 25, 0.5)
    text = markdown(results())
    assert text.count("3.20 × as fast") == 2  # as shipped and made equal
    assert "| LitGPT | failed |" in text
    assert "| TRL | 2 | 4.00 × as fast |" in text  # rows a second
    assert f"Largest difference: {max(1 / 5 - 1 / 9, 1 / 6 - 1 / 11, 1 / 7 - 1 / 13):.1e}." in text
    assert "On a busy machine." in text


def test_a_page_without_marks_is_not_written_over() -> None:
    with pytest.raises(ValueError, match="no marks results"):
        write_page("text", "results", "new")


def test_pictures_are_drawn_also_where_a_system_has_not_run(tmp_path: Path) -> None:
    draw(results(), tmp_path / "a.png")
    curve = {"x": "rows", "y": "rows/s", "systems": {"ours": [(10, 5.0), (20, 4.0)], "trl": [(10, None), (20, None)]}}
    draw_growth({"size": curve}, tmp_path / "b.png")
    for name in "ab":
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_peak_memory_counts_a_child_s_own_pages_and_what_has_been_freed() -> None:
    child = "import time; x = bytearray(200_000_000); time.sleep(2.5)"
    code = (
        "import subprocess, sys, time; x = bytearray(300_000_000); time.sleep(1); "
        f"subprocess.run([sys.executable, '-c', {child!r}]); del x; time.sleep(0.3)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    assert 500_000_000 < _peak_bytes(process, time.time() + 60) < 600_000_000


def test_a_script_that_fails_says_why_and_does_not_stop_the_others(tmp_path: Path) -> None:
    done = run(Path(sys.executable), "ours", {"task": "nothing"}, tmp_path, threads=1)
    assert done.error is not None
    assert "KeyError: 'nothing'" in done.error


@pytest.mark.slow
def test_the_whole_benchmark_on_a_tiny_model(tmp_path: Path) -> None:
    """TRL is a package of the tests' environment; LitGPT knows models by name, of which none is tiny."""
    model = tiny_pretrained(tmp_path / "model")
    here = ["--model", model, "--out", str(tmp_path / "out"), "--systems", "ours", "trl", *GENTLE]
    size = ["--length", "256", "--steps", "3", "--rounds", "1", "--same-steps", "5", "--preprocessing-rows", "100"]
    found = main([*here, *size, "--precision", "float32"])
    assert [run["error"] for run in found["runs"]] == [None] * 9
    cases = all_figures(found)
    ours, trl = (case["losses"] for case in cases if case["kind"] == SAME)
    assert len(ours) == 5
    assert ours == pytest.approx(trl, abs=2e-4)  # TRL's are rounded to four digits
    packed = [case for case in cases if case["kind"] == EQUAL and "padded" not in case["name"]]
    assert all(case["fill"] > 0.99 and case["tokens_per_second"] > 0 for case in packed)
    for name in ("results.json", "results.md", "results.png"):
        assert (tmp_path / "out" / name).is_file()
    json.loads((tmp_path / "out" / "results.json").read_text())


@pytest.mark.slow
def test_growth_on_a_tiny_model(tmp_path: Path) -> None:
    model = tiny_pretrained(tmp_path / "model")
    here = ["--model", model, "--out", str(tmp_path / "out"), "--systems", "ours", *GENTLE]
    curves = growth_main([*here, "--quick", "--only", "ranks", "rows", "--steps", "3"])
    assert len(curves) == 2
    assert all(y for curve in curves.values() for _, y in curve["systems"]["ours"])


def test_the_plan_of_an_epoch_is_measured_and_drawn(tmp_path: Path) -> None:
    [(rows, seconds, memory)] = epoch_plan.main(["--rows", "200000", "--out", str(tmp_path)])
    assert rows == 200_000
    assert seconds > 0
    assert memory < 300  # MB: arrays, not lists of Python's integers
    assert (tmp_path / "epoch_plan.png").is_file()
    assert "| 200,000 |" in (tmp_path / "epoch_plan.md").read_text()


def test_the_length_of_a_row_is_measured_and_drawn(tmp_path: Path) -> None:
    found = {curve: [(8192, 8192.0 * own), (16_384, 16_384.0 * own)] for own, curve in enumerate(length.CURVES, 1)}
    text = length.markdown(found)
    assert "| bytes a token | 1 | 2 | 3 | 4 |" in text
    length.draw(found, tmp_path / "length.png")
    assert (tmp_path / "length.png").is_file()
    assert length.measured(next(iter(length.CURVES)), 4096) > 0


def test_the_points_of_the_growth_of_data_are_measured_on_what_they_say(tmp_path: Path) -> None:
    data_growth.write(tmp_path / "a.jsonl", rows=3, turns=4, words=10)
    rows = [json.loads(line)["messages"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [[len(message["content"].split()) for message in row] for row in rows] == [[5, 10] * 4] * 3
    rate, memory = data_growth.apart(data_growth.encoded, data_growth.trained_tokenizer(), tmp_path / "b", 3, 4, 10)
    assert rate > 0
    assert memory > 50
    rate, fill = data_growth.apart(data_growth.packed, 5000, 2048)
    assert rate > 0
    assert 0.95 < fill <= 1


@pytest.mark.slow
def test_growth_of_data_is_drawn(tmp_path: Path) -> None:
    curves = data_growth.main(["--quick", "--out", str(tmp_path)])
    assert len(curves) == 6
    assert all(y for curve in curves.values() for _, y in curve["systems"]["ours"])
    assert (tmp_path / "data_growth.png").is_file()


def test_precisions_are_compared_at_the_same_seed(
    pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # restored after the test
    given = ["--model", pretrained, "--seeds", "2", "--steps", "2", "--accelerator", "cpu", "--out", str(tmp_path)]
    precision.main(given)
    lines = (tmp_path / "precision.md").read_text(encoding="utf-8").splitlines()
    assert lines[2].startswith("| quickstart, 2 seeds | ")
    assert (tmp_path / "precision.png").stat().st_size > 1000
    runs: precision.Curves = {
        ("rows", kind, seed): {"train": [], "val": val}
        for kind, losses in (("32-true", (1.0, 1.2)), ("bf16-mixed", (1.01, 1.19)))
        for seed, val in enumerate(losses)
    }
    assert precision.table(runs).splitlines()[2] == "| rows, 2 seeds | 1.1000 | 1.1000 | +0.0100 | 0.1414 |"
