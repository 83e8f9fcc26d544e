"""Comparison of a model read from its exported folder with the trained model.

Measured on the targets of a few rows: KL(trained ‖ other) = Σ_v Pr(v) · (log Pr(v) − log Pr'(v)), its mean and maximum
over targets, and how often both have the same most likely token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_sft.data.rows.messages import Converter, Reading
from lightning_sft.data.rows.mixture import Mixture, Part
from lightning_sft.data.rows.sources import leaves, parsed
from lightning_sft.data.tokens.chat_template import ChatTemplate
from lightning_sft.data.tokens.encode import encode_many
from lightning_sft.data.tokens.held_out import Side
from lightning_sft.data.tokens.template_config import configured
from lightning_sft.io.words import counted
from lightning_sft.machine.terminal import Console
from lightning_sft.model.backbone import language_model
from lightning_sft.types import Conversation, Example, InputError

_LONGEST = 1024  # maximum number of tokens per sequence
_LOOKED_AT = 10_000  # maximum number of rows of each part searched for usable ones
_TARGETS = 512  # maximum number of targets over all rows, whose logits are kept
_ROWS = 32  # targets that are compared at a time
_BUILT_IN = (
    ("What is 17 * 23?", "17 * 23 = 391."),
    ("Write a Python function that adds two numbers.", "def add(a, b):\n    return a + b\n"),
    ("Übersetze: the naïve café costs 5 €.", "Das naïve Café kostet 5 €."),
    ('{"task": "list", "n": 3}', '["one", "two", "three"]'),
)


@dataclass(frozen=True)
class Agreement:
    """Agreement of a model with the trained model.

    Args:
        name: Name of the model.
        mean_kl: Mean KL divergence over targets, in nats.
        max_kl: Maximum KL divergence over targets, in nats.
        top1: Share of targets with the same most likely token.
    """

    name: str
    mean_kl: float
    max_kl: float
    top1: float


@dataclass
class Report:
    """Result of a comparison.

    Args:
        rows: Description of the rows.
        most: Maximum mean KL that passes, in nats.
        targets: Number of targets compared.
        models: Agreement of each compared model.
        unequal_weights: Names of weights in the folder that differ in any bit from the model that was written.
        unequal_ids: Rows for which the folder's tokenizer yields other ids or targets than the training's.
        unkept: Names of pretrained weights that the folder lacks or, if they were not trained, has with other bits.
        live: Mean absolute difference of log Pr of targets from the model in training, under its strategy and
            precision; ``None`` if not measured.
        dtype: Dtype of the weights in the folder.
        rounded_from: Dtype of the trained weights, if they were rounded.
    """

    rows: str
    most: float
    targets: int = 0
    models: list[Agreement] = field(default_factory=list)
    unequal_weights: list[str] = field(default_factory=list)
    unequal_ids: list[str] = field(default_factory=list)
    unkept: list[str] = field(default_factory=list)
    live: float | None = None
    dtype: str = "float32"
    rounded_from: str | None = None

    @property
    def failures(self) -> list[str]:
        """Messages of what fails; empty if the comparison passes."""
        found = [
            f"KL(trained ‖ {model.name}) is {model.mean_kl:.3g} on average, more than {self.most:.3g}"
            for model in self.models
            if not model.mean_kl <= self.most  # so that NaN fails
        ]
        if self.live is not None and not self.live <= math.sqrt(2 * self.most):  # the bound that such a KL implies
            found.append(f"log Pr of the targets differs by {self.live:.3g} on average from the model in training")
        if self.unequal_weights:
            found.append(f"{len(self.unequal_weights)} weights differ from those written: {self.unequal_weights[:3]}")
        if self.unkept:
            found.append(f"{len(self.unkept)} weights of model.pretrained were not kept: {self.unkept[:3]}")
        if self.unequal_ids:
            found.append(f"the tokenizer gives other ids than in the training for {self.unequal_ids[:3]}")
        return found

    def as_json(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return asdict(self) | {"failures": self.failures, "passed": not self.failures}

    def show(self) -> None:
        """Print the report as a table."""
        table = Table(title=f"Parity on {counted(self.targets, 'target')} of {self.rows}", title_justify="left")
        for column in ("compared with the trained model", "mean KL", "largest KL", "same top token"):
            table.add_column(column, justify="left" if column.startswith("compared") else "right")
        for model in self.models:
            table.add_row(model.name, f"{model.mean_kl:.2e}", f"{model.max_kl:.2e}", f"{model.top1:.2%}")
        console = Console()
        console.print(table)
        if self.rounded_from is not None:
            console.print(f"The weights were rounded from {self.rounded_from} to {self.dtype}.")
        for failure in self.failures:
            console.print(Text.assemble(("✗", "red"), f" {failure}"))


def held_out(
    mixture: Mixture, reading: Reading | None = None, side: Side | None = None, most: int = 8
) -> list[Conversation]:
    """The first usable rows of data, equally many of each part.

    Args:
        mixture: Data to read.
        reading: How rows are read.
        side: The rows that may be taken, where the data are training data of which a share is held out.
        most: Maximum number of rows.

    Raises:
        InputError: When a file is missing, or no row can be used.
    """
    found: list[Conversation] = []
    each = -(-most // len(mixture.parts))
    for part in mixture.of_name.values():
        own_reading = (reading or Reading()).of(part)
        own_side, rows = side and side.within(part, own_reading), _usable(part, Converter(own_reading))
        found += islice((row for row in rows if own_side is None or own_side.has(row)), each)
    if not found:
        raise InputError("No row of the data can be used to compare the trained and the exported model.")
    return found[:most]


def built_in() -> list[Conversation]:
    """A few rows for runs without validation data."""
    return [
        Conversation([{"role": "user", "content": x}, {"role": "assistant", "content": y}], None, (0.0, 1.0), f"#{i}")
        for i, (x, y) in enumerate(_BUILT_IN, 1)
    ]


def sequences(conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The sequences to compare on: the beginnings of conversations, limited in tokens and targets.

    Raises:
        InputError: When no target is left.
    """
    found, left = [], _TARGETS
    encoded = (row for row in encode_many(conversations, tokenizer) if not isinstance(row, InputError))
    for example in (example for row in encoded for example in row):
        ids, weights = list(example.input_ids)[:_LONGEST], list(example.target_weights)[:_LONGEST]
        places = [i for i, weight in enumerate(weights) if weight > 0][:left]
        if places:
            end = places[-1] + 1
            found.append(Example(ids[:end], weights[:end], example.provenance))
            left -= len(places)
    if not found:
        raise InputError(
            "No row to compare the exported model on has a target in its first "
            f"{_LONGEST} tokens. Give other rows: --rows FILE.jsonl."
        )
    return found


def used(rows: str, conversations: Sequence[Conversation], examples: Sequence[Example]) -> str:
    """The description of rows with the number of those that are compared on, where some have no target that is.

    >>> rows = built_in()
    >>> used("4 rows of a.jsonl", rows, [Example([5, 6], [0, 1], row.provenance) for row in rows[:3]])
    '3 of 4 rows of a.jsonl'
    """
    number = len({example.provenance for example in examples})
    return rows if number == len(conversations) else f"{number} of {rows}"


@torch.no_grad()
def log_probs(model: PreTrainedModel, examples: Iterable[Example], device: torch.device | None = None) -> Tensor:
    """Log-probabilities of all tokens at each target of the sequences, ``[T, V]`` on the CPU, in evaluation mode.

    Args:
        model: Model to run.
        examples: The sequences.
        device: Device that it runs on; by default that of its weights.
    """
    model.eval()
    found, text = [], language_model(model)
    for example in examples:
        ids = torch.tensor([list(map(int, example.input_ids))], device=device or model.device)
        logits = text(input_ids=ids, use_cache=False).logits[0]  # [N, V]
        is_target = torch.tensor([weight > 0 for weight in example.target_weights[1:]])
        found.append(logits[:-1][is_target.to(logits.device)].cpu().float().log_softmax(-1))
    return torch.cat(found)


def agreement(name: str, trained: Tensor, other: Tensor) -> Agreement:
    """Compare another model's log-probabilities ``[T, V]`` with those of the trained model.

    >>> trained = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    >>> agreement("same", trained, trained)
    Agreement(name='same', mean_kl=0.0, max_kl=0.0, top1=1.0)
    >>> round(agreement("other", trained, trained.flip(1)).max_kl, 4)  # 0.9 · log 9 + 0.1 · log 1/9
    1.7578
    """
    found, same = [], []
    for ours, theirs in zip(trained.split(_ROWS), other.split(_ROWS), strict=True):
        p, q = (part.double().log_softmax(-1) for part in (ours, theirs))  # float32 sums to 1 only roughly
        found.append((p.exp() * (p - q)).sum(1))
        same.append(p.argmax(1) == q.argmax(1))
    kl = torch.cat(found)
    return Agreement(name, kl.mean().item(), kl.max().item(), torch.cat(same).double().mean().item())


def unequal_weights(model: PreTrainedModel, reloaded: PreTrainedModel) -> list[str]:
    """Names of the weights that are not equal bit for bit in two models."""
    theirs = reloaded.state_dict()
    same = {name: name in theirs and _equal(own, theirs[name]) for name, own in model.state_dict().items()}
    return [name for name, is_same in same.items() if not is_same] + sorted(theirs.keys() - same.keys())


def _equal(a: Tensor, b: Tensor) -> bool:
    dtype = torch.promote_types(a.dtype, b.dtype)  # an architecture may keep some weights in float32
    return torch.equal(a.to(dtype), b.to(dtype))


def unequal_ids(
    conversations: Sequence[Conversation], trained: PreTrainedTokenizerBase, reloaded: PreTrainedTokenizerBase
) -> list[str]:
    """Provenance of rows for which an exported tokenizer yields other sequences or prompts than that of the training.

    The prompts of the exported one are rendered without the variables of the training: those have to be its defaults.
    """
    ours = _ids(conversations, trained, configured(trained).variables)
    theirs = _ids(conversations, reloaded, {})
    return [row.provenance for row, a, b in zip(conversations, ours, theirs, strict=True) if a != b]


def _ids(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]
) -> list[Any]:
    """For each row its training sequences, and its prompt by ``apply_chat_template`` at inference, with variables."""
    found, template = [], ChatTemplate.of(tokenizer)
    for row, encoded in zip(conversations, encode_many(conversations, tokenizer), strict=True):
        trained: Any = str(encoded)  # message of a refusal
        if not isinstance(encoded, InputError):
            trained = [(example.input_ids, example.target_weights) for example in encoded]
        tools: Any = row.tools
        asked = [message for message in row.messages if message["role"] != "text"][:-1]
        try:
            own = {**variables, **row.template_kwargs}
            dated = template.text_for(tools, {**template.config.variables, **own})  # with a fixed date: time passes
            settings: dict[str, Any] = {"chat_template": dated, "add_generation_prompt": True, **own}
            prompt = asked and tokenizer.apply_chat_template(asked, tools=tools, **settings)
        except Exception as error:  # whatever one template raises, the other must raise as well
            prompt = str(error)
        found.append((trained, str(prompt)))
    return found


def _usable(part: Part, convert: Converter) -> Iterator[Conversation]:
    most = min(_LOOKED_AT, part.first or _LOOKED_AT)
    for row, where in islice((row for leaf in leaves(part.source) for row in leaf()), most):
        with suppress(InputError):  # unusable rows are skipped here
            yield convert(parsed(row, where), where)
