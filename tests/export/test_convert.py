from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lightning_sft.export.convert
from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.demos import CHATML, tiny_model, tiny_pretrained, tiny_tokenizer
from lightning_sft.export.convert import export_checkpoint
from lightning_sft.types import InputError
from tests.helpers.exporting import trained
from tests.helpers.gradients import QUIET, ROWS


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory, pretrained: str) -> str:
    """A checkpoint of a run whose validation data are a file."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    trained(pretrained, data={"val": str(folder / "val.jsonl")}).save_checkpoint(folder / "run.ckpt")
    return str(folder / "run.ckpt")


def parity_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "parity.json").read_text())
    return found


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_weights_exported_before_any_step_are_the_pretrained_ones_bit_for_bit(
    stored: torch.dtype, tmp_path: Path
) -> None:
    tiny_model().to(stored).save_pretrained(tmp_path / "pretrained")
    tiny_tokenizer().save_pretrained(tmp_path / "pretrained")
    trainer = Trainer(accelerator="cpu", **QUIET)
    trainer.validate(SFTModule(str(tmp_path / "pretrained")), SFTDataModule(val=ROWS), verbose=False)
    trainer.save_checkpoint(tmp_path / "before.ckpt")
    name: Any = str(stored).removeprefix("torch.")
    out = export_checkpoint(str(tmp_path / "before.ckpt"), str(tmp_path / "out"), dtype=name)
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "pretrained", out))
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype == stored
        assert torch.equal(value, after[key]), key


def test_an_export_is_compared_on_the_validation_data_and_says_so(ckpt: str, tmp_path: Path) -> None:
    out = export_checkpoint(ckpt, str(tmp_path / "out"))
    found = parity_of(out)
    assert found["passed"]
    assert found["rows"] == "8 rows of the run's validation data"
    assert found["models"] == [{"name": "reloaded", "mean_kl": 0.0, "max_kl": 0.0, "top1": 1.0}]
    assert "8 rows of the run's validation data" in (out / "README.md").read_text()


def test_a_run_of_relative_paths_is_exported_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for folder in (run, elsewhere):
        folder.mkdir()
    monkeypatch.chdir(run)
    tiny_pretrained(run / "models" / "base")
    Path("val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = {"val": "val.jsonl", "tokenizer": "models/base"}
    trained("models/base", data=data).save_checkpoint("run.ckpt")
    monkeypatch.chdir(elsewhere)
    found = parity_of(export_checkpoint("../run/run.ckpt", "out"))
    assert found["passed"]
    assert found["rows"] == "8 rows of the run's validation data"


def test_other_rows_can_be_given_and_without_any_there_are_built_in_ones(
    ckpt: str, pretrained: str, jsonl: Any, tmp_path: Path
) -> None:
    rows = jsonl([{"prompt": "a", "completion": "bcd"}])
    found = parity_of(export_checkpoint(ckpt, str(tmp_path / "given"), rows=rows))
    assert (found["rows"], found["targets"]) == (f"1 row of {rows}", 4)
    with pytest.raises(InputError, match=r"There is no data file 'nowhere.jsonl'"):
        export_checkpoint(ckpt, str(tmp_path / "other"), rows="nowhere.jsonl")
    trained(pretrained).save_checkpoint(tmp_path / "in_memory.ckpt")
    found = parity_of(export_checkpoint(str(tmp_path / "in_memory.ckpt"), str(tmp_path / "built_in")))
    assert found["rows"].startswith("a few built-in rows (the run had no validation data in files")


@pytest.mark.parametrize("named", [{"source": "{}/**/*.jsonl"}, {"source": "{}"}, {"files": ["{}/*.jsonl"]}])
def test_a_checkpoint_has_no_folder_searched_for_its_validation_data(
    ckpt: str, tmp_path: Path, named: dict[str, Any]
) -> None:
    (tmp_path / "private.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    evil = torch.load(ckpt, weights_only=True)
    [part] = evil["lightning_sft"]["data"]["val"]["parts"]
    del part["files"]
    part |= json.loads(json.dumps(named).replace("{}", str(tmp_path)))
    torch.save(evil, tmp_path / "evil.ckpt")
    found = parity_of(export_checkpoint(str(tmp_path / "evil.ckpt"), str(tmp_path / "out")))
    assert found["rows"].startswith("a few built-in rows (the run's validation data cannot be read: there is no file")


def test_a_pattern_that_a_run_was_given_is_known_by_its_files(pretrained: str, tmp_path: Path) -> None:
    for name in ("val-1", "val-2"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    trainer = trained(pretrained, data={"val": str(tmp_path / "val-*.jsonl")})
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    found = parity_of(export_checkpoint(str(tmp_path / "run.ckpt"), str(tmp_path / "out")))
    assert found["rows"] == "8 rows of the run's validation data"


def test_rounding_is_measured_and_said(ckpt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = export_checkpoint(ckpt, str(tmp_path / "out"), dtype="bfloat16")
    found = parity_of(out)
    assert (found["dtype"], found["rounded_from"]) == ("bfloat16", "float32")
    assert 0 < found["models"][0]["mean_kl"] < 1e-2
    assert not found["unequal_weights"]  # they are those that were to be written
    assert "rounded from float32 to bfloat16" in " ".join(capsys.readouterr().out.split())
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_an_export_that_does_not_pass_is_kept_under_another_name_and_is_an_error(ckpt: str, tmp_path: Path) -> None:
    names = ["out.failed", "out.failed-2"]
    for count, name in enumerate(names, 1):
        with pytest.raises(InputError, match=rf"is not the one that was trained: KL.* is in .*{name},"):
            export_checkpoint(ckpt, str(tmp_path / "out"), dtype="bfloat16", max_kl=1e-12)
        assert sorted(path.name for path in tmp_path.iterdir()) == names[:count]
        assert not parity_of(tmp_path / name)["passed"]


def test_an_export_that_does_not_pass_touches_no_folder_of_the_user(ckpt: str, tmp_path: Path) -> None:
    own = [tmp_path / name / "precious" for name in ("out.failed", ".out.unfinished", ".out.old")]
    for path in own:
        path.parent.mkdir()
        path.write_text("mine")
    with pytest.raises(InputError, match=r"out\.failed-2"):
        export_checkpoint(ckpt, str(tmp_path / "out"), dtype="bfloat16", max_kl=1e-12)
    assert [path.read_text() for path in own] == ["mine"] * 3
    export_checkpoint(ckpt, str(tmp_path / "out"))
    assert [path.read_text() for path in own] == ["mine"] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["out", "out.failed-2", *(path.parent.name for path in own)]
    )


def test_a_threshold_below_zero_is_refused(ckpt: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"export.max_kl is -1.0; expected a number >= 0"):
        export_checkpoint(ckpt, str(tmp_path / "out"), max_kl=-1.0)


def test_a_weight_that_is_written_wrong_is_found(ckpt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = lightning_sft.export.convert.write

    def wrong(model: Any, *args: Any) -> None:
        weight = model.model.norm.weight.data
        weight[0] = weight[0].nextafter(torch.tensor(9.0))
        write(model, *args)
        weight[0] = weight[0].nextafter(torch.tensor(-9.0))

    monkeypatch.setattr(lightning_sft.export.convert, "write", wrong)
    with pytest.raises(InputError, match=r"1 weights differ from those written: \['model.norm.weight'\]"):
        export_checkpoint(ckpt, str(tmp_path / "out"))


def test_a_template_that_is_written_wrong_is_found(ckpt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = lightning_sft.export.convert.write

    def wrong(model: Any, tokenizer: Any, folder: Path, *args: Any) -> None:
        write(model, tokenizer, folder, *args)
        (folder / "chat_template.jinja").write_text(CHATML.replace("+ m['content'] +", "+ m['content'] + ' ' +"))

    monkeypatch.setattr(lightning_sft.export.convert, "write", wrong)
    with pytest.raises(InputError, match=r"the tokenizer gives other ids than in the training for \['.*val.jsonl:1'"):
        export_checkpoint(ckpt, str(tmp_path / "out"))


def test_what_is_there_is_not_overwritten_and_what_is_no_checkpoint_of_ours_is_refused(
    ckpt: str, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    with pytest.raises(InputError, match="already exists"):
        export_checkpoint(ckpt, str(tmp_path / "out"))
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match="does not name its model"):
        export_checkpoint(str(tmp_path / "other.ckpt"), str(tmp_path / "new"))
    saved = torch.load(ckpt, weights_only=True)
    del saved["state_dict"]["scorer.model.model.norm.weight"]
    torch.save(saved, tmp_path / "lacking.ckpt")
    with pytest.raises(InputError, match=r"(?s)weights of the checkpoint do not match its model.*norm.weight"):
        export_checkpoint(str(tmp_path / "lacking.ckpt"), str(tmp_path / "new"))


def test_adapters_are_merged_and_compared(pretrained: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from lightning_sft.model.tuning.adapters import Lora

    trainer = trained(pretrained, model={"lora": Lora(r=4)})
    trainer.save_checkpoint(tmp_path / "lora.ckpt")
    out = export_checkpoint(str(tmp_path / "lora.ckpt"), str(tmp_path / "out"))
    assert [model["name"] for model in parity_of(out)["models"]] == ["merged", "reloaded"]
    ids = torch.tensor([[1, 2, 3]])
    in_training: Any = trainer.lightning_module
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert not [name for name in plain.state_dict() if "lora" in name]
    torch.testing.assert_close(plain(ids).logits, in_training.model.eval()(ids).logits, atol=1e-6, rtol=1e-5)
    untrained = AutoModelForCausalLM.from_pretrained(pretrained)
    assert not torch.allclose(plain(ids).logits, untrained(ids).logits, atol=1e-4)


def test_the_tokenizer_of_another_class_of_data_is_that_of_the_training(pretrained: str, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(CHATML + "{# mine #}")
    trainer = trained(pretrained, data={"chat_template": str(template)})
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    template.unlink()
    out = export_checkpoint(str(tmp_path / "a.ckpt"), str(tmp_path / "out"))
    assert AutoTokenizer.from_pretrained(out).chat_template.endswith("{# mine #}")
