"""Restoring the model and the tokenizer of a checkpoint, in one process."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_sft.data.tokens.template_config import TemplateConfig, configure
from lightning_sft.io.words import listed
from lightning_sft.model.pretrained import plain_tokenizer
from lightning_sft.model.tuning.adapter_checkpoints import ADAPTERS_KEY
from lightning_sft.model.tuning.adapters import without_adapters
from lightning_sft.module import SFTModule
from lightning_sft.types import InputError

_MODEL = "scorer."  # with which the names begin of what SFTModule itself has in a checkpoint
_NAMED = 5  # maximum number of names in a message
Value = TypeVar("Value")


def restored(checkpoint: Mapping[str, Any]) -> PreTrainedModel:
    """The model of a checkpoint on the CPU, with its weights in the dtype of the checkpoint.

    Buffers and parameters that a subclass has beside the model are left out, and named.

    Raises:
        InputError: When it was not written by :class:`SFTModule`, or its weights do not match its architecture.
    """
    known = inspect.signature(SFTModule.__init__).parameters
    given = {name: value for name, value in settings_of(checkpoint).items() if name in known}
    # these may need a GPU or a training step, and do not affect weights
    of_training = dict.fromkeys(("attn_implementation", "compile_layers", "router_loss"))
    module = SFTModule(**given | of_training)
    module.configure_model()
    found = dict(checkpoint)
    if ADAPTERS_KEY in found:
        found[ADAPTERS_KEY] = found[ADAPTERS_KEY] | {"shapes": of_the_model(found[ADAPTERS_KEY]["shapes"])}
    found["state_dict"] = of_the_model(found["state_dict"])
    announce_left_out(checkpoint["state_dict"])
    module.on_load_checkpoint(found)
    try:
        module.load_state_dict(found["state_dict"], strict=module.strict_loading, assign=True)
    except RuntimeError as error:
        raise InputError(f"The weights of the checkpoint do not match its model: {error}") from error
    assert module.model is not None
    with without_adapters(module.model):
        module.model.tie_weights()  # a checkpoint may store tied weights twice
    return module.model


def of_the_model(by_name: Mapping[str, Value]) -> dict[str, Value]:
    """The entries of a module's ``state_dict`` that are the model's, not what a subclass has beside it."""
    return {name: value for name, value in by_name.items() if name.startswith(_MODEL)}


def announce_left_out(names: Iterable[str]) -> None:
    """Say which entries of a module's ``state_dict`` are left out.

    Args:
        names: Names of all entries.
    """
    if left_out := sorted(name for name in names if not name.startswith(_MODEL)):
        rank_zero_info(
            f"Left out, since the module has it beside the model: {listed(left_out, _NAMED)}. A model of transformers "
            "has no place for it."
        )


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast parameters and persistent buffers of a model, in place; computed tables such as RoPE's stay unchanged."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def tokenizer_of(facts: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, with the chat template of the training.

    Raises:
        InputError: When the tokenizer cannot be loaded, or the checkpoint was not written by :class:`SFTModule`.
    """
    states = (state for state in facts.values() if isinstance(state, dict) and "chat_template" in state)
    data: dict[str, Any] = next(states, {})  # its key is the name of the data module's class, which may be a subclass
    own = settings_of(facts)
    tokenizer = plain_tokenizer(data.get("tokenizer") or own["pretrained"], own.get("new_tokens") or ())
    tokenizer.chat_template = data.get("chat_template") or tokenizer.chat_template
    configure(tokenizer, TemplateConfig(**data.get("template", {})))
    return tokenizer


def settings_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of the module that wrote a checkpoint.

    Raises:
        InputError: When it was not written by :class:`SFTModule`.
    """
    found: dict[str, Any] = checkpoint.get("hyper_parameters", {})
    if not found.get("hf_config"):
        raise InputError("The checkpoint does not name its model (hf_config), so it was not written by SFTModule.")
    return found
