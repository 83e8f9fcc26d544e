"""Every argument of the two classes is an attribute; setting one afterwards has an effect or is refused."""

from __future__ import annotations

import pickle
import warnings
from copy import copy, deepcopy
from inspect import signature
from typing import Any

import pytest

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.types import InputError

ROWS = [{"prompt": f"Say {i}", "completion": f"{i} it is"} for i in range(12)]
MAY_CHANGE = {
    SFTDataModule: {"tokens_per_batch": 64, "seed": 3, "buffer_rows": 8, "num_workers": 2, "predict_batch_size": 4},
    SFTModule: {"optimizer": lambda groups: None, "max_new_tokens": 5},
}
_CODE = ("optimizers", "compile_layers")  # Lightning's method of this name, and an alias
ARGUMENTS = [(kind, name) for kind in MAY_CHANGE for name in signature(kind).parameters if name not in _CODE]


def of(kind: Any) -> Any:
    return SFTModule("nowhere") if kind is SFTModule else SFTDataModule(ROWS, tokens_per_batch=64, cache=None)


@pytest.mark.parametrize(("kind", "name"), ARGUMENTS)
def test_an_argument_is_an_attribute_that_is_refused_where_it_would_have_no_effect(kind: Any, name: str) -> None:
    made = of(kind)
    before = getattr(made, name)
    if name in MAY_CHANGE[kind]:
        setattr(made, name, MAY_CHANGE[kind][name])
        assert getattr(made, name) == MAY_CHANGE[kind][name]
        return
    with pytest.raises(InputError, match=rf"{kind.__name__}\.{name} cannot be set afterwards.*\(\.\.\., {name}=\.\.\."):
        setattr(made, name, before)
    assert getattr(made, name) is before


def test_arguments_are_read_as_they_were_given(pretrained: str) -> None:
    data = SFTDataModule(ROWS, val="5%", columns={"prompt": "prompt"}, train_on="last", thoughts="mask", cache=None)
    assert (data.train, data.val, data.train_on, data.thoughts) == (ROWS, "5%", "last", "mask")
    module = SFTModule(pretrained, lora={"r": 4}, frozen=["*.layers.0.*"])  # type: ignore[arg-type]  # as YAML has it
    assert module.lora is not None
    assert (module.lora.r, module.frozen, module.trained, module.quantize) == (4, ["*.layers.0.*"], [], None)


@pytest.mark.parametrize("copied", [copy, deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_copies_keep_what_is_settled(copied: Any) -> None:
    for kind, name in ((SFTDataModule, "max_length"), (SFTModule, "lora")):
        with pytest.raises(InputError, match="cannot be set afterwards"):
            setattr(copied(of(kind)), name, None)


def test_a_subclass_cannot_set_an_argument_after_the_constructor_either_but_attributes_of_its_own() -> None:
    class Own(SFTDataModule):
        def __init__(self, **settings: Any) -> None:
            self.seed = 5  # before, it is as any class has it
            super().__init__(**settings)
            self.batch_size = self.tokens_per_bacth = 7

    with warnings.catch_warnings(action="error"):
        assert Own(train=ROWS).batch_size == 7
    with pytest.raises(InputError, match=r"SFTDataModule\.packing"):
        Own(train=ROWS).packing = "padded"


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        (SFTDataModule, "tokens_per_bacth", r"Did you mean data\.tokens_per_batch\?"),
        (SFTDataModule, "batch_size", r"Did you mean data\.tokens_per_batch\?"),
        (SFTModule, "lr", r"Did you mean model\.optimizer\.lr\?"),
        (SFTModule, "max_new_token", r"Did you mean model\.max_new_tokens\?"),
    ],
)
def test_a_misspelt_attribute_is_warned_of(kind: Any, name: str, said: str) -> None:
    with pytest.warns(UserWarning, match=said):
        setattr(of(kind), name, 3)


def test_other_attributes_are_nobodys_business() -> None:
    with warnings.catch_warnings(action="error"):
        for kind in MAY_CHANGE:
            made = of(kind)
            made.my_own, made.learning_rate, made.dataset_name = 1, 1e-3, "mine"


@pytest.mark.parametrize(("kind", "name", "value"), [(SFTDataModule, "seed", -1), (SFTModule, "max_new_tokens", 0)])
def test_a_later_value_is_checked_as_in_the_constructor(kind: Any, name: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"\.{name} is {value}; expected an integer >= "):
        setattr(of(kind), name, value)


def test_checkpoints_say_the_later_value() -> None:
    module = of(SFTModule)
    module.max_new_tokens = 5
    assert module.hparams["max_new_tokens"] == 5


def test_a_later_seed_is_that_of_the_next_loader(pretrained: str) -> None:
    orders = []
    for seed in (0, 3):
        data = SFTDataModule(ROWS, tokenizer=pretrained, tokens_per_batch=64, cache=None, seed=seed)
        data.setup("fit")
        orders.append([batch.input_ids.tolist() for batch in data.train_dataloader()])
    data = SFTDataModule(ROWS, tokenizer=pretrained, tokens_per_batch=64, cache=None)
    data.setup("fit")
    assert [batch.input_ids.tolist() for batch in data.train_dataloader()] == orders[0] != orders[1]
    data.seed = 3
    assert [batch.input_ids.tolist() for batch in data.train_dataloader()] == orders[1]
