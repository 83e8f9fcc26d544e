"""What a fit needs besides its data is looked for first; a checkpoint that does not fit is refused from Python too."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.cli import LightningCLI
from torch.optim import SGD, AdamW

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.demos import tiny_pretrained
from lightning_sft.model.tuning import adapters, quantization
from lightning_sft.model.tuning.adapters import Lora
from lightning_sft.training.optimizers import OptimizerPart
from lightning_sft.types import InputError
from tests.helpers.gradients import ROWS

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


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optimizer": partial(AdamW, lr="1e-4")}, "lr is the string '1e-4': give the number, lr=0.0001"),
        ({"optimizers": [OptimizerPart(partial(AdamW, lr="1e-4"))]}, "lr is the string '1e-4'"),
        ({"optimizer": partial(AdamW, learning_rate=1e-4)}, r"keyword argument 'learning_rate'. Did you mean lr\?"),
        ({"optimizer": partial(AdamW, wieght_decay=1)}, r"'wieght_decay'. Did you mean weight_decay\?"),
        (
            {"optimizer": lambda: 1},
            r"does not take parameter groups: too many .* as functools.partial",
        ),
        ({"optimizer": lambda groups, lr: 1}, r"missing a required argument: 'lr'"),
    ],
)
def test_what_makes_no_optimizer_is_refused_before_data_are_encoded(
    pretrained: str, quiet_trainer: Make, settings: Any, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        quiet_trainer().fit(SFTModule(pretrained, **settings), NoData(train="nowhere.jsonl"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optimizer": lambda groups: None}, r"model.optimizer has made an object of type NoneType; expected an opt"),
        ({"optimizer": lambda groups: 1}, r"made an object of type int; .* as functools.partial\(torch.optim.AdamW"),
        ({"optimizer": lambda groups: 1 + None}, r"does not take its parameters or settings: unsupported operand"),
        ({"schedule": lambda optimizer: None}, r"model.schedule has made an object of type NoneType; expected a sch"),
    ],
)
def test_a_function_that_makes_something_else_is_one_error(
    pretrained: str, rows: Any, quiet_trainer: Make, settings: Any, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        quiet_trainer().fit(SFTModule(pretrained, **settings), SFTDataModule(train=rows, cache=None))


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


def test_a_path_that_is_no_checkpoint_file_is_one_error(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"There is no checkpoint 'nope.ckpt'. Give the path of a .ckpt file"):
        SFTModule.load_from_checkpoint("nope.ckpt")
    with pytest.raises(InputError, match=rf"{tmp_path} is a folder, and .* takes a .ckpt file, such as {saved}"):
        SFTModule.load_from_checkpoint(tmp_path)
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty is a folder, .* and there is none in it"):
        SFTModule.load_from_checkpoint(str(empty))
    (empty / ".metadata").touch()
    with pytest.raises(InputError, match=r"a sharding strategy has written.*lightning-sft export"):
        SFTModule.load_from_checkpoint(empty)


def said_in_a_fit(module: SFTModule, rows: Any, quiet_trainer: Make) -> list[str]:
    """What a fit of one step warns of optimizers and schedules."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        quiet_trainer(max_steps=1).fit(module, SFTDataModule(train=rows, cache=None))
    return [text for one in said if "optimizer" in (text := str(one.message)) or "schedule" in text]


def test_a_fit_from_a_checkpoint_says_where_its_optimizer_or_schedule_is_another(
    pretrained: str, rows: Any, quiet_trainer: Make, tmp_path: Path
) -> None:
    def saved(**settings: Any) -> Path:
        trainer = quiet_trainer(max_steps=1)
        trainer.fit(SFTModule(pretrained, **settings), SFTDataModule(train=rows, cache=None))
        trainer.save_checkpoint(path := tmp_path / "one.ckpt")
        return path

    path, load = saved(optimizer=partial(SGD, lr=0.125)), SFTModule.load_from_checkpoint
    [said] = said_in_a_fit(load(path), rows, quiet_trainer)
    assert "trained with SGD(lr=0.125, weight_decay=0), and this fit uses the default optimizer, AdamW(lr=2e-05" in said
    assert "load it with optimizer=functools.partial(torch.optim.SGD, lr=0.125" in said
    assert said_in_a_fit(load(path, optimizer=partial(AdamW, lr=0.5)), rows, quiet_trainer) == []
    path = saved(optimizer=partial(AdamW, lr=0.25, weight_decay=0.01, fused=True), warmup=0.5)
    [said] = said_in_a_fit(load(path), rows, quiet_trainer)
    assert "trained with AdamW(lr=0.25), and this fit uses the default optimizer, AdamW(lr=2e-05)" in said
    path = saved(schedule=partial(torch.optim.lr_scheduler.StepLR, step_size=2))
    [said] = said_in_a_fit(load(path), rows, quiet_trainer)
    assert "a scheduler of torch, which no checkpoint holds, and this fit uses schedule='cosine'" in said
    assert said_in_a_fit(load(path, schedule="cosine"), rows, quiet_trainer) == []
    assert said_in_a_fit(load(saved(warmup=0.5, schedule="linear")), rows, quiet_trainer) == []


@pytest.mark.filterwarnings("ignore:.*will be overridden by")
def test_lightnings_option_for_an_optimizer_is_refused_with_ours(
    pretrained: str, jsonl: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["--model.pretrained", pretrained, "--data.train", jsonl(rows), "--optimizer", "torch.optim.SGD"]
    monkeypatch.setattr("sys.argv", ["train.py", *args])
    with pytest.raises(InputError, match=r"Use --model.optimizer and --model.schedule instead"):
        LightningCLI(SFTModule, SFTDataModule, run=False, seed_everything_default=0, save_config_callback=None)


class OwnOptimizer(SFTModule):
    def configure_optimizers(self) -> Any:
        return AdamW(self.parameters(), lr=1e-4)


class OurOptimizer(SFTModule):
    def configure_optimizers(self) -> Any:
        return self.make_optimizer()


class OurSchedule(SFTModule):
    def configure_optimizers(self) -> Any:
        return super().configure_optimizers()


@pytest.mark.parametrize(
    ("kind", "settings", "unused"),
    [
        (OwnOptimizer, {}, ""),
        (OwnOptimizer, {"optimizer": partial(SGD, lr=1.0)}, "model.optimizer has no effect: "),
        (OwnOptimizer, {"optimizers": [OptimizerPart(partial(SGD, lr=1.0))]}, "model.optimizers has no effect: "),
        (OwnOptimizer, {"schedule": "linear", "warmup": 0.5}, "model.schedule and model.warmup have no effect: "),
        (OurOptimizer, {"optimizer": partial(SGD, lr=1.0), "warmup": 0.5}, "model.warmup has no effect: OurOptimizer"),
        (OurSchedule, {"optimizer": partial(SGD, lr=1.0), "warmup": 0.5, "schedule": "linear"}, ""),
        (SFTModule, {"optimizer": partial(SGD, lr=1.0), "warmup": 0.5, "schedule": "linear"}, ""),
    ],
)
def test_settings_that_an_override_does_not_use_are_said(
    pretrained: str, rows: Any, quiet_trainer: Make, kind: Any, settings: Any, unused: str
) -> None:
    said = [text for text in said_in_a_fit(kind(pretrained, **settings), rows, quiet_trainer) if "no effect" in text]
    assert [text[: len(unused)] for text in said] == ([unused] if unused else [])


def test_the_default_optimizer_of_a_command_line_is_none_that_is_given(
    pretrained: str, jsonl: Any, rows: Any, quiet_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for more, unused in (([], []), (["--model.optimizer.lr", "1e-3"], ["model.optimizer has no effect"])):
        args = ["train.py", "--model.pretrained", pretrained, "--data.train", jsonl(rows), *more]
        monkeypatch.setattr("sys.argv", args)
        module = LightningCLI(
            OwnOptimizer, SFTDataModule, run=False, seed_everything_default=0, save_config_callback=None
        ).model
        said = [text.partition(":")[0] for text in said_in_a_fit(module, rows, quiet_trainer) if "no effect" in text]
        assert said == unused


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


FREEZING: dict[str, Callable[[SFTModule], object]] = {
    "freeze": lambda module: module.freeze(),
    "requires_grad_": lambda module: module.requires_grad_(False),
    "named_parameters": lambda module: [p.requires_grad_(False) for _, p in module.named_parameters()],
}
CASTING: dict[str, Callable[[SFTModule], object]] = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "to": lambda module: module.to(torch.bfloat16),
    "type": lambda module: module.type(torch.float64),
}
SAID = {
    **dict.fromkeys(FREEZING, r"no parameters yet.*Freeze some with model\.frozen, or all others with model\.trained"),
    **dict.fromkeys(CASTING, r"no parameters yet, so a dtype has no effect on its weights\. Set trainer\.precision"),
}


@pytest.mark.parametrize("name", SAID)
def test_what_would_be_done_to_weights_that_are_not_loaded_is_warned_of_once(pretrained: str, name: str) -> None:
    done = (FREEZING | CASTING)[name]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        done(SFTModule(pretrained))
    assert [bool(re.search(SAID[name], str(one.message))) for one in said] == [True]
    module = SFTModule(pretrained)
    module.configure_model()
    with warnings.catch_warnings(action="error"):
        done(module)


def test_what_lightning_does_to_a_module_before_it_is_loaded_is_not_warned_of(
    pretrained: str, rows: list[dict[str, str]], quiet_trainer: Callable[..., Trainer]
) -> None:
    settings: dict[str, Any] = {"max_steps": 1, "enable_model_summary": True, "precision": "bf16-true"}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        SFTModule(pretrained).to("cpu").float().eval()
        quiet_trainer(**settings).fit(SFTModule(pretrained), SFTDataModule(rows, cache=None))
    assert not [str(one.message) for one in said if "no parameters yet" in str(one.message)]


def test_a_module_that_was_frozen_whole_is_told_so(
    pretrained: str, rows: list[dict[str, str]], quiet_trainer: Callable[..., Trainer]
) -> None:
    module = SFTModule(pretrained)
    module.configure_model()
    module.freeze()
    with pytest.raises(InputError, match=r"No parameter is trained: .*as after freeze\(\).*model\.frozen"):
        quiet_trainer(max_steps=1).fit(module, SFTDataModule(rows, cache=None))


@pytest.mark.parametrize(
    ("then", "now", "is_taken"),
    [("32-true", "bf16-true", False), ("64-true", "32-true", False), ("32-true", "bf16-mixed", True)],
)
def test_a_run_resumes_with_weights_of_the_same_dtype(
    pretrained: str, tmp_path: Path, quiet_trainer: Make, then: Any, now: Any, is_taken: bool
) -> None:
    data = {"train": ROWS, "tokens_per_batch": 128}
    first = quiet_trainer(precision=then, max_steps=1)
    first.fit(SFTModule(pretrained), SFTDataModule(**data))
    first.save_checkpoint(tmp_path / "a.ckpt")
    second = quiet_trainer(precision=now, max_steps=2)
    if not is_taken:
        with pytest.raises(InputError, match=rf"weights in float\d\d, and with trainer.precision={now} this run has"):
            second.fit(SFTModule(pretrained), SFTDataModule(**data), ckpt_path=tmp_path / "a.ckpt")
        second.validate(SFTModule(pretrained), SFTDataModule(**data, val=ROWS[:4]), ckpt_path=tmp_path / "a.ckpt")
    else:
        second.fit(SFTModule(pretrained), SFTDataModule(**data), ckpt_path=tmp_path / "a.ckpt")
        assert second.global_step == 2


# nothing is sharded here
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_a_run_with_averages_resumes_with_their_callback_alone(
    pretrained: str, tmp_path: Path, quiet_trainer: Make
) -> None:
    data = {"train": ROWS, "tokens_per_batch": 128}
    first = quiet_trainer(max_steps=1, callbacks=[EMAWeightAveraging()])
    first.fit(SFTModule(pretrained), SFTDataModule(**data))
    first.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=r"has averaged weights, and this run has no callback .* EMAWeightAveraging"):
        quiet_trainer(max_steps=2).fit(SFTModule(pretrained), SFTDataModule(**data), ckpt_path=tmp_path / "a.ckpt")
    second = quiet_trainer(max_steps=2, callbacks=[EMAWeightAveraging()])
    second.fit(SFTModule(pretrained), SFTDataModule(**data), ckpt_path=tmp_path / "a.ckpt")
    assert second.global_step == 2
