"""`python -m benchmarks.gpu` without a GPU: its checks find faults, its figures are right, its tables hide nothing."""

from __future__ import annotations

import doctest
import json
import subprocess
import zipfile
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.cases import Case
from benchmarks.gpu import correctness, rows, smoke, throughput
from benchmarks.gpu.__main__ import main, merged
from benchmarks.gpu.count import counted
from benchmarks.gpu.parts import CORRECTNESS, DEFAULT, RESUME, SMOKE, TRL_LIGER, Part, parts, run_part
from benchmarks.gpu.report import checks, markdown
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.stage import main as stage
from benchmarks.gpu.stage import thin
from benchmarks.gpu.stand_ins import flash_attn
from benchmarks.gpu.targets import TARGETS
from lightning_sft.data.batches.collate import collate
from lightning_sft.demos import tiny_tokenizer
from lightning_sft.types import Example


@pytest.fixture
def common(tmp_path: Path) -> dict[str, Any]:
    """What all cases get, for tiny models on a CPU."""
    tokenizer = rows.write_tokenizer(tmp_path / "tokenizer", None, quick=True)
    paths = rows.write_rows(tmp_path / "rows", tokenizer, None, "prompt", "completion", quick=True)
    places = {"models": str(tmp_path / "models"), "cache": str(tmp_path / "cache")}
    own = {"out": str(tmp_path / "record.jsonl"), "folder": str(tmp_path / "case" / "output")}
    return {"device": "cpu", "quick": True, "seed": 0, "tokenizer": tokenizer, "rows": paths, **places, **own}


def lines_of(common: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(common["out"]).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("module", ["kinds", "meter", "correctness", "counting"])
def test_what_docstrings_say_is_so(module: str) -> None:
    assert doctest.testmod(import_module(f"benchmarks.gpu.{module}")).failed == 0


def test_a_pack_has_the_loss_and_gradients_of_its_documents_one_by_one(common: dict[str, Any]) -> None:
    given = {"architecture": "llama", "precisions": ["32-true", "bf16-mixed"], "kernels": None}
    correctness.check(SimpleNamespace(**common, **given))
    assert [(line["precision"], line["passed"]) for line in lines_of(common)] == [
        ("32-true", True),
        ("bf16-mixed", True),
    ]


def test_documents_that_see_each_other_are_found(common: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def one_document(examples: list[Example], normalizer: float) -> Any:
        ids, weights = ([x for e in examples for x in getattr(e, n)] for n in ("input_ids", "target_weights"))
        return collate([Example(ids, weights)], normalizer)

    monkeypatch.setattr(correctness, "collate", one_document)
    given = {"architecture": "llama", "precisions": ["32-true", "bf16-mixed"], "kernels": None}
    correctness.check(SimpleNamespace(**common, **given))
    assert [line["passed"] for line in lines_of(common)] == [False, False]


def test_a_precision_that_fails_is_a_result_and_the_others_are_still_checked(common: dict[str, Any]) -> None:
    given = {"architecture": "llama", "precisions": ["no-such", "32-true"], "kernels": None}
    correctness.check(SimpleNamespace(**common, **given))
    failed, passed = lines_of(common)
    assert (failed["passed"], passed["passed"]) == (False, True)
    assert "no-such" in failed["error"]


def test_figures_of_a_fit_are_those_of_its_packs_and_of_the_formula(common: dict[str, Any]) -> None:
    size = {"warmup": 1, "steps": 2, "profiled": 1}
    given = {"shape": "qwen3-0.6b", "documents": "short", "kernels": None, **size}
    throughput.train(SimpleNamespace(**common, **given))
    [line] = lines_of(common)
    tokens, targets = line["tokens_per_step"], line["targets_per_step"]
    assert 0.8 * 256 < tokens <= 256
    layer = 32 * (4 + 2 + 2 + 4) * 8 + 3 * 32 * 64  # queries, keys, values, output, and the three matrices of the MLP
    least = 6 * 2 * layer * tokens + 6 * 32 * 264 * targets
    seconds = tokens / line["tokens_per_second"]
    pairs = (line["tflops"] * 1e12 * seconds - least) / (12 * 2 * 4 * 8)  # what is left is attention
    assert tokens < pairs < tokens**2 / 2
    assert line["profile"]["kinds"]["matmul"]["kernels"] > 0
    assert len(line["step_ms"]) == 2


def test_generated_rows_have_the_lengths_of_gsm8k_s() -> None:
    tokenizer = tiny_tokenizer()
    found = list(rows.generated(tokenizer, 400, rows._SHORT))
    prompts, answers = (
        sum(len(tokenizer(row[name])["input_ids"]) for row in found) / len(found) for name in ("prompt", "completion")
    )
    assert prompts == pytest.approx(60, rel=0.1)
    assert answers == pytest.approx(100, rel=0.1)


def test_every_target_is_of_a_case_that_is_run_and_cases_do_not_share_folders() -> None:
    known = parts("cuda", quick=False)
    for target in TARGETS:
        assert DEFAULT in [case.name for case in known[target.shape].cases]
        assert TRL_LIGER in [case.name for case in known[f"trl-{target.shape}"].cases]
    assert all(len({case.slug for case in part.cases}) == len(part.cases) for part in known.values())
    assert len(known[SMOKE].cases) >= 28
    assert len(known[CORRECTNESS].cases) == 14


def test_a_case_that_fails_and_one_that_hangs_are_results(common: dict[str, Any], tmp_path: Path) -> None:
    cases = [Case("fails", "gpu", "x", {"task": "nothing"}), Case("hangs", "gpu", "x", {"task": "ours"})]
    found: list[dict[str, Any]] = []  # importing what the second needs takes longer than it has
    run_part(Part("x", cases, at_once=2), common, tmp_path / "cases", seconds=1.0, threads=1, done=found.append)
    by_name = {result["case"]: result["error"] for result in found}
    assert "KeyError: 'nothing'" in by_name["fails"]
    assert by_name["hangs"].startswith("It was killed after 1 s")


def result(part: str, case: str, lines: list[dict[str, Any]], error: str | None = None) -> dict[str, Any]:
    return {"part": part, "case": case, "settings": {}, "lines": lines, "error": error, "seconds": 1.0}


def measured(tokens_per_second: float, mfu: float = 0.4, logged: float = 0.4, gib: float = 21.0) -> dict[str, Any]:
    rates = {"tokens_per_second": tokens_per_second, "targets_per_second": 1.0, "tflops": 1.0, "mfu": mfu}
    steps = {"step_ms": [1.0, 2.0], "first_step_seconds": 1.0, "tokens_per_step": 16384.0}
    memory = {"allocated_gib": gib, "reserved_gib": gib}
    return {**rates, **steps, **memory, "attention": "packed: why", "logged": {"mfu": logged}}


def run_of(*results: dict[str, Any]) -> dict[str, Any]:
    versions = {"torch": "2.13.0", "transformers": "5.24.0", "trl": None}
    facts = {"card": "a card", "driver": "1", "cuda": "13", "commit": "abc", "date": "today", "note": ""}
    return {"facts": {**facts, "versions": versions}, "settings": {}, "results": list(results)}


def test_targets_are_met_missed_or_not_measured() -> None:
    text = markdown(
        run_of(
            result("qwen2.5-0.5b", DEFAULT, [measured(120_000.0, gib=23.0)]),
            result("trl-qwen2.5-0.5b", TRL_LIGER, [measured(80_000.0)]),
            result("llama-3.2-1b", DEFAULT, [], error="CUDA out of memory"),
        )
    )
    assert "| qwen2.5-0.5b | ≥ 113,000 tokens/s | 120,000 | yes |" in text
    assert "| qwen2.5-0.5b | ≥ 1.3 × TRL + FlashAttention 2 + Liger | 1.50 | yes |" in text
    assert "| qwen2.5-0.5b | ≤ 22 GiB | 23.00 | no |" in text
    assert "| llama-3.2-1b | ≥ 65,000 tokens/s | not measured |  |" in text
    assert "CUDA out of memory" in text


def test_checks_fail_where_a_case_has_failed_and_where_the_logged_mfu_is_another() -> None:
    found = checks(
        [
            result(SMOKE, "ddp", [{"passed": False}], error="Traceback\nValueError: no\nExit code 1."),
            result(RESUME, "bf16-mixed", [{"deterministic": True, "resumed": True, "passed": True}]),
            result("qwen2.5-0.5b", DEFAULT, [measured(1.0, mfu=0.4, logged=0.6)]),
            result("qwen3-0.6b", DEFAULT, [measured(1.0, mfu=0.4, logged=0.405)]),
        ]
    )
    assert [check.passed for check in found] == [False, True, False, True]
    assert "ValueError: no" in found[0].detail


def test_the_exit_code_says_whether_a_check_has_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    for passed, code in ((True, 0), (False, 1)):
        path.write_text(json.dumps(run_of(result(RESUME, "x", [{"passed": passed}]))), encoding="utf-8")
        assert main(["report", str(path)]) == code
    assert "**no**" in capsys.readouterr().out


def test_runs_are_merged_only_if_they_are_of_one_card_and_commit(tmp_path: Path) -> None:
    one, other = run_of(result("a", "x", [])), run_of(result("a", "x", [], error="later"), result("b", "y", []))
    paths = [str(tmp_path / name) for name in ("1.json", "2.json")]
    for path, run in zip(paths, (one, other), strict=True):
        Path(path).write_text(json.dumps(run), encoding="utf-8")
    assert [r["error"] for r in merged(paths)["results"]] == ["later", None]
    other["facts"]["commit"] = "def"
    Path(paths[1]).write_text(json.dumps(other), encoding="utf-8")
    with pytest.raises(SystemExit, match="one commit"):
        merged(paths)


def test_a_layer_s_matmuls_are_counted_forward_and_twice_backward() -> None:
    shape = SHAPES["llama-3.2-1b"].tiny()
    found = counted(shape, chunk_size=None, compiled=False)
    assert found["layer"]["matmul"][0] == 3 * 7  # of queries, keys, values, output, and the MLP's three
    assert found["layer"]["attention"][0] == 2
    layer = 32 * 12 * 8 + 3 * 32 * 64
    assert found["update"]["optimizer"][1] >= 7 * 4 * layer  # four of each weight in float32 are read, three written


def test_counting_a_published_shape_computes_none_of_it() -> None:
    """A step of it has 29 TFLOP, and would hold 20 GB; this test has neither the time nor the memory."""
    found = counted(SHAPES["qwen2.5-0.5b"], chunk_size=None, compiled=False)
    weights = 896 * (14 + 2 + 2 + 14) * 64 + 3 * 896 * 4864
    assert found["layer"]["matmul"][1] > 3 * 2 * weights  # in bfloat16, each is read twice and its gradient written
    assert found["targets"] > 9000


def test_the_stand_in_for_flash_attn_calls_torch_s_kernel() -> None:
    q, k, v = (torch.empty(10, heads, 8, device="meta", dtype=torch.bfloat16) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 4, 10], device="meta")
    for window in ((-1, -1), (3, 3)):
        out = flash_attn.flash_attn_varlen_func(q, k, v, bounds, bounds, 6, 6, causal=True, window_size=window)
        assert out.shape == q.shape
    out = flash_attn.flash_attn_func(q[None], k[None], v[None], causal=True)
    assert out.shape == (1, *q.shape)


def test_a_staged_folder_has_the_project_and_its_commit(tmp_path: Path) -> None:
    assert stage([str(tmp_path / "staged"), "--no-wheels"]) == 0
    project = tmp_path / "staged" / "project"
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert (project / "COMMIT").read_text(encoding="utf-8").strip().rstrip("+") == head.strip()
    assert (project / "benchmarks" / "gpu" / "__main__.py").is_file()
    assert AutoTokenizer.from_pretrained(tmp_path / "staged" / "tokenizer").chat_template
    subprocess.run(["bash", "-n", str(tmp_path / "staged" / "run.sh")], check=True)


def test_a_wheel_is_thinned_to_one_cuda(tmp_path: Path) -> None:
    names = ["b/__init__.py", *(f"b/libbitsandbytes_{kind}.so" for kind in ("cuda130", "cuda124", "rocm71", "cpu"))]
    with zipfile.ZipFile(tmp_path / "b.whl", "w") as wheel:
        for name in names:
            wheel.writestr(name, "x")
    thin(tmp_path / "b.whl", tmp_path / "thin.whl", "130")
    assert zipfile.ZipFile(tmp_path / "thin.whl").namelist() == [names[0], names[1], names[4]]


@pytest.mark.slow
@pytest.mark.parametrize("name", smoke.names())
def test_command_lines_are_understood(name: str, common: dict[str, Any], tmp_path: Path) -> None:
    """Their settings exist; what they do is for a GPU to show."""
    from lightning_sft.main import main as lightning_sft

    model = throughput.prepared("qwen3-0.6b", common["models"], common["tokenizer"], "cpu", quick=True)[1]
    for command in smoke.command_lines(model, common["rows"], tmp_path, "cpu", 256)[name]:
        if command[3:4] in (["fit"], ["validate"], ["predict"], ["plan"], ["verify"]):
            with pytest.raises(SystemExit) as end:
                lightning_sft([*command[3:], "--print_config"])
            assert end.value.code == 0


@pytest.mark.slow
def test_all_parts_in_tiny_form(tmp_path: Path) -> None:
    names = [CORRECTNESS, RESUME, SMOKE, "qwen2.5-0.5b", "trl-qwen2.5-0.5b"]
    cases = ["llama", "32-true", "doctor", DEFAULT, "TRL"]
    out = tmp_path / "out"
    assert main([*names, "--device", "cpu", "--quick", "--only", *cases, "--threads", "1", "--out", str(out)]) == 0
    run = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [(result["part"], result["error"]) for result in run["results"]] == [(name, None) for name in names]
    assert (out / "results.md").read_text(encoding="utf-8").count("not measured") == len(TARGETS) - 1
