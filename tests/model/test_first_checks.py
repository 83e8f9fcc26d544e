"""What a fit needs besides its data is looked for first; a checkpoint that does not fit is refused from Python too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.optim import SGD, AdamW

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.demos import tiny_pretrained
from lightning_sft.model.tuning import adapters, quantization
from lightning_sft.model.tuning.adapters import Lora
from lightning_sft.training.optimizers import OptimizerPart
from lightning_sft.types import InputError

Make = Callable[..., Trainer]


class NoData(SFTDataModule):
    """Data that must not be read."""

    def prepare_data(self) -> None:
        raise AssertionError("data were encoded before packages were looked for")


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        (adapters, {}, r"model.lora needs peft: pip install 'lightning-sft\[peft\]'"),
        (quantization, {"quantize": "4bit"}, "model.quantize=4bit needs bitsandbytes, .* pip install"),
        (quantization, {"quantize": "8bit"}, "model.quantize=8bit needs torchao, .* pip install"),
    ],
    ids=["peft", "bitsandbytes", "torchao"],
)
def test_a_missing_package_is_said_before_data_are_encoded(
    pretrained: str,
    rows: Any,
    quiet_trainer: Make,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    settings: Any,
    message: str,
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=message):
        quiet_trainer().fit(SFTModule(pretrained, lora=Lora(r=2), **settings), NoData(train=rows))


@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile", "module.compile"])
def test_a_compiled_module_is_refused_before_data_are_encoded(
    pretrained: str, rows: Any, quiet_trainer: Make, in_place: bool
) -> None:
    module = SFTModule(pretrained)
    if in_place:
        module.compile(backend="eager")
    compiled: Any = module if in_place else torch.compile(module, backend="eager")
    with pytest.raises(InputError, match=r"torch.compile cannot trace .* with model.kernels=compiled"):
        quiet_trainer().fit(compiled, NoData(train=rows))


def test_liger_is_looked_for_before_data_are_encoded(
    pretrained: str, rows: Any, quiet_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_sft.model.kernels.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"model.kernels=liger is not available: it needs liger-kernel and triton"):
        quiet_trainer().fit(SFTModule(pretrained, kernels="liger"), NoData(train=rows))


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": partial(AdamW, lr=-1e-4)},
        {"optimizer": partial(AdamW, betas=(2, 0.9))},
        {"optimizers": [OptimizerPart(partial(SGD, lr=-1))]},
    ],
)
def test_settings_that_an_optimizer_does_not_take_are_refused_before_data_are_encoded(
    pretrained: str, rows: Any, quiet_trainer: Make, settings: Any
) -> None:
    with pytest.raises(InputError, match=r"does not take its parameters or settings: Invalid (learning rate: -|beta)"):
        quiet_trainer().fit(SFTModule(pretrained, **settings), NoData(train=rows))


def test_functions_of_users_are_called_for_the_model_alone(pretrained: str, rows: Any, quiet_trainer: Make) -> None:
    made: list[int] = []

    def make(groups: Any, lr: float) -> Any:
        made.append(len(groups))
        return AdamW(groups, lr=lr)

    quiet_trainer().fit(SFTModule(pretrained, optimizer=partial(make, lr=1e-4)), SFTDataModule(train=rows, cache=None))
    assert made == [2]


def test_a_damaged_checkpoint_is_one_error_when_a_module_is_loaded_from_it(
    pretrained: str, rows: Any, quiet_trainer: Make, tmp_path: Path
) -> None:
    trainer = quiet_trainer()
    trainer.fit(SFTModule(pretrained), SFTDataModule(train=rows, cache=None))
    trainer.save_checkpoint(path := tmp_path / "whole.ckpt")
    assert SFTModule.load_from_checkpoint(path, warmup=0.5).warmup == 0.5
    with pytest.raises(InputError, match=r"SFTModule has no argument 'warm'. Did you mean warmup\?"):
        SFTModule.load_from_checkpoint(path, warm=1)
    whole, other = path.read_bytes(), tmp_path / "other.ckpt"
    for content, said in ((whole[: len(whole) // 2], "cut short"), (b"", "is empty"), (b"hello", "none that torch")):
        other.write_bytes(content)
        with pytest.raises(InputError, match=rf"other.ckpt .*{said}"):
            SFTModule.load_from_checkpoint(other)


@pytest.fixture
def saved(pretrained: str, rows: Any, quiet_trainer: Make, tmp_path: Path) -> Path:
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(SFTModule(pretrained), SFTDataModule(train=rows))
    trainer.save_checkpoint(tmp_path / "good.ckpt")
    return tmp_path / "good.ckpt"


def without(key: str) -> Callable[[bytes, Path], bytes]:
    def change(content: bytes, path: Path) -> bytes:
        held = torch.load(path, weights_only=True)
        torch.save({name: value for name, value in held.items() if name != key}, path)
        return path.read_bytes()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content, path: content[: len(content) // 2], "odd.ckpt cannot be read, it was cut short"),
        (lambda content, path: b"", "odd.ckpt is not a checkpoint: the file is empty"),
        (lambda content, path: b"hello\n" * 99, "odd.ckpt is not a checkpoint: the file is none that torch has saved"),
        (lambda content, path: content[:900] + bytes(900) + content[1800:], "odd.ckpt cannot be read, it is damaged"),
        (without("state_dict"), "is not a checkpoint of a module: it has no 'state_dict'"),
    ],
    ids=["cut", "empty", "text", "damaged", "no weights"],
)
def test_a_damaged_checkpoint_is_one_message_from_python_too(
    pretrained: str, rows: Any, quiet_trainer: Make, saved: Path, change: Callable[[bytes, Path], bytes], message: str
) -> None:
    odd, content = saved.with_name("odd.ckpt"), saved.read_bytes()
    odd.write_bytes(change(content, saved))
    with pytest.raises(InputError, match=message):
        quiet_trainer().fit(SFTModule(pretrained), SFTDataModule(train=rows), ckpt_path=odd)
    with pytest.raises(InputError, match=message):
        quiet_trainer().validate(SFTModule(pretrained), SFTDataModule(val=rows), ckpt_path=odd)


def test_a_checkpoint_that_is_not_there_is_said_from_python_too(
    pretrained: str, rows: Any, quiet_trainer: Make
) -> None:
    with pytest.raises(InputError, match=r"There is no checkpoint 'nowhere.ckpt'"):
        quiet_trainer().fit(SFTModule(pretrained), SFTDataModule(train=rows), ckpt_path="nowhere.ckpt")


def test_the_checkpoint_of_another_model_is_refused_from_python_too(
    pretrained: str, rows: Any, quiet_trainer: Make, saved: Path, tmp_path: Path
) -> None:
    other = tiny_pretrained(tmp_path / "other", hidden_size=32)
    message = r"ckpt_path=.*good.ckpt is of a model with hidden_size=16, and model.pretrained=.*other has 32"
    with pytest.raises(InputError, match=message):
        quiet_trainer(max_steps=2).fit(SFTModule(other), SFTDataModule(train=rows), ckpt_path=saved)
    with pytest.raises(InputError, match=message):
        quiet_trainer().validate(SFTModule(other), SFTDataModule(val=rows), ckpt_path=saved)
    moved = SFTModule(tiny_pretrained(tmp_path / "moved"))
    quiet_trainer().validate(moved, SFTDataModule(val=rows), ckpt_path=saved)
