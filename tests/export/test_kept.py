from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMultimodalLM

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import HFExport
from lightning_sft.export.convert import export_checkpoint
from lightning_sft.export.kept import PROCESSOR_FILES
from lightning_sft.model.backbone import language_model
from lightning_sft.model.pretrained import load_exported, outside_language_model
from lightning_sft.types import InputError
from tests.helpers.composites import COMPOSITES, composite
from tests.helpers.exporting import launch, trained
from tests.helpers.gradients import QUIET, ROWS

pytestmark = pytest.mark.filterwarnings("ignore:In this model, documents packed")  # Qwen3.5


def stored(folder: Path | str) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by its index if it has one."""
    index = Path(folder) / "model.safetensors.index.json"
    if not index.exists():
        return load_file(Path(folder) / "model.safetensors")
    places: dict[str, str] = json.loads(index.read_text())["weight_map"]
    files = {file: load_file(Path(folder) / file) for file in set(places.values())}
    assert {name: file for file, held in files.items() for name in held} == places
    return {name: files[file][name] for name, file in places.items()}


def add(folder: str, name: str) -> None:
    """Add a tensor to a file of weights."""
    path = Path(folder) / "model.safetensors"
    save_file(load_file(path) | {name: torch.randn(3, dtype=torch.bfloat16)}, path, metadata={"format": "pt"})


def check_kept(pretrained: str, out: Path) -> None:
    """Compare a folder with the checkpoint that was trained: the same model, of which only text has changed."""
    before, after = stored(pretrained), stored(out)
    assert before.keys() == after.keys()
    model = AutoModelForMultimodalLM.from_pretrained(pretrained)
    reloaded = AutoModelForMultimodalLM.from_pretrained(out)
    assert type(reloaded) is type(model)
    outside = outside_language_model(model)
    assert outside
    own, theirs = model.state_dict(), reloaded.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in outside)
    assert any(not torch.equal(own[name], theirs[name]) for name in own.keys() - set(outside))
    num_changed = sum(not torch.equal(before[name].double(), after[name].double()) for name in before)
    assert num_changed <= len(own) - len(outside)
    for name in PROCESSOR_FILES:
        assert (out / name).read_bytes() == (Path(pretrained) / name).read_bytes()
    one, two = (json.loads((Path(folder) / "config.json").read_text()) for folder in (pretrained, out))
    assert one["architectures"] == two["architectures"]
    kinds = [type(AutoConfig.from_pretrained(folder)) for folder in (pretrained, out)]
    assert kinds[0] is kinds[1]
    found = json.loads((out / "parity.json").read_text())
    assert found["passed"]
    assert found["unkept"] == []


@pytest.mark.parametrize("kind", COMPOSITES)
def test_an_export_is_the_whole_checkpoint_with_text_trained(kind: str, tmp_path: Path) -> None:
    pretrained = composite(tmp_path / "pretrained", kind)
    trained(pretrained, HFExport(str(tmp_path / "out")))
    check_kept(pretrained, tmp_path / "out/final")


@pytest.mark.parametrize("kind", COMPOSITES)
def test_before_any_step_an_export_is_the_pretrained_checkpoint_bit_for_bit(kind: str, tmp_path: Path) -> None:
    pretrained = composite(tmp_path / "pretrained", kind, torch.bfloat16)
    trainer = Trainer(accelerator="cpu", **QUIET)
    trainer.validate(SFTModule(pretrained), SFTDataModule(val=ROWS), verbose=False)
    trainer.save_checkpoint(tmp_path / "before.ckpt")
    before = stored(pretrained)
    after = stored(export_checkpoint(tmp_path / "before.ckpt", tmp_path / "out", dtype="bfloat16"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype, name
        assert torch.equal(value, after[name]), name


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen2_5_vl", "llama4", "gemma4"])
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_merged_into_the_language_model_alone(kind: str, dora: bool, tmp_path: Path) -> None:
    pretrained = composite(tmp_path / "pretrained", kind)
    lora = {"r": 2, "dora": dora, "base_dtype": "bfloat16"}  # rounds the base, but not what text does not use
    trainer = trained(pretrained, HFExport(str(tmp_path / "out"), max_kl=1e-2), model={"lora": lora})
    assert not [name for name in outside_language_model(trainer.lightning_module.model) if "lora" in name]
    check_kept(pretrained, tmp_path / "out/final")


def test_a_resumed_run_exports_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    pretrained = composite(tmp_path / "pretrained", "qwen2_5_vl")
    trained(pretrained, HFExport(str(tmp_path / "whole")), max_steps=4)
    trained(pretrained, max_steps=2).save_checkpoint(tmp_path / "half.ckpt")
    trained(pretrained, HFExport(str(tmp_path / "resumed")), max_steps=4, ckpt_path=str(tmp_path / "half.ckpt"))
    check_kept(pretrained, tmp_path / "resumed/final")
    whole, resumed = stored(tmp_path / "whole/final"), stored(tmp_path / "resumed/final")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_runs_of_two_processes_export_the_whole_checkpoint(tmp_path: Path) -> None:
    """DDP waits for no gradient of what text does not use, and shards of it are gathered."""
    pretrained, names = composite(tmp_path / "pretrained", "qwen2_5_vl"), ["ddp", "fsdp2", "fsdp2_lora"]
    launch(names, pretrained, tmp_path)
    for name in names:
        check_kept(pretrained, tmp_path / name / "final")
        out = export_checkpoint(tmp_path / f"{name}.ckpt", tmp_path / f"{name}.out")
        again, live = stored(out), stored(tmp_path / name / "final")
        assert all(torch.equal(live[key], again[key]) for key in live)


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_stored_tensors_that_transformers_does_not_load_are_kept(max_shard_size: str, tmp_path: Path) -> None:
    """Heads for several tokens of Qwen3.5."""
    pretrained = composite(tmp_path / "pretrained", "qwen3_5")
    add(pretrained, "mtp.fc.weight")
    trained(pretrained, HFExport(str(tmp_path / "out"), max_shard_size=max_shard_size))
    check_kept(pretrained, tmp_path / "out/final")
    before, after = (stored(folder)["mtp.fc.weight"] for folder in (pretrained, tmp_path / "out/final"))
    assert after.dtype == torch.bfloat16
    assert torch.equal(before, after)
    trained(str(tmp_path / "out/final"), HFExport(str(tmp_path / "again")))  # a folder with an index is a checkpoint
    check_kept(pretrained, tmp_path / "again/final")


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "gemma3", "mistral3"])
def test_names_in_the_files_may_be_those_of_another_version_of_transformers(kind: str, tmp_path: Path) -> None:
    pretrained = composite(tmp_path / "pretrained", kind)
    model = load_exported(pretrained)
    state = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    save_file(state, Path(pretrained) / "model.safetensors", metadata={"format": "pt"})
    trained(pretrained, HFExport(str(tmp_path / "out")))
    reloaded = load_exported(tmp_path / "out/final").state_dict()
    assert all(torch.equal(state[name], reloaded[name]) for name in outside_language_model(model))


def test_a_weight_that_is_lost_or_changed_fails_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrained = composite(tmp_path / "pretrained", "qwen3_5")
    add(pretrained, "mtp.fc.weight")
    trained(pretrained).save_checkpoint(tmp_path / "run.ckpt")
    monkeypatch.setattr("lightning_sft.export.convert.keep_files", lambda *_: None)
    with pytest.raises(InputError, match=r"1 weights of model.pretrained were not kept: \['mtp.fc.weight'\]"):
        export_checkpoint(tmp_path / "run.ckpt", tmp_path / "lost")
    monkeypatch.undo()

    def spoil(model: Any, parts: dict[str, torch.Tensor]) -> None:
        model.get_parameter(next(iter(parts))).data += 1

    monkeypatch.setattr("lightning_sft.export.convert.put_back", spoil)
    with pytest.raises(InputError, match=r"1 weights of model.pretrained were not kept: \['model.visual"):
        export_checkpoint(tmp_path / "run.ckpt", tmp_path / "changed")


def test_an_export_without_the_pretrained_checkpoint_says_what_it_needs(tmp_path: Path) -> None:
    pretrained = composite(tmp_path / "pretrained", "gemma3")
    trained(pretrained).save_checkpoint(tmp_path / "run.ckpt")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "pretrained" / name).unlink()
    with pytest.raises(InputError, match=r"an export reads them from model.pretrained. No causal language model can"):
        export_checkpoint(tmp_path / "run.ckpt", tmp_path / "out")


@pytest.mark.parametrize("kind", COMPOSITES)
def test_an_exported_model_answers(kind: str, tmp_path: Path) -> None:
    model = language_model(load_exported(composite(tmp_path, kind))).eval()
    ids = torch.tensor([[5, 6, 7]])
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    assert torch.equal(generated[0, :3], ids[0])
