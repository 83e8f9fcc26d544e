"""Checkpoints of adapters: small, checked, and enough to go on from, bit by bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.demos import tiny_pretrained
from lightning_sft.main import main
from lightning_sft.model.tuning.adapters import Lora
from lightning_sft.types import InputError
from tests.helpers.composites import composite
from tests.helpers.gradients import ROWS

Make = Callable[..., Trainer]
FAST = partial(AdamW, lr=1e-2)
Q = "scorer.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(250, (2, 20), generator=torch.Generator().manual_seed(0))


def fit(make: Make, pretrained: str, folder: Path, ckpt_path: Any = None, max_steps: int = 6, **settings: Any) -> Any:
    """Weights after six steps with dropout in the adapters, and a checkpoint after each third."""
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = make(max_steps=max_steps, max_epochs=-1, callbacks=[saver], enable_checkpointing=True)
    lora = settings.pop("lora", Lora(r=4, dropout=0.2))
    module = SFTModule(pretrained, lora=lora, optimizer=FAST, **settings)
    data = SFTDataModule(train=ROWS, tokens_per_batch=100, cache=None)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("tied", [False, True])
def test_a_run_goes_on_bit_by_bit_from_adapters_alone(tmp_path: Path, quiet_trainer: Make, tied: bool) -> None:
    pretrained = tiny_pretrained(tmp_path / "base", tie_word_embeddings=tied)
    settings = {"new_tokens": ["<|a|>"], "trained": ["*norm*"], "neftune_alpha": 5.0}
    whole = fit(quiet_trainer, pretrained, tmp_path / "one", **settings)
    ckpt = tmp_path / "one" / "step=3.ckpt"
    saved = torch.load(ckpt, weights_only=True)
    kinds = {name.split(".")[-1] if "lora" not in name else "lora" for name in saved["state_dict"]}
    assert kinds == {"lora", "new_rows", "weight"}
    assert not any(
        "_proj.base_layer" in name or name.endswith(("tokens.weight", "head.weight")) for name in saved["state_dict"]
    )
    assert saved["hyper_parameters"]["lora"]["r"] == 4
    resumed = fit(quiet_trainer, pretrained, tmp_path / "two", ckpt_path=ckpt, **settings)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not torch.equal(resumed[Q], saved["state_dict"][Q])


def test_a_checkpoint_loads_without_a_trainer_and_exports(
    tmp_path: Path, quiet_trainer: Make, ids: torch.Tensor, jsonl: Any
) -> None:
    pretrained = tiny_pretrained(tmp_path / "base")
    fit(quiet_trainer, pretrained, tmp_path / "run", max_steps=3, new_tokens=["<|a|>"])
    ckpt = tmp_path / "run" / "step=3.ckpt"
    module = SFTModule.load_from_checkpoint(ckpt, weights_only=True).eval()
    assert module.tuning.lora == Lora(r=4, dropout=0.2)
    out = main(["export", "--ckpt", str(ckpt), "--out", str(tmp_path / "out"), "--rows", jsonl(ROWS)])
    exported = AutoModelForCausalLM.from_pretrained(out)
    ids[0, 0] = 259
    assert torch.allclose(exported(ids).logits, module.model(ids).logits, atol=1e-5)
    assert AutoTokenizer.from_pretrained(out)("<|a|>")["input_ids"] == [259]
    shutil.rmtree(pretrained)
    with pytest.raises(InputError, match="No causal language model can be loaded"):
        SFTModule.load_from_checkpoint(ckpt, weights_only=True)
    moved = tiny_pretrained(tmp_path / "moved")
    SFTModule.load_from_checkpoint(ckpt, weights_only=True, pretrained=moved)
    for other, message in (
        ({"seed": 1}, "not those the adapters were trained on"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps: 1e-06 then, 0.001 now"),
    ):
        base = tiny_pretrained(tmp_path / message[:5], **other)
        with pytest.raises(InputError, match=message):
            SFTModule.load_from_checkpoint(ckpt, weights_only=True, pretrained=base)


def test_the_base_of_a_model_of_images_and_text_is_known_again_in_another_dtype(
    tmp_path: Path, quiet_trainer: Make
) -> None:
    """The configurations of its parts have a dtype, too."""
    trainer = quiet_trainer(max_steps=1, precision="bf16-true")
    trainer.fit(SFTModule(composite(tmp_path / "base", "gemma3"), lora=Lora(r=2)), SFTDataModule(train=ROWS))
    trainer.save_checkpoint(tmp_path / "adapters.ckpt")
    assert SFTModule.load_from_checkpoint(tmp_path / "adapters.ckpt", weights_only=True).dtype == torch.float32


def test_a_checkpoint_of_other_adapters_is_refused(tmp_path: Path, pretrained: str, quiet_trainer: Make) -> None:
    with_adapters, without = tmp_path / "with" / "step=3.ckpt", tmp_path / "without" / "step=3.ckpt"
    fit(quiet_trainer, pretrained, with_adapters.parent, max_steps=3)
    fit(quiet_trainer, pretrained, without.parent, max_steps=3, lora=None)
    again = partial(fit, quiet_trainer, pretrained, tmp_path / "again", max_steps=4)
    with pytest.raises(InputError, match="The checkpoint does not match the model"):
        again(ckpt_path=with_adapters, lora=Lora(r=8))
    with pytest.raises(InputError, match="The checkpoint does not match the model"):
        again(ckpt_path=with_adapters, trained=["*norm*"])
    with pytest.raises(InputError, match="is from a run with adapters"):
        again(ckpt_path=with_adapters, lora=None)
    with pytest.raises(InputError, match="is from a run without adapters"):
        again(ckpt_path=without)


def test_a_checkpoint_of_adapters_is_small(tmp_path: Path, quiet_trainer: Make) -> None:
    sizes = []
    pretrained = tiny_pretrained(tmp_path / "base", hidden_size=128, intermediate_size=512, head_dim=64)
    for lora in (None, Lora(r=2)):
        fit(quiet_trainer, pretrained, tmp_path / str(lora), max_steps=3, lora=lora)
        sizes.append((tmp_path / str(lora) / "step=3.ckpt").stat().st_size)
    assert sizes[1] < sizes[0] / 10


def test_the_command_line_takes_it_apart(tmp_path: Path, pretrained: str, jsonl: Any) -> None:
    quiet = {"logger": "false", "enable_progress_bar": "false", "enable_checkpointing": "true", "max_steps": "2"}
    quiet |= {"accelerator": "cpu", "default_root_dir": str(tmp_path), "enable_model_summary": "false"}
    flags = [text for key, value in quiet.items() for text in (f"--trainer.{key}", value)]
    flags += ["--model.pretrained", pretrained, "--data.train", jsonl(ROWS), "--model.lora.r", "4"]
    cli = main(["fit", *flags, "--model.lora.targets", "[q_proj, v_proj]"])
    assert cli.model.tuning.lora == Lora(r=4, targets=["q_proj", "v_proj"])
    [ckpt] = tmp_path.rglob("*.ckpt")
    saved = torch.load(ckpt, weights_only=True)["hyper_parameters"]
    assert saved["lora"] == {**saved["lora"], "r": 4, "alpha": 32, "targets": ["q_proj", "v_proj"]}
    again_flags = [*flags[:12], "--model.pretrained", pretrained, "--data.val", jsonl(ROWS), "--ckpt_path", str(ckpt)]
    again = main(["validate", *again_flags, "--model.lora", '{"r": 4, "targets": ["q_proj", "v_proj"]}'])
    wanted = cli.model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in again.model.state_dict().items())
