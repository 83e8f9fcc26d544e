"""Loading of pretrained models and tokenizers: the only `from_pretrained` calls of the library."""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import safe_open
from tokenizers import AddedToken
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    dynamic_module_utils,
)

from lightning_sft.data.tokens.template_config import configure, configured
from lightning_sft.io.hub import check_reachable
from lightning_sft.model.tuning.base_dtype import weight_files
from lightning_sft.model.tuning.prequantized import Prequantized
from lightning_sft.types import InputError


def load_model(
    pretrained: str | Path,
    attn_implementation: str | None = None,
    quantization: Any = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Load a pretrained causal language model, in training mode; one of images and text, say, is loaded as a whole.

    The dtype defaults to torch's: float32, or the dtype that Lightning's ``precision`` sets while it calls
    ``configure_model`` (``bf16-true``, ``64-true``). Master weights are thus not rounded because a checkpoint is stored
    in bfloat16.

    Args:
        pretrained: A hub name, a folder, or a GGUF file (which is dequantized).
        attn_implementation: Attention implementation of transformers; ``None`` lets transformers choose.
        quantization: Quantization config, see :mod:`lightning_sft.model.tuning.quantization`.
        dtype: Dtype of the parameters; torch's default dtype if ``None``.

    Raises:
        InputError: When the model does not exist, is not a causal language model, or would be loaded only in part.
    """
    pretrained = str(pretrained)
    given = {"attn_implementation": attn_implementation, "quantization_config": quantization}
    kwargs: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    kwargs["dtype"] = dtype or torch.get_default_dtype()
    auto_class = _auto_class(pretrained)
    prequantized = stored_quantization(pretrained)
    if prequantized is None or quantization is not None:
        model, info = _load(auto_class, pretrained, "causal language model", output_loading_info=True, **kwargs)
    else:
        model, info = _load_prequantized(auto_class, pretrained, prequantized, **kwargs)
    if model.config.is_encoder_decoder:
        raise InputError(
            f"{pretrained!r} is an encoder-decoder ({type(model).__name__}), not a causal language model. Use a "
            "decoder-only model."
        )
    check_whole(model, pretrained, info)
    if pretrained.endswith(".gguf"):  # the weights are plain tensors now; the marker would prevent saving them
        del model.hf_quantizer, model.config.quantization_config
    return _prepare(model)


def model_from_config(config: dict[str, Any], attn_implementation: str | None = None) -> PreTrainedModel:
    """Build the architecture described by :func:`config_dict` with random weights, to be filled from a checkpoint.

    Raises:
        InputError: When transformers has no such architecture; remote code named by the config is not run.
    """
    kwargs = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    dtype = torch.get_default_dtype()
    try:
        with _no_foreign_code():
            built = AutoConfig.for_model(**_decoded(config))
            model = _class_for(built).from_config(built, dtype=dtype, trust_remote_code=False, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers validates few values, so anything may be raised
        raise InputError(
            f"The model's configuration (hf_config) does not describe a causal language model of transformers "
            f"{transformers.__version__}: {' '.join(str(error).split())[:500]}"
        ) from error
    return _prepare(model)


def config_dict(model: PreTrainedModel) -> dict[str, Any]:
    """The model's configuration as plain values, for the hyperparameters of a checkpoint."""
    plain: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    return plain


def _decoded(plain: Any) -> Any:
    """Plain values with infinities, as Mamba's steps have for a limit; transformers writes dictionaries for them."""
    if isinstance(plain, list):
        return [_decoded(value) for value in plain]
    if not isinstance(plain, dict):
        return plain
    if plain.keys() == {"__float__"}:
        return float(plain["__float__"])
    return {key: _decoded(value) for key, value in plain.items()}


def load_architecture(pretrained: str) -> dict[str, Any]:
    """The configuration of a pretrained model as plain values, without reading its weights.

    Raises:
        InputError: When there is no model configuration.
    """
    config = _load(AutoConfig, pretrained, "model configuration")
    plain: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return plain


def stored_quantization(pretrained: str) -> Prequantized | None:
    """How the weights of a pretrained model are quantized; ``None`` for plain weights and GGUF files.

    Raises:
        InputError: When there is no model configuration.
    """
    if pretrained.endswith(".gguf"):
        return None
    return Prequantized.of(_load(AutoConfig, pretrained, "causal language model"))


def load_tokenizer(
    pretrained: str | Path, chat_template: str | Path | None = None, new_tokens: Sequence[str] = ()
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a pretrained model, with a chat template.

    Conversations are rendered for it as in the training of an exported folder.

    Args:
        pretrained: A hub name, a folder, or a GGUF file.
        chat_template: A Jinja file to use instead of the tokenizer's own template.
        new_tokens: Special tokens to add.

    Raises:
        InputError: When there is no tokenizer, no file ``chat_template``, or no chat template at all.
    """
    tokenizer = plain_tokenizer(pretrained, new_tokens)
    if chat_template is not None:
        path = Path(chat_template)
        if not path.is_file():
            raise InputError(
                f"There is no chat template file {str(chat_template)!r}. data.chat_template takes a Jinja file."
            )
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        raise InputError(
            f"The tokenizer of {str(pretrained)!r} has no chat template, so conversations cannot be rendered. "
            "Give one with data.chat_template=FILE.jinja, or start from an instruction-tuned model."
        )
    configure(tokenizer, replace(configured(tokenizer), stop_ids=stop_ids(str(pretrained))))
    return tokenizer


def plain_tokenizer(pretrained: str | Path, new_tokens: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a pretrained model, with or without a chat template.

    Raises:
        InputError: When there is no tokenizer.
    """
    tokenizer: PreTrainedTokenizerBase = _load(AutoTokenizer, str(pretrained), "tokenizer")
    for name in [name for name, token in tokenizer.special_tokens_map.items() if not token]:
        setattr(tokenizer, name, None)  # an empty text is no token: transformers looks it up without end
    if new_tokens:
        added = [AddedToken(token, special=True, normalized=False) for token in new_tokens]
        tokenizer.add_tokens(added, special_tokens=True)
    return tokenizer


def new_token_ids(pretrained: str, new_tokens: Sequence[str]) -> tuple[list[int], int]:
    """The ids of tokens after adding them to the tokenizer of a model, and the size of the tokenizer before that."""
    tokenizer = plain_tokenizer(pretrained, new_tokens)
    return cast(list[int], tokenizer.convert_tokens_to_ids(list(new_tokens))), len(plain_tokenizer(pretrained))


def load_exported(folder: str | Path) -> PreTrainedModel:
    """Load the model of a folder as a user of transformers would: in the dtype that it is stored in."""
    return cast(PreTrainedModel, _load(_auto_class(str(folder)), str(folder), "causal language model", dtype="auto"))


def stop_ids(pretrained: str) -> tuple[int, ...]:
    """Ids of the tokens that generation stops at, by the published generation config of a model; none without one."""
    try:
        generation = load_generation_config(pretrained)
    except Exception:  # of a damaged file: who loads the model says so
        return ()
    found = None if generation is None else generation.eos_token_id
    ids: list[int] = found if isinstance(found, list) else [] if found is None else [found]
    return tuple(ids)


def load_generation_config(pretrained: str) -> GenerationConfig | None:
    """The published generation config of a pretrained model, or ``None`` if it has none or no longer exists."""
    try:
        return GenerationConfig.from_pretrained(str(Path(pretrained).expanduser()))
    except (OSError, ValueError):
        return None


def context_length(pretrained: str) -> int | None:
    """Maximum number of positions according to the model's config, or ``None`` if it does not say."""
    return trained_positions(_load(AutoConfig, pretrained, "model configuration"))


def trained_positions(config: PretrainedConfig) -> int | None:
    """Maximum number of positions according to a config, or ``None`` if it does not say."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


def names_kept_in_float32(model: PreTrainedModel) -> re.Pattern[str] | None:
    """Pattern of the names of tensors that transformers keeps in float32 when it loads a model in bfloat16."""
    names = getattr(model, "_keep_in_fp32_modules_strict", None)
    return re.compile("|".join(re.escape(name).replace(r"\*", ".*") for name in sorted(names))) if names else None


_COMPUTED = re.compile(r"(attn|attention)\.(masked_)?bias$|(inv_freq|causal_mask|position_ids|version)$")
"""Names of tensors stored by older versions of transformers that are computed today."""


def check_whole(model: PreTrainedModel, pretrained: str, info: dict[str, Any]) -> None:
    """Refuse a checkpoint that lacks weights of the model, or has parts that are not of its architecture.

    An export would lack such parts. Parts that an architecture passes over on purpose are kept by the export, see
    :func:`passed_over`.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if missing := sorted(parameters & set(info["missing_keys"])):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{pretrained!r} has no weights for {missing[0]}{more}; they would be initialized at random. Use a "
            "complete checkpoint of a causal language model."
        )
    names = [name.split(".") for name in model.state_dict()]
    modules = {".".join(parts[:end]) for parts in names for end in range(len(parts))}
    found = Counter(_part(name, modules) for name in info["unexpected_keys"] if not _COMPUTED.search(name))
    if found:
        listed = ", ".join(f"{part} ({count} tensors)" for part, count in found.most_common(5))
        raise InputError(
            f"{pretrained!r} has parts that {type(model).__name__} does not load, so an export would lack them: "
            f"{listed}. To train without them, first save only what is loaded: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER), and the tokenizer likewise."
        )


def stored_names(pretrained: str) -> dict[str, str]:
    """Names of the tensors in a model's safetensors files, with the file of each; not those computed today."""
    found: dict[str, str] = {}
    for path in weight_files(pretrained):
        with safe_open(path, framework="pt") as file:
            found |= {name: path for name in file.keys() if not _COMPUTED.search(name)}  # noqa: SIM118, not a mapping
    return found


def passed_over(model: PreTrainedModel, pretrained: str) -> dict[str, str]:
    """Stored tensors that the architecture does not load, on purpose, with their files: heads for several tokens, say.

    transformers does not report them; they are found by their names.
    """
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
    if not patterns:
        return {}
    names = [name.split(".") for name in model.state_dict()]
    ends = {".".join(parts[begin:]) for parts in names for begin in range(len(parts))}  # of a backbone: without prefix
    ignored = re.compile("|".join(patterns))
    return {name: path for name, path in stored_names(pretrained).items() if ignored.search(name) and name not in ends}


def is_composite(model: PreTrainedModel) -> bool:
    """Whether the language model is a part of the model, beside a vision tower, say."""
    return model.config.get_text_config() is not model.config


def outside_language_model(model: PreTrainedModel) -> list[str]:
    """Names of the parameters and persistent buffers that text does not use, such as those of a vision tower."""
    if not is_composite(model):
        return []
    ends: list[Any] = [model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
    of_text = {id(tensor) for end in ends for tensor in end.state_dict(keep_vars=True).values()}
    return [name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) not in of_text]


def _auto_class(pretrained: str) -> Any:
    """The class of transformers that loads the whole of a checkpoint."""
    if pretrained.endswith(".gguf"):  # text alone
        return AutoModelForCausalLM
    adapters = Path(pretrained).expanduser() / "adapter_config.json"
    if adapters.is_file():  # a folder of adapters names the model that they are of
        pretrained = json.loads(adapters.read_text(encoding="utf-8")).get("base_model_name_or_path") or pretrained
    return _class_for(_load(AutoConfig, pretrained, "causal language model"))


def _class_for(config: PretrainedConfig) -> Any:
    """The class of transformers for a configuration: of several modes where there is one, unless it names another."""
    several: Any = AutoModelForMultimodalLM._model_mapping
    alone: Any = AutoModelForCausalLM._model_mapping
    if type(config) not in several:
        return AutoModelForCausalLM
    is_text = type(config) in alone and config.architectures == [alone[type(config)].__name__]
    return AutoModelForCausalLM if is_text else AutoModelForMultimodalLM


def _part(name: str, modules: set[str]) -> str:
    """The outermost module in a tensor's name that the model does not have."""
    parts = name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(1, len(parts)))
    return next((prefix for prefix in prefixes if prefix not in modules), name)


def _load_prequantized(auto_class: Any, pretrained: str, prequantized: Prequantized, **kwargs: Any) -> Any:
    """The model, whose weights are plain unless they stay packed, and what loading it said."""
    what = "causal language model"
    config = kwargs["config"] = _load(AutoConfig, pretrained, what)
    if prequantized.is_unpacked_here:
        del config.quantization_config
        kwargs["state_dict"] = prequantized.unpacked(weight_files(pretrained))
        auto_class, pretrained = auto_class._model_mapping[type(config)], ""
    else:
        prequantized.dequantize_on_loading(config)
    model, info = _load(auto_class, pretrained, what, output_loading_info=True, **kwargs)
    prequantized.finish(model)
    biases = {name: tensor for name, tensor in kwargs.get("state_dict", {}).items() if name.endswith(".bias")}
    zero = {name for name, bias in biases.items() if not bias.any()}  # AutoGPTQ adds them to each matrix
    return model, info | {"unexpected_keys": set(info["unexpected_keys"]) - zero}


def _prepare(model: PreTrainedModel) -> PreTrainedModel:
    model.config.use_cache = False  # with a cache transformers does not detect packed documents
    if model.dtype == torch.float64 and model._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")  # torch's grouped_mm has no float64
    model.train()  # from_pretrained returns eval mode, and Lightning keeps the mode it finds
    return model


@contextmanager
def _no_foreign_code() -> Iterator[None]:
    """Raise on remote code, where transformers would ask on standard input whether to run it.

    ``trust_remote_code=False`` does not reach parts of a model that it builds itself, such as a vision tower.
    """
    waits = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # seconds; with 0, transformers raises at once
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = waits


_EXPECTED = "a hub name, a folder written by save_pretrained, or a .gguf file"


def _load(auto_class: Any, pretrained: str, what: str, **kwargs: Any) -> Any:
    pretrained = str(Path(pretrained).expanduser()) if pretrained.startswith("~") else pretrained
    source = {"pretrained_model_name_or_path": pretrained or None}  # none for weights that are given
    if pretrained.endswith(".gguf"):
        path = Path(pretrained)
        if not path.is_file():
            raise InputError(f"There is no GGUF file {pretrained!r}.")
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    elif pretrained:
        check_reachable(pretrained, _EXPECTED)
    kwargs["trust_remote_code"] = False  # by default transformers asks on standard input
    try:
        with _no_foreign_code():
            return auto_class.from_pretrained(**source, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers validates few values of the files, so anything may be raised
        where = "The path exists" if Path(pretrained).exists() else "There is no such folder or file here"
        said = " ".join(str(error).split())
        if isinstance(error, pickle.UnpicklingError):  # torch's message advises to disable the check
            said = "a .bin file holds more than tensors, so loading it could run code; ask for safetensors"
        reason = said if isinstance(error, OSError) else f"{type(error).__name__}: {said}"
        raise InputError(
            f"No {what} can be loaded from {pretrained!r}. {where}; expected {_EXPECTED}. Error of the loader: "
            f"{reason[:500]}"
        ) from error
