from __future__ import annotations

import pathlib
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.checkpoints.reading import Checkpoint, check_index
from lightning_sft.export.convert import export_checkpoint
from lightning_sft.main import SFTCLI, main
from lightning_sft.strategies import FSDP2Strategy
from lightning_sft.types import InputError
from tests.helpers.exporting import TWO, ZERO, trained
from tests.helpers.payload import Payload


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, pretrained_for_two: str) -> Path:
    path = tmp_path_factory.mktemp("single") / "one.ckpt"
    trained(pretrained_for_two).save_checkpoint(path)
    return path


@pytest.mark.parametrize("name", [*TWO, *(pytest.param(name, marks=pytest.mark.slow) for name in ZERO)])
def test_weights_of_every_strategy_are_those_of_the_model_in_training_bit_for_bit(
    name: str, exports_of: Callable[[str], Path]
) -> None:
    out = exports_of(name)
    in_training = load_file(out / name / "final" / "model.safetensors")  # gathered on the ranks, by HFExport
    found = Checkpoint(out / f"{name}.ckpt").weights()
    assert found.keys() >= {f"scorer.model.{key}" for key in in_training}
    for key, value in in_training.items():
        assert torch.equal(found[f"scorer.model.{key}"], value), key
    facts = Checkpoint(out / f"{name}.ckpt").metadata
    assert facts["global_step"] == 3
    assert facts["hyper_parameters"]["hf_config"]["model_type"] == "llama"


@pytest.mark.parametrize("name", [*TWO, *(pytest.param(name, marks=pytest.mark.slow) for name in ZERO)])
def test_an_export_of_every_strategy_loads_with_the_logits_of_the_model_in_training(
    name: str, exports_of: Callable[[str], Path], tmp_path: Path
) -> None:
    out, ids = exports_of(name), torch.tensor([[1, 2, 3, 4]])
    exported = AutoModelForCausalLM.from_pretrained(export_checkpoint(str(out / f"{name}.ckpt"), str(tmp_path / "out")))
    in_training = AutoModelForCausalLM.from_pretrained(out / name / "final")
    assert torch.equal(exported(ids).logits, in_training(ids).logits)


@pytest.mark.parametrize("name", ["fsdp2", pytest.param("deepspeed2", marks=pytest.mark.slow)])
def test_one_process_validates_a_checkpoint_of_shards_and_refuses_to_resume_it(
    name: str,
    exports_of: Callable[[str], Path],
    tmp_path: Path,
    quiet_trainer: Callable[..., Trainer],
    rows: list[dict[str, str]],
    pretrained_for_two: str,
) -> None:
    path = exports_of(name) / f"{name}.ckpt"
    assert path.is_dir()
    exported, data = export_checkpoint(str(path), str(tmp_path / "out")), SFTDataModule(train=rows, val=rows)
    [found] = quiet_trainer().validate(SFTModule(pretrained_for_two), data, ckpt_path=path)
    [wanted] = quiet_trainer().validate(SFTModule(str(exported)), data)
    assert found["val/loss"] == wanted["val/loss"]
    with pytest.raises(InputError, match="was written by a strategy that shards the model"):
        quiet_trainer(max_epochs=9).fit(SFTModule(pretrained_for_two), data, ckpt_path=path)


def test_an_index_that_python_3_13_wrote_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, ``pathlib`` is a package, and paths say that they are of a module inside it."""
    monkeypatch.setitem(sys.modules, "pathlib._local", pathlib)
    (tmp_path / ".metadata").write_bytes(b"cpathlib._local\nPosixPath\n(S'part.distcp'\ntR.")
    check_index(tmp_path)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "callbacks": Payload(tmp_path / "run")}, tmp_path / "bad.ckpt")
    bad = Checkpoint(tmp_path / "bad.ckpt")
    for read in (lambda: bad.metadata, bad.weights):
        with pytest.raises(InputError, match=r"holds more than tensors and plain values.*was not loaded"):
            read()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_in_the_index_of_a_distributed_checkpoint_is_run(
    exports_of: Callable[[str], Path], tmp_path: Path, protocol: int
) -> None:
    bad = shutil.copytree(exports_of("fsdp2") / "fsdp2.ckpt", tmp_path / "bad.ckpt")
    (bad / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "run"), protocol=protocol))
    with pytest.raises(InputError, match=r"It refers to .*(getattr|Path.touch|touch)"):
        Checkpoint(bad).weights()
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process alone saves and loads, as it should
def test_nothing_in_a_shard_is_run_where_fit_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(strategy: object, path: Path, weights_only: bool | None) -> None:
        torch_checkpoint.load({"a": None}, checkpoint_id=path, no_dist=True)

    monkeypatch.setattr(ModelParallelStrategy, "load_checkpoint", load)  # what of it would run what it reads
    torch_checkpoint.save({"a": Payload(tmp_path / "run")}, checkpoint_id=tmp_path / "bad.ckpt", no_dist=True)
    with pytest.raises(InputError, match=r"bad.ckpt cannot be loaded: Unsupported global"):
        FSDP2Strategy().load_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "run").exists()
    ModelParallelStrategy().load_checkpoint(tmp_path / "bad.ckpt", None)
    assert (tmp_path / "run").exists()
    (tmp_path / "run").unlink()
    FSDP2Strategy().load_checkpoint(tmp_path / "bad.ckpt", weights_only=False)  # trusted, as the user says
    assert (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["mp_rank*_model_states.pt", "*_optim_states.pt"])
def test_nothing_in_a_checkpoint_of_deepspeed_is_run(
    exports_of: Callable[[str], Path], tmp_path: Path, pattern: str
) -> None:
    bad = shutil.copytree(exports_of("deepspeed2") / "deepspeed2.ckpt", tmp_path / "bad.ckpt")
    for file in (bad / "checkpoint").glob(pattern):
        torch.save(torch.load(file, weights_only=False) | {"more": Payload(tmp_path / "run")}, file)
    with pytest.raises(InputError, match=r"bad.ckpt"):
        Checkpoint(bad).weights()
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_cut_short_is_one_clear_error(
    exports_of: Callable[[str], Path], single: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(single.read_bytes()[: single.stat().st_size // 2])
    with pytest.raises(InputError, match=r"cut.ckpt cannot be read, it was cut short"):
        Checkpoint(cut).weights()
    bad = shutil.copytree(exports_of("fsdp2") / "fsdp2.ckpt", tmp_path / "bad.ckpt")
    shard = next(bad.glob("__1_*.distcp"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(InputError, match=r"bad.ckpt cannot be read, it may have been cut short"):
        Checkpoint(bad).weights()
    index = (bad / ".metadata").read_bytes()
    (bad / ".metadata").write_bytes(index[: len(index) // 2])
    with pytest.raises(InputError, match=r".metadata cannot be read, it may have been cut short"):
        Checkpoint(bad).weights()
    (bad / ".metadata").unlink()
    with pytest.raises(InputError, match=r"is not a complete checkpoint: it has no .metadata"):
        Checkpoint(bad).weights()
    with pytest.raises(InputError, match=r"There is no checkpoint 'nowhere.ckpt'"):
        _ = Checkpoint("nowhere.ckpt").kind


def test_the_architecture_is_that_of_the_checkpoint_also_of_a_distributed_one(
    exports_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, jsonl: Any, rows: Any
) -> None:
    monkeypatch.setattr(SFTCLI, "_run_subcommand", lambda self, name: None)
    path = str(exports_of("fsdp2") / "fsdp2.ckpt")
    flags = ["--model.pretrained", "/gone", "--data.val", jsonl(rows), "--trainer.accelerator", "cpu"]
    cli = main(["validate", *flags, "--trainer.default_root_dir", str(tmp_path), "--ckpt_path", path])
    assert cli.model.hf_config == Checkpoint(path).hyper_parameters["hf_config"]
