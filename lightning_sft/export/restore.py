"""Restoring the model and the tokenizer of a checkpoint, in one process."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_sft.data.tokens.template_config import TemplateConfig, configure
from lightning_sft.model.pretrained import plain_tokenizer
from lightning_sft.model.tuning.adapters import without_adapters
from lightning_sft.module import SFTModule
from lightning_sft.types import InputError


def restored(checkpoint: Mapping[str, Any]) -> PreTrainedModel:
    """The model of a checkpoint on the CPU, with its weights in the dtype of the checkpoint.

    Raises:
        InputError: When it was not written by :class:`SFTModule`, or its weights do not match its architecture.
    """
    known = inspect.signature(SFTModule.__init__).parameters
    given = {name: value for name, value in settings_of(checkpoint).items() if name in known}
    # these may need a GPU or a training step, and do not affect weights
    of_training = dict.fromkeys(("attn_implementation", "compile_layers", "router_loss"))
    module = SFTModule(**given | of_training)
    module.configure_model()
    module.on_load_checkpoint(dict(checkpoint))
    try:
        module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading, assign=True)
    except RuntimeError as error:
        raise InputError(f"The weights of the checkpoint do not match its model: {error}") from error
    assert module.model is not None
    with without_adapters(module.model):
        module.model.tie_weights()  # a checkpoint may store tied weights twice
    return module.model


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
