from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

import lightning_sft.callbacks.hf_export
from lightning_sft.callbacks import HFExport
from lightning_sft.callbacks.checkpoint import BestCheckpoint, SafeCheckpoint
from lightning_sft.main import main
from lightning_sft.types import InputError
from tests.helpers.exporting import TWO, ZERO, trained

IDS = torch.tensor([[1, 2, 3]])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", [*TWO, *(pytest.param(name, marks=pytest.mark.slow) for name in ZERO)])
def test_under_every_strategy_a_folder_is_what_two_processes_train(
    name: str, exports_of: Callable[[str], Path]
) -> None:
    out = exports_of(name) / name
    assert names(out) == ["final", "step-2"]
    for folder in out.iterdir():
        found = json.loads((folder / "parity.json").read_text())
        assert found["passed"]
        assert found["live"] < 1e-5  # log Pr under the strategy, as the folder has it on one process
        [reloaded] = found["models"]
        assert reloaded["name"] == "reloaded"
        assert reloaded["max_kl"] < 1e-12  # 0 where this processor sums in the order of the shards
        assert reloaded["top1"] == 1.0
    first, last = (AutoModelForCausalLM.from_pretrained(out / step)(IDS).logits for step in ("step-2", "final"))
    assert not torch.equal(first, last)


def test_what_fails_on_the_first_rank_reaches_all(exports_of: Callable[[str], Path]) -> None:
    out = exports_of("ddp")
    assert "InputError: The exported model is not the one that was trained" in (out / "failing.rank0").read_text()
    assert (out / "failing.rank1").read_text().startswith("InputError: Rank 0 failed while this rank waited for it.")
    assert names(out / "failing") == ["final.failed"]


def test_a_folder_has_the_model_and_the_template_of_the_training(pretrained: str, tmp_path: Path) -> None:
    trainer = trained(pretrained, HFExport(str(tmp_path / "out")))
    out, module = tmp_path / "out" / "final", trainer.lightning_module
    assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(IDS).logits, module.model.eval()(IDS).logits)
    assert AutoTokenizer.from_pretrained(out).chat_template == trainer.datamodule.tokenizer.chat_template
    card = (out / "README.md").read_text()
    for part in ("| train | rows in memory | 12 | 12 |", "| train/loss |", "## Metrics at step 3", "class: AdamW"):
        assert part in card


def test_exports_change_nothing_about_the_training(pretrained: str, tmp_path: Path) -> None:
    def weights(export: HFExport | None) -> dict[str, Any]:
        torch.manual_seed(7)
        model = {"neftune_alpha": 5.0}  # draws random numbers in every step
        state: dict[str, Any] = trained(pretrained, export, model=model).lightning_module.state_dict()
        return state

    without, exporting = weights(None), weights(HFExport(str(tmp_path / "out"), every_n_steps=1))
    assert names(tmp_path / "out") == ["final", "step-1", "step-2", "step-3"]
    assert all(torch.equal(value, exporting[key]) for key, value in without.items())


def test_adapters_are_merged(pretrained: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from lightning_sft.model.tuning.adapters import Lora

    trainer = trained(pretrained, HFExport(str(tmp_path / "out")), model={"lora": Lora(r=4)})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final")
    live = trainer.lightning_module.model.eval()
    assert hasattr(live, "peft_config")  # the one in training still has them
    torch.testing.assert_close(plain(IDS).logits, live(IDS).logits, atol=1e-6, rtol=1e-5)


def test_the_best_checkpoint_is_exported_when_the_training_has_ended(pretrained: str, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "ckpt", monitor="lr", mode="max", every_n_train_steps=1)
    newest = SafeCheckpoint(tmp_path / "newest")  # which is listed first, and whose best_model_path is the newest
    export = HFExport(str(tmp_path / "out"), at_end=False, best=True)
    trained(pretrained, export, callbacks=[newest, saver], enable_checkpointing=True)
    saved = torch.load(saver.best_model_path, weights_only=True)["state_dict"]
    assert names(tmp_path / "out") == ["best"]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "best").state_dict()
    assert all(torch.equal(value, saved[f"scorer.model.{key}"]) for key, value in exported.items())
    with pytest.warns(UserWarning, match=r"HFExport\(best=True\) has no effect"):
        trained(pretrained, HFExport(str(tmp_path / "none"), at_end=False, best=True))


def test_the_best_checkpoint_is_not_the_last_one_though_that_is_saved_by_a_callback_before(
    pretrained: str, tmp_path: Path
) -> None:
    savers = [SafeCheckpoint(tmp_path / "ckpt"), BestCheckpoint(tmp_path / "ckpt", monitor="lr")]  # of the first step
    export = HFExport(str(tmp_path / "out"), at_end=False, best=True)
    trained(pretrained, export, callbacks=savers, enable_checkpointing=True, val_check_interval=1)
    saved = torch.load(tmp_path / "ckpt" / "best.ckpt", weights_only=True)
    assert saved["global_step"] == 1
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "best").state_dict()
    assert all(torch.equal(value, saved["state_dict"][f"scorer.model.{key}"]) for key, value in exported.items())


def test_a_folder_that_is_in_use_is_refused_before_the_first_step(pretrained: str, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("")
    steps: list[int] = []

    class Steps(ModelCheckpoint):
        def on_train_batch_start(self, *args: Any) -> None:
            steps.append(1)

    with pytest.raises(InputError, match="already exists"):
        trained(pretrained, HFExport(str(tmp_path)), callbacks=[Steps(tmp_path)], enable_checkpointing=True)
    with pytest.raises(InputError, match="There is no data file"):
        trained(pretrained, HFExport(str(tmp_path / "new"), rows="nowhere.jsonl"))
    assert not steps
    with pytest.raises(InputError, match=r"HFExport.every_n_steps is 0; expected an integer >= 1"):
        HFExport(every_n_steps=0)


def test_an_export_that_fails_on_the_way_is_a_warning_and_at_the_end_an_error_after_the_last_checkpoint(
    pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(lightning_sft.callbacks.hf_export, "convert", full)
    saver = ModelCheckpoint(tmp_path / "ckpt", save_last=True, every_n_train_steps=3)
    export = HFExport(str(tmp_path / "out"), every_n_steps=2)
    goes_on = pytest.warns(UserWarning, match=r"Step 2 was not exported; training continues\. no space")
    with goes_on, pytest.raises(OSError, match="no space left"):
        trained(pretrained, export, callbacks=[saver], enable_checkpointing=True)
    assert (tmp_path / "ckpt" / "last.ckpt").is_file()


def test_an_export_that_failed_at_the_end_is_made_when_the_run_is_resumed(
    pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    def fit(best: bool, ckpt_path: str | None = None) -> Trainer:
        saver = ModelCheckpoint(tmp_path / "ckpt", monitor="lr", save_last=True, every_n_train_steps=3)
        export = HFExport(str(tmp_path / "out"), best=best)
        return trained(pretrained, export, callbacks=[saver], enable_checkpointing=True, ckpt_path=ckpt_path)

    with monkeypatch.context() as patch:
        patch.setattr(lightning_sft.callbacks.hf_export, "convert", full)
        with pytest.raises(OSError, match="no space left"):
            fit(best=False)
    last = str(tmp_path / "ckpt" / "last.ckpt")
    model = fit(best=False, ckpt_path=last).lightning_module.model.eval()
    assert names(tmp_path / "out") == ["final"]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final")(IDS).logits, model(IDS).logits)
    (tmp_path / "out" / "final" / "mine").write_text("")
    fit(best=True, ckpt_path=last)
    assert names(tmp_path / "out") == ["best", "final"]
    assert (tmp_path / "out" / "final" / "mine").exists()  # it was there: it is not written again


def test_the_config_of_the_page_runs(
    pretrained: str, tmp_path: Path, jsonl: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "howto" / "export.md").read_text(encoding="utf-8")
    [config] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "page.yaml").write_text(config)
    flags = ["--model.pretrained", pretrained, "--data.train", jsonl(rows), "--data.val", jsonl(rows)]
    main(["fit", "--config", "page.yaml", *flags, "--trainer.accelerator", "cpu"])
    assert names(tmp_path / "exports") == ["best", "final"]


def test_a_trial_run_writes_nothing(pretrained: str, tmp_path: Path) -> None:
    trained(pretrained, HFExport(str(tmp_path / "out"), every_n_steps=1, best=True), fast_dev_run=True)
    assert not (tmp_path / "out").exists()
