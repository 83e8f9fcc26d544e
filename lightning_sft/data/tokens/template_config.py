"""How conversations are rendered: a setting that a tokenizer carries, and the folders that it is saved in.

It is a key of ``tokenizer_config.json``, which transformers keeps and does not read. So whoever loads an exported
folder with lightning_sft renders as its training did. For everybody else, an export makes the variables defaults of the
template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from lightning_sft.data.tokens.control_tokens import Treatment

Thoughts = Literal["keep", "split", "mask"]
"""Reasoning as it stands, taken out of ``<think>`` tags in an answer's text, or that and not trained."""

_KEY = "lightning_sft"  # of tokenizer_config.json


@dataclass(frozen=True)
class TemplateConfig:
    """How conversations are rendered.

    Args:
        variables: Variables of the chat template, as ``{"enable_thinking": False}``; ``today`` is the date that it is
            told, as ``2026-01-31``.
        control_tokens: Treatment of control tokens in the texts of a conversation: tokenized as plain ``text``, a
            reason to ``refuse`` the row, or ``as_is``, as the tokens that they are.
        thoughts: Treatment of reasoning.
        stop_ids: Ids of the tokens that generation stops at, by the model's generation config.
        system: System prompt that conversations of the training data were given where they had none.
    """

    variables: Mapping[str, Any] = field(default_factory=dict)
    control_tokens: Treatment = "text"
    thoughts: Thoughts = "keep"
    stop_ids: Sequence[int] = ()
    system: str | None = None

    @property
    def different(self) -> dict[str, Any]:
        """The settings of a user that are not the default ones."""
        default = TemplateConfig(stop_ids=self.stop_ids)
        return {name: value for name, value in asdict(self).items() if value != getattr(default, name)}

    def overridden(self, variables: Mapping[str, Any], **given: Any) -> TemplateConfig:
        """With the variables over those that there are, and the other settings that are not ``None``.

        >>> kept = TemplateConfig({"enable_thinking": False}, thoughts="mask")
        >>> kept.overridden({"today": "2026-01-31"}, thoughts=None, system="Be kind.").different
        {'variables': {'enable_thinking': False, 'today': '2026-01-31'}, 'thoughts': 'mask', 'system': 'Be kind.'}
        """
        settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        plain = json.loads(json.dumps(dict(variables), default=str))  # a date of a YAML file is no value of JSON
        return replace(self, variables={**self.variables, **plain}, **settings)


def configure(tokenizer: PreTrainedTokenizerBase, config: TemplateConfig) -> None:
    """Say how conversations are rendered for a tokenizer wherever nothing else is said.

    It goes with the tokenizer, to worker processes and wherever that is saved.
    """
    others = {name: value for name, value in tokenizer.init_kwargs.items() if name != _KEY}
    own = config.different | ({"stop_ids": list(config.stop_ids)} if config.stop_ids else {})
    tokenizer.init_kwargs = others | ({_KEY: own} if own else {})


def configured(tokenizer: PreTrainedTokenizerBase) -> TemplateConfig:
    """How conversations are rendered for a tokenizer.

    >>> from lightning_sft.demos import tiny_tokenizer
    >>> configured(tiny_tokenizer()).control_tokens
    'text'
    """
    found = tokenizer.init_kwargs.get(_KEY)
    known = {own.name for own in fields(TemplateConfig)}  # a later version may have written others
    return TemplateConfig(**{name: value for name, value in (found or {}).items() if name in known})


def configure_anew(
    tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], variables: Mapping[str, Any], **given: Any
) -> TemplateConfig:
    """Configure a tokenizer that has been loaded as a user wants it, and say what else it was trained with.

    Args:
        tokenizer: The tokenizer, which may be of an exported folder.
        stop_ids: Ids of the tokens that generation stops at, by the model's generation config.
        variables: Variables of the chat template, over those that the tokenizer was trained with.
        given: Other settings; ``None`` leaves one as it is.

    Returns:
        How conversations are rendered for the tokenizer from now on.
    """
    kept = replace(configured(tokenizer), stop_ids=stop_ids)
    config = kept.overridden(variables, **given)
    if kept.different:
        rank_zero_info(
            f"Where the settings of the data leave it open, conversations are rendered as in the training of "
            f"{tokenizer.name_or_path}: {kept.different}."
        )
    configure(tokenizer, config)
    return config


def for_inference(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy to export: where its template is told nothing, its variables are those of the training.

    The date is not among them: at inference, a template is told that of the day.

    >>> from lightning_sft.demos import tiny_tokenizer
    >>> tokenizer = tiny_tokenizer("{{ tone }}: {{ messages[0].content }}")
    >>> configure(tokenizer, TemplateConfig({"tone": "kind"}))
    >>> [for_inference(tokenizer).apply_chat_template([{"content": "Hi"}], tokenize=False, **how)
    ...  for how in ({}, {"tone": "stern"})]
    ['kind: Hi', 'stern: Hi']
    """
    variables = configured(tokenizer).variables
    defaults = "".join(
        f"{{%- if {name} is not defined %}}{{%- set {name} = {value!r} %}}{{%- endif %}}\n"
        for name, value in variables.items()
        if name != "today" and name.isidentifier()
    )
    exported, template = copy(tokenizer), tokenizer.chat_template
    if isinstance(template, dict):
        exported.chat_template = {name: _beginning_with(defaults, text) for name, text in template.items()}
    elif template is not None:
        exported.chat_template = _beginning_with(defaults, template)
    return exported


def _beginning_with(defaults: str, template: str) -> str:
    """A template behind its defaults; a newline after a block is trimmed, so it writes what it wrote."""
    return template if template.startswith(defaults) else defaults + template
