"""Adapters alone are read by plain peft, with equal logits."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.demos import tiny_pretrained
from lightning_sft.export.adapter_folder import save_adapter
from lightning_sft.main import main
from lightning_sft.model.tuning.adapters import Lora
from lightning_sft.types import InputError
from tests.helpers.gradients import ROWS
from tests.model.tuning.test_adapters import lora_module

# peft 0.21 asks for a property of models that transformers 5.24 has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ROOT = Path(__file__).parents[2]
PAGES = [(ROOT / "docs" / "howto" / f"{name}.md").read_text(encoding="utf-8") for name in ("adapters", "quantized")]
IDS = torch.randint(250, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora": Lora(r=4, dora=True)},
        {"lora": Lora(r=4, rslora=True, targets=["q_proj"])},
        {"new_tokens": [f"<|{i}|>" for i in range(8)]},
    ],
    ids=["lora", "dora", "rslora", "new_tokens"],
)
def test_plain_peft_reads_them_with_equal_logits(tmp_path: Path, tied: bool, settings: dict[str, Any]) -> None:
    pretrained = tiny_pretrained(tmp_path / "base", tie_word_embeddings=tied)
    model = lora_module(pretrained, **settings).model
    save_adapter(model, tmp_path / "adapter", pretrained)
    base = AutoModelForCausalLM.from_pretrained(pretrained)
    ids = IDS.clone()
    if "new_tokens" in settings:
        base.resize_token_embeddings(model.config.vocab_size)
        ids[0, :3] = torch.tensor([259, 266, 261])
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-6)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 60_000


def test_the_python_of_the_page_runs(tmp_path: Path, pretrained: str, quiet_trainer: Any, monkeypatch: Any) -> None:
    [code] = re.findall(r"```python\n(.*?)```", PAGES[0], re.DOTALL)
    module = SFTModule(pretrained, lora=Lora(r=4))
    trainer = quiet_trainer(max_steps=1, enable_checkpointing=True)
    trainer.fit(module, SFTDataModule(train=ROWS))
    monkeypatch.chdir(tmp_path)
    Path("runs/lora/checkpoints").mkdir(parents=True)
    shutil.copy(trainer.checkpoint_callback.best_model_path, "runs/lora/checkpoints/resume-epoch=0-step=1.ckpt")
    exec(code, {})
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pretrained), "my-adapter").eval()
    assert torch.allclose(loaded(IDS).logits, module.eval().model(IDS).logits, atol=1e-6)


@pytest.mark.parametrize("line", re.findall(r"^lightning-sft fit ((?:.*\\\n)*.*)$", "".join(PAGES), re.MULTILINE))
def test_the_commands_of_the_page_are_real(line: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"model": {"pretrained": "HuggingFaceTB/SmolLM2-135M-Instruct"}, "data": {"train": "train.jsonl"}}
    Path("fit.yaml").write_text(json.dumps(given), encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(["fit", *shlex.split(line.replace("\\\n", " ")), "--print_config"])
    assert ended.value.code == 0
    assert "pretrained: HuggingFaceTB/SmolLM2-135M-Instruct" in capsys.readouterr().out


def test_what_peft_could_not_hold_is_refused(tmp_path: Path, pretrained: str) -> None:
    with pytest.raises(InputError, match=r"norm\.weight and 4 more parameters were trained"):
        save_adapter(lora_module(pretrained, trained=["*norm*"]).model, tmp_path, pretrained)
    with pytest.raises(InputError, match="has no adapters"):
        save_adapter(AutoModelForCausalLM.from_pretrained(pretrained), tmp_path, pretrained)
