"""Runs of an older commit: their YAML, checkpoint and records, as it has written them.

tests/releases/5560a4a was made by `fit` at that commit, on tiny_pretrained() and the rows below, up to step 2 of 4.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_sft import SFTModule
from lightning_sft.demos import tiny_pretrained
from lightning_sft.main import main

OLD = Path(__file__).parent / "releases" / "5560a4a"
LOSSES = [5.616954, 5.605338, 5.604754, 5.618085]  # of steps 1 to 4, by the old commit
REPLACED = "model.compile_layers has been replaced: set model.kernels to none"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the old run, beside its model and data."""
    monkeypatch.chdir(tmp_path)
    tiny_pretrained("llama")
    for name in ("a", "b"):
        rows = [{"prompt": f"Say {name} {i}", "completion": f"{i} {name} it is"} for i in range(12)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    folder = Path("run")
    shutil.copytree(OLD, folder)
    (folder / "checkpoints").mkdir()
    next(folder.glob("*.ckpt")).rename(folder / "checkpoints" / "resume-epoch=0-step=2.ckpt")
    return folder


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # of torchao, imported by transformers
def test_a_run_of_an_older_commit_resumes_with_its_yaml(run: Path) -> None:
    with pytest.warns(UserWarning, match=REPLACED):
        main(["fit", "--config", str(run / "config.yaml"), "--trainer.max_steps=4", "--ckpt_path=last"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["train/loss"] for line in lines] == pytest.approx(LOSSES, abs=1e-4)


def test_a_checkpoint_of_an_older_commit_is_exported_and_loaded_from_python(run: Path) -> None:
    path = run / "checkpoints" / "resume-epoch=0-step=2.ckpt"
    main(["export", f"--ckpt={path}", "--out=exported"])
    with pytest.warns(UserWarning, match=REPLACED):
        module = SFTModule.load_from_checkpoint(path, weights_only=True)
    assert module.scorer is not None
    adapters = {name: value for name, value in module.state_dict().items() if "lora" in name}
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert adapters.keys() == saved.keys()
    assert all(torch.equal(adapters[name], saved[name]) for name in saved)
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in ("llama", "exported"))
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("old", "new"), [(True, "compiled"), (False, "none")])
def test_compile_layers_is_kernels(pretrained: str, old: bool, new: str) -> None:
    with pytest.warns(UserWarning, match=f"set model.kernels to {new}"):
        module = SFTModule(pretrained, compile_layers=old)
    assert module.kernels.asked == module.hparams["kernels"] == new
