"""Adapters take the same steps under every strategy, and go on from its checkpoints; or the strategy is refused."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_sft import SFTModule
from lightning_sft.demos import tiny_pretrained
from lightning_sft.model.tuning.adapters import Lora
from lightning_sft.model.tuning.tuning import TuningConfig
from lightning_sft.types import InputError
from tests.helpers.adapting import launch, run

BITS = [bits for bits, package in (("4bit", "bitsandbytes"), ("8bit", "torchao")) if importlib.util.find_spec(package)]
NAMES = ["ddp", "distributed", "one_file", "ddp_bfloat16", "distributed_bfloat16", *(f"ddp_{bits}" for bits in BITS)]
ALONE = ["single", "single_bfloat16", *(f"single_{bits}" for bits in BITS)]
WHOLE = ["distributed", "distributed_bfloat16", "deepspeed"]  # keep the base in their checkpoints
if importlib.util.find_spec("deepspeed"):
    NAMES.append("deepspeed")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuning")
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}  # 64 columns are a block of NF4
    pretrained = tiny_pretrained(folder / "model", tie_word_embeddings=True, **shape)
    for name in ALONE:
        run(pretrained, name, folder)
    launch(NAMES, pretrained, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ALONE, *NAMES])
def test_steps_are_those_of_one_device_and_a_resumed_run_repeats_them(out: Path, name: str) -> None:
    losses, norms, resumed, size = json.loads((out / f"{name}.json").read_text())
    alone = re.sub("^(ddp|distributed|one_file|deepspeed)", "single", name)
    true_losses, true_norms, _, least = json.loads((out / f"{alone}.json").read_text())
    tolerance = {"bfloat16": 2e-2}.get(name.rpartition("_")[2], 1e-5)  # a product that is rounded the other way
    assert losses == pytest.approx(true_losses, rel=tolerance)
    assert norms == pytest.approx(true_norms, rel=5 * tolerance)
    assert resumed == losses[3:]
    assert losses[-1] < losses[0] - 0.2
    assert (size > 3 * least) == (name in WHOLE)


def trainer(**strategy: Any) -> Any:
    return SimpleNamespace(strategy=SimpleNamespace(**strategy), precision="32-true")


@pytest.mark.parametrize(
    ("tuning", "strategy", "message"),
    [
        (
            TuningConfig(Lora(), quantize="4bit"),
            {"config": {"zero_optimization": {}}},
            "Quantized weights cannot be sharded",
        ),
        (TuningConfig(Lora()), {"zero_stage_3": True}, "Under ZeRO-3 neither adapters"),
        (TuningConfig(new_tokens=["<|a|>"]), {"zero_stage_3": True}, r"nor model\.new_tokens can be added to"),
        (
            TuningConfig(Lora()),
            {"device_mesh": {"tensor_parallel": SimpleNamespace(size=lambda: 2)}},
            "tensor parallelism",
        ),
    ],
)
def test_what_a_strategy_cannot_have_is_refused(
    pretrained: str, tuning: TuningConfig, strategy: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        tuning.load(pretrained, None, None, trainer(**strategy))


def test_hyperparameters_are_plain(pretrained: str) -> None:
    module = SFTModule(pretrained, lora=Lora(r=4), new_tokens=["<|a|>"], frozen=["*"])
    assert json.loads(json.dumps(dict(module.hparams)))["lora"]["r"] == 4
