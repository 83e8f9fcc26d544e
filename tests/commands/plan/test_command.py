"""``lightning-sft plan``: what it prints is what fit does, and takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.memory import compare
from lightning_sft.demos import tiny_pretrained
from lightning_sft.main import main
from lightning_sft.module import SFTModule

ON_CPU = {"accelerator": "cpu", "devices": 1, "accumulate_grad_batches": 2}
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


@pytest.fixture
def config(pretrained: str, jsonl: Any, rows: list[dict[str, str]], tmp_path: Path) -> dict[str, Any]:
    return {
        "trainer": {**ON_CPU, **QUIET, "max_epochs": 3, "default_root_dir": str(tmp_path / "run")},
        "model": {"pretrained": pretrained, "warmup": 0.5},
        "data": {"train": jsonl(rows), "tokens_per_batch": 64},
    }


@pytest.fixture
def plan(config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command line with the config as a file: what it prints."""

    def run(*flags: str) -> str:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        try:
            main(["plan", "--config", str(tmp_path / "config.yaml"), *flags])
        finally:
            run.printed = capsys.readouterr().out
        return str(run.printed)

    return run


def test_the_weights_are_not_read(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr("lightning_sft.model.pretrained.load_model", refuse)
    monkeypatch.setattr(SFTModule, "configure_model", refuse)
    assert "13,136 (100.0%)" in plan()


def test_its_steps_are_those_of_fit(plan: Any, config: dict[str, Any], tmp_path: Path) -> None:
    steps = json.loads(plan("--json"))["steps"]
    cli = main(["fit", "--config", str(tmp_path / "config.yaml")])
    assert steps["steps in all"] == cli.trainer.global_step == 3 * steps["steps an epoch"]
    assert steps["of warm-up"] == -(-steps["steps in all"] // 2)
    split = cli.datamodule.splits["train"]
    assert steps["tokens an epoch"] == split.lengths.sum()
    assert steps["targets an epoch"] == split.num_targets


def test_devices_that_are_not_here_can_be_planned_for(plan: Any, config: dict[str, Any]) -> None:
    config["trainer"] |= {"accelerator": "gpu", "devices": 4, "strategy": "fsdp2", "precision": "bf16-mixed"}
    text = plan()
    assert "FSDP2 over 4" in text
    assert "the memory of a GPU is not known here" in text
    assert "it fits into 80.00 GiB" in plan("--memory", "80")
    config["trainer"]["strategy"] = {
        "class_path": "lightning_sft.strategies.FSDP2Strategy",
        "init_args": {"tensor_parallel_size": 1, "compute_dtype": "bfloat16"},
    }
    assert json.loads(plan("--json"))["steps"]["micro-batches a step"] == 4 * 2


def test_a_base_in_16_bits_is_loaded_as_such(plan: Any, config: dict[str, Any], tmp_path: Path) -> None:
    config["trainer"] |= {"accelerator": "gpu", "precision": "bf16-mixed"}
    config["model"]["lora"] = {"r": 1}

    def loaded(dtype: str) -> float:
        config["model"]["pretrained"] = tiny_pretrained(tmp_path / dtype, hidden_size=256, dtype=dtype)
        return float(json.loads(plan("--json"))["bytes"]["moments"]["loading"]["weights"])

    assert loaded("bfloat16") < 0.6 * loaded("float32")


def test_layers_of_long_runs_on_gpus_are_planned_as_compiled(plan: Any, config: dict[str, Any]) -> None:
    def activations(kernels: str, max_steps: int) -> float:
        config["model"]["kernels"] = kernels
        config["trainer"] |= {"accelerator": "gpu", "max_steps": max_steps, "max_epochs": -1, "precision": "bf16-mixed"}
        moments = json.loads(plan("--json"))["bytes"]["moments"]
        return float(max(parts.get("activations", 0) for parts in moments.values()))

    config["data"]["tokens_per_batch"] = 256
    compiled, plain = activations("compiled", 3), activations("none", 3)
    assert compiled < plain
    assert activations("auto", 5000) == compiled
    assert activations("auto", 3) == plain


def test_what_does_not_fit_exits_with_1_and_says_what_to_change(
    plan: Any, config: dict[str, Any], tmp_path: Path
) -> None:
    config["model"]["pretrained"] = tiny_pretrained(tmp_path / "m", hidden_size=512, vocab_size=8000, head_dim=256)
    config["trainer"]["accelerator"] = "gpu"  # on a CPU, the process itself takes most
    with pytest.raises(SystemExit) as stop:
        plan("--json", "--memory", "0.6")
    assert stop.value.code == 1
    found = json.loads(plan.printed)
    peaks = [found["bytes"]["peak"], *(remedy["peak"] for remedy in found["remedies"])]
    assert peaks == sorted(peaks, reverse=True)
    assert any("model.lora.r=16" in remedy["settings"] for remedy in found["remedies"])
    enough = (peaks[-1] + 1) / 2**30  # what the last remedy leads to
    with pytest.raises(SystemExit):
        plan("--memory", str(enough))
    assert plan.printed.splitlines()[-1].endswith(": fits")


def test_a_stream_has_steps_only_where_they_are_given(plan: Any, config: dict[str, Any]) -> None:
    config["data"]["streaming"] = True
    config["trainer"]["max_steps"] = 7
    steps = json.loads(plan("--json"))["steps"]
    assert steps == {"steps an epoch": "not known of a stream", "steps in all": 7, "of warm-up": 4}


def test_the_help_names_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Exits with 1 if it does not fit" in text
    assert "--memory " in text
    assert "--data.train " in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "tokens"),
    [((), 2048), (("--model.gradient_checkpointing", "true"), 4096), (("--model.lora.r", "8"), 1024)],
    ids=["plain", "checkpointing", "adapters"],
)
def test_the_peak_is_what_is_predicted(flags: tuple[str, ...], tokens: int, tmp_path: Path, jsonl: Any) -> None:
    size = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
    size |= {"head_dim": 64, "num_key_value_heads": 4, "vocab_size": 32_000, "max_position_embeddings": 8192}
    rows = [{"prompt": "why " * (20 + n % 60), "completion": "since " * (10 + n % 70)} for n in range(150)]
    given = ["--model.pretrained", tiny_pretrained(tmp_path / "m", **size), "--data.train", jsonl(rows), *flags]
    given += ["--data.tokens_per_batch", str(tokens), "--trainer.max_steps", "4", "--trainer.accelerator", "cpu"]
    result = compare("fit", [*given, "--data.cache", "null"], tmp_path / "run")
    assert result.measured > 1.5 * result_of_nothing(result)
    assert abs(result.error) < 0.15


def result_of_nothing(result: Any) -> float:
    """What a process takes that has imported everything: a prediction of this alone would be off."""
    return 450 * 2.0**20
