"""Names of other trainers, and misspelt ones, are said where a class is made: of arguments and of overrides."""

from __future__ import annotations

import inspect
import pickle
import warnings
from typing import Any

import pytest
from lightning.pytorch import Trainer
from torch.optim import AdamW

from lightning_sft import Mixture, Part, SFTDataModule, SFTModule, callbacks
from lightning_sft.evaluation.generation import Sampling
from lightning_sft.io.closest import ELSEWHERE
from lightning_sft.model.tuning.adapters import Lora
from lightning_sft.training.optimizers import OptimizerPart
from lightning_sft.types import InputError


@pytest.mark.parametrize(
    ("make", "given", "said"),
    [
        (SFTModule, "lr", r"'lr'. It is .* SFTModule\(optimizer=functools.partial\(torch.optim.AdamW, lr=...\)\)"),
        (SFTModule, "weight_decay", "AdamW, weight_decay="),
        (SFTModule, "learning_rate", r"AdamW, lr=...\)"),
        (SFTModule, "lora_alpha", r"Did you mean SFTModule\(lora=Lora\(alpha=...\)\)\?"),
        (SFTModule, "peft_config", r"Did you mean lora\?"),
        (SFTModule, "batch_size", r"Did you mean SFTDataModule\(tokens_per_batch=...\)\?"),
        (SFTDataModule, "batch_size", r"SFTDataModule has no argument 'batch_size'. Did you mean tokens_per_batch\?"),
        (SFTDataModule, "epochs", r"Did you mean Trainer\(max_epochs=...\)\?"),
        (SFTDataModule, "precision", r"Did you mean Trainer\(precision=...\)\?"),
        (SFTDataModule, "lora", r"Did you mean SFTModule\(lora=...\)\?"),
        (SFTModule, "max_length", r"Did you mean SFTDataModule\(max_length=...\)\?"),
        (SFTModule, "model_name_or_path", r"Did you mean pretrained\?"),
        (SFTModule, "model", r"Did you mean pretrained\?"),
        (SFTModule, "num_steps", r"Did you mean Trainer\(max_steps=...\)\?"),
        (SFTDataModule, "validation", r"Did you mean val\?"),
        (SFTDataModule, "tokenizer_name", r"Did you mean tokenizer\?"),
        (SFTModule, "quantise", r"Did you mean quantize\?"),
        (SFTModule, "xyzzy", "It has pretrained, normalize, optimizer"),
    ],
)
def test_an_unknown_argument_is_one_error_with_the_right_one(make: Any, given: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make("m", **{given: 1})


@pytest.mark.parametrize(
    "kind", [*(getattr(callbacks, name) for name in callbacks.__all__), Lora, Mixture, OptimizerPart, Part, Sampling]
)
def test_no_class_of_ours_ends_in_a_type_error(kind: Any) -> None:
    with pytest.raises(InputError, match=rf"{kind.__name__} has no argument 'xyzzy'\. It has \w+"):
        kind(xyzzy=1)


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        (Lora, "rank", r"Did you mean r\?"),
        (Lora, "lora_alpha", r"Did you mean alpha\?"),
        (Lora, "lora_dropout", r"Did you mean dropout\?"),
        (Lora, "target_modules", r"Did you mean targets\?"),
        (Lora, "use_dora", r"Did you mean dora\?"),
        (Lora, "use_rslora", r"Did you mean rslora\?"),
        (Lora, "modules_to_save", r"Did you mean SFTModule\(trained=...\)\?"),
        (Part, "weigth", r"Did you mean weight\?"),
        (callbacks.SafeCheckpoint, "every_n_steps", r"Did you mean every_n_train_steps\?"),  # not HFExport's
        (SFTModule, "keep_last", r"Did you mean SafeCheckpoint\(keep_last=...\)\?"),
        (SFTModule, "r", r"Did you mean Lora\(r=...\)\?"),
        (callbacks.RunSummary, "depth", r"'depth'. It has none\."),
    ],
)
def test_an_argument_may_be_anothers_or_nearly_ones_own(kind: Any, given: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        kind(**{given: 1})


def test_signatures_and_pickles_are_as_they_were() -> None:
    assert list(inspect.signature(SFTModule).parameters)[:2] == ["pretrained", "normalize"]
    assert list(inspect.signature(SFTDataModule).parameters)[:2] == ["train", "val"]
    assert pickle.loads(pickle.dumps(SFTModule("m"))).pretrained == "m"

    class Own(SFTModule):
        def __init__(self, pretrained: str, beta: float, **settings: Any) -> None:
            super().__init__(pretrained, warmup=settings.pop("slowly"))

    assert Own("m", beta=1, slowly=0.5).warmup == 0.5


def overriding(base: Any, *names: str) -> list[str]:
    """What making an object of a subclass with these methods warns of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        type("Own", (base,), {name: lambda self, *args: None for name in names})("m")
    return [str(one.message) for one in said]


@pytest.mark.parametrize(
    ("base", "name", "ours"),
    [
        (SFTModule, "targets_loss", "target_loss"),
        (SFTModule, "target_los", "target_loss"),
        (SFTModule, "compute_loss", "target_loss"),
        (SFTModule, "training_loss", "target_loss"),
        (SFTModule, "loss_input", "loss_inputs"),
        (SFTModule, "on_train_epoch_ends", "on_train_epoch_end"),
        (SFTModule, "configure_optimizer", "configure_optimizers"),
        (SFTDataModule, "train_dataloder", "train_dataloader"),
    ],
)
def test_an_override_by_another_name_is_said_once(base: Any, name: str, ours: str) -> None:
    [said] = overriding(base, name)
    assert said.startswith(f"Own.{name} overrides nothing: ")
    assert said.endswith(f" Did you mean {ours}?")


def test_helpers_of_an_override_and_methods_of_other_names_are_not_said() -> None:
    for names in (
        ("target_losses", "target_loss"),
        ("compute_loss", "forward"),
        ("loss_fn", "training_step"),
        ("keep_best", "is_train", "log_step", "_target_los", "weights"),
        ("target_loss", "loss_inputs"),
    ):
        assert overriding(SFTModule, *names) == []


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_is_suggested_for_a_name_of_another_trainer_exists(name: str) -> None:
    section, _, setting = ELSEWHERE[name].partition(".")
    kind: Any = {"model": SFTModule, "data": SFTDataModule, "trainer": Trainer}[section]
    for part in setting.split("."):
        assert part in inspect.signature(kind).parameters
        kind = {"optimizer": AdamW, "lora": Lora}.get(part)
    with pytest.raises(InputError) as said:
        SFTModule("m", **{name: 1})
    assert f"{setting.rpartition('.')[2]}=..." in str(said.value) or f"Did you mean {setting}?" in str(said.value)


def test_settings_of_another_class_in_a_dictionary_are_said_too() -> None:
    for name, own in (("rank", "r"), ("lora_alpha", "alpha"), ("target_modules", "targets"), ("use_dora", "dora")):
        with pytest.raises(InputError, match=rf"Lora has no '{name}'; .* Did you mean {own}\?"):
            SFTModule("m", lora={name: 1})


@pytest.mark.parametrize("value", [16, True, "yes"])
def test_what_stands_for_settings_is_said_with_its_import(value: Any) -> None:
    with pytest.raises(InputError) as said:
        SFTModule("m", lora=value)
    assert "Give Lora(r=16) (from lightning_sft.model.tuning.adapters import Lora), or {'r': 16}." in str(said.value)
    with pytest.raises(InputError, match=r"Give Sampling\(temperature="):
        SFTModule("m", sampling=value)
