from __future__ import annotations

from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.checkpoints.reading import RUN_INFO_KEY, Checkpoint
from lightning_sft.checkpoints.run_info import validation_data
from lightning_sft.data.rows.mixture import Mixture, Part
from lightning_sft.data.tokens.held_out import side_of
from lightning_sft.export.parity import held_out
from tests.helpers.exporting import trained


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    def save(trainer: Any) -> dict[str, Any]:
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        found: dict[str, Any] = Checkpoint(tmp_path / "a.ckpt").metadata[RUN_INFO_KEY]
        return found  # read with weights_only, so all of it is plain

    return save


def test_a_checkpoint_knows_its_data_figures_and_settings(pretrained: str, saved: Any, jsonl: Any) -> None:
    a = jsonl([{"prompt": f"{i}", "completion": "a"} for i in range(5)], "a.jsonl")
    talk = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    b = jsonl([{"messages": talk}, {"messages": talk}], "b.jsonl")
    mixture = Mixture({"one": Part(a, weight=2.0), "two": Part(b, format="chat")})
    trainer = trained(pretrained, data={"train": mixture, "val": a})
    found = saved(trainer)
    one, two = found["data"]["train"]["parts"]
    assert (one["name"], one["source"], one["rows"], one["sequences"], one["weight"]) == ("one", a, 5, 5, 2.0)
    assert (two["source"], two["rows"], two["format"]) == (b, 2, "chat")
    assert found["data"]["train"]["targets"] == 5 * 2 + 2 * 2
    assert found["step"] == trainer.global_step == 3
    assert found["metrics"]["val/loss"] == pytest.approx(trainer.callback_metrics["val/loss"].item())
    assert (found["optimizer"]["class"], found["optimizer"]["lr"]) == ("AdamW", 0.01)
    assert found["trainer"]["precision"] == "32-true"
    assert found["data_module"]["tokens_per_batch"] == 100
    assert found["versions"]["torch"] == version("torch")  # torch.__version__ may name a build too, as +cu130


def test_how_the_parts_of_a_mixture_are_shared_out_is_recorded(pretrained: str, saved: Any, jsonl: Any) -> None:
    path = jsonl([{"prompt": f"{i}", "completion": "a"} for i in range(5)], "a.jsonl")
    for settings in ({}, {"by": "targets", "temperature": 2.0}):
        mixture = Mixture({"one": path, "two": path}, **settings)
        facts = saved(trained(pretrained, data={"train": mixture, "val": path}))["data"]["train"]
        assert {key: facts[key] for key in ("by", "temperature") if key in facts} == settings


def test_validation_data_can_be_read_again_where_they_are_files(pretrained: str, saved: Any, jsonl: Any) -> None:
    path = jsonl([{"question": "a", "answer": "b"}])
    data = {"val": path, "train": path, "columns": {"prompt": "question", "completion": "answer"}}
    mixture, _, side = validation_data(saved(trained(pretrained, data=data)))
    assert mixture is not None
    [part] = mixture.of_name.values()
    assert (part.source, part.columns, side) == ([path], data["columns"], None)
    assert validation_data(saved(trained(pretrained))) is None  # rows in memory
    assert validation_data({}) is None


def test_a_share_of_the_training_data_is_read_again_as_that_share(pretrained: str, saved: Any, jsonl: Any) -> None:
    path = jsonl([{"prompt": f"a{i}", "completion": "b"} for i in range(60)])
    mixture, reading, side = validation_data(saved(trained(pretrained, data={"train": path, "val": "20%"})))
    found = held_out(mixture, reading, side, most=60)
    assert 0 < len(found) < 30
    assert all(side_of("val", 0.2).has(row) for row in found)


def test_how_many_rows_of_a_part_are_used_is_known_and_an_export_reads_no_others(
    pretrained: str, saved: Any, jsonl: Any
) -> None:
    path = jsonl([{"prompt": f"a{i}", "completion": "b"} for i in range(9)])
    data = Mixture({"few": Part(path, first=2), "all": Part(path)})
    facts = saved(trained(pretrained, data={"train": data, "val": data}))
    for split in ("train", "val"):
        few, whole = facts["data"][split]["parts"]
        assert (few["first"], few["rows"], "first" in whole, whole["rows"]) == (2, 2, False, 9)
    mixture, reading, side = validation_data(facts)
    assert [part.first for part in mixture.of_name.values()] == [2, None]
    found = held_out(mixture, reading, side, most=10)
    assert [row.messages[0]["content"] for row in found] == ["a0", "a1", "a0", "a1", "a2", "a3", "a4"]


def test_of_a_stream_no_rows_are_counted(pretrained: str, saved: Any, jsonl: Any) -> None:
    path = jsonl([{"prompt": f"{i}", "completion": "a"} for i in range(300)])
    found = saved(trained(pretrained, data={"train": path, "streaming": True, "num_workers": 0}))
    assert "rows" not in found["data"]["train"]["parts"][0]
    assert "targets" not in found["data"]["train"]


def test_loggers_get_the_optimizer_and_the_data(pretrained: str, jsonl: Any, tmp_path: Path) -> None:
    path = jsonl([{"prompt": f"{i}", "completion": "a"} for i in range(5)])
    trained(pretrained, data={"train": path}, logger=CSVLogger(str(tmp_path / "log"), "", ""))
    found = yaml.safe_load((tmp_path / "log" / "hparams.yaml").read_text())
    assert (found["optimizer"]["class"], found["optimizer"]["lr"]) == ("AdamW", 0.01)
    assert (found["data"]["train"]["parts"][0]["source"], found["data"]["train"]["parts"][0]["rows"]) == (path, 5)
    assert (found["data_module"]["tokens_per_batch"], found["pretrained"]) == (100, pretrained)


class Own(SFTModule):
    """As a user derives a module with an argument of its own."""

    def __init__(self, pretrained: str, beta: float = 0.1, **settings: Any) -> None:
        super().__init__(pretrained, **settings)
        self.save_hyperparameters("pretrained", "beta")


class OwnData(SFTDataModule):
    def __init__(self, train: Any, kind: str = "chat", seed: int = 3, **settings: Any) -> None:
        super().__init__(train, seed=seed, **settings)
        self.save_hyperparameters("kind", "train")


def shown_by_tensorboard(folder: Path) -> dict[str, Any]:
    """The hyperparameters that the HPARAMS tab shows: those of the first event of a session."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(folder)).Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    started = HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in started.items()}


@pytest.mark.parametrize("kinds", [(SFTModule, SFTDataModule), (Own, OwnData)])
def test_tensorboard_shows_everything_also_of_subclasses_that_save_hyperparameters(
    kinds: Any, pretrained: str, jsonl: Any, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    path, log = jsonl([{"prompt": f"{i}", "completion": "a"} for i in range(5)]), tmp_path / "log"
    log.mkdir()  # as the command line does, which saves config.yaml there
    module = kinds[0](pretrained, optimizer=partial(torch.optim.AdamW, lr=0.01))
    data = kinds[1](path, max_length=50, tokenizer=pretrained)
    settings: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1}
    for _ in range(2):  # a second fit of the same objects logs the same
        logger = TensorBoardLogger(str(log), "", "")
        Trainer(accelerator="cpu", logger=logger, enable_checkpointing=False, **settings).fit(module, data)
        found, shown = yaml.safe_load((log / "hparams.yaml").read_text()), shown_by_tensorboard(log)
        assert (found["optimizer"]["class"], found["optimizer"]["lr"], found["pretrained"]) == (
            "AdamW",
            0.01,
            pretrained,
        )
        assert (shown["optimizer/class"], shown["optimizer/lr"], shown["pretrained"]) == ("AdamW", 0.01, pretrained)
        assert (found["data_module"]["max_length"], shown["data_module/max_length"]) == (50, 50)
        assert path in shown.values(), shown
        if kinds[0] is Own:
            assert (found["beta"], shown["beta"], found["kind"], shown["kind"]) == (0.1, 0.1, "chat", "chat")
