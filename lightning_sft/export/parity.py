"""Whether a model that was written to a folder and read again is the one that was trained: measured, not assumed.

On the targets of a few rows: KL(trained ‖ other) = Σ_v Pr(v) · (log Pr(v) − log Pr'(v)), mean and largest over targets,
and how often both have the same most likely token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_sft.data.rows.messages import Converter
from lightning_sft.data.rows.mixture import Mixture
from lightning_sft.data.rows.sources import Source, leaves, parsed
from lightning_sft.data.tokens.chat_template import ChatTemplate
from lightning_sft.data.tokens.encode import encode_many
from lightning_sft.machine.terminal import Console
from lightning_sft.types import Conversation, Example, InputError

_LONGEST = 1024  # tokens of a sequence that are looked at
_LOOKED_AT = 10_000  # rows of each part, among which are some that can be used
_TARGETS = 512  # of all rows together: logits of each are kept
_BUILT_IN = (
    ("What is 17 * 23?", "17 * 23 = 391."),
    ("Write a Python function that adds two numbers.", "def add(a, b):\n    return a + b\n"),
    ("Übersetze: the naïve café costs 5 €.", "Das naïve Café kostet 5 €."),
    ('{"task": "list", "n": 3}', '["one", "two", "three"]'),
)


@dataclass(frozen=True)
class Agreement:
    """How far a model is from the trained one.

    Args:
        name: Which model.
        mean_kl: Mean over targets of the KL divergence, in nats.
        max_kl: The largest of them.
        top1: How often the most likely token is the same.
    """

    name: str
    mean_kl: float
    max_kl: float
    top1: float


@dataclass
class Report:
    """What was found.

    Args:
        rows: Where the rows came from.
        most: The largest mean KL that passes.
        targets: How many targets were looked at.
        models: Each model that was compared with the trained one.
        unequal_weights: Names of weights of the folder that are not bit for bit those that were to be written.
        unequal_ids: Rows of which the folder's tokenizer gives other ids, or other targets, than that of the training.
        live: Mean difference of log Pr of targets, under the strategy and in the precision of the training; if known.
        dtype: Of the weights in the folder.
        rounded_from: Of the trained weights, where it is another.
    """

    rows: str
    most: float
    targets: int = 0
    models: list[Agreement] = field(default_factory=list)
    unequal_weights: list[str] = field(default_factory=list)
    unequal_ids: list[str] = field(default_factory=list)
    live: float | None = None
    dtype: str = "float32"
    rounded_from: str | None = None

    @property
    def failures(self) -> list[str]:
        """What does not pass, in words; empty where all is well."""
        found = [
            f"KL(trained ‖ {model.name}) is {model.mean_kl:.3g} on average, more than {self.most:.3g}"
            for model in self.models
            if not model.mean_kl <= self.most  # so that NaN fails
        ]
        if self.live is not None and not self.live <= math.sqrt(2 * self.most):  # as far as such a KL lets them be
            found.append(f"log Pr of the targets differs by {self.live:.3g} on average from that in the training")
        if self.unequal_weights:
            found.append(f"{len(self.unequal_weights)} weights are not what was written: {self.unequal_weights[:3]}")
        if self.unequal_ids:
            found.append(f"the tokenizer gives other ids than in the training for {self.unequal_ids[:3]}")
        return found

    def as_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self) | {"failures": self.failures, "passed": not self.failures}

    def show(self) -> None:
        """The report as a table on the terminal."""
        table = Table(title=f"Parity on {self.targets} targets of {self.rows}", title_justify="left")
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


def held_out(mixture: Mixture, format: Any = None, columns: Any = None, most: int = 8) -> list[Conversation]:
    """The first usable rows of data, as many of each part as of another.

    Args:
        mixture: The data.
        format: The format of its rows; told from their keys by default.
        columns: The data's column for a key of the format.
        most: How many rows.

    Raises:
        InputError: When a file is missing, or no row can be used.
    """
    found: list[Conversation] = []
    each = -(-most // len(mixture.parts))
    for part in mixture.of_name.values():
        convert = Converter(part.format or format, part.columns or columns)
        found += islice(_usable(part.source, convert), each)
    if not found:
        raise InputError("No row of the data can be used to compare the trained and the exported model.")
    return found[:most]


def built_in() -> list[Conversation]:
    """A few rows for when there are no held-out ones."""
    return [
        Conversation([{"role": "user", "content": x}, {"role": "assistant", "content": y}], None, (0.0, 1.0), f"#{i}")
        for i, (x, y) in enumerate(_BUILT_IN, 1)
    ]


def sequences(conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """What is looked at of conversations: their beginnings, up to so many tokens and targets.

    Raises:
        InputError: When nothing is left.
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
            "No row that the exported model could be compared on has a target in its first "
            f"{_LONGEST} tokens. Give others: --rows FILE.jsonl."
        )
    return found


@torch.no_grad()
def log_probs(model: PreTrainedModel, examples: Iterable[Example]) -> Tensor:
    """Log Pr of all tokens at each target of the sequences, ``[T, V]``, in evaluation mode."""
    model.eval()
    found = []
    for example in examples:
        logits = model(input_ids=torch.tensor([list(map(int, example.input_ids))]), use_cache=False).logits[0]  # [N, V]
        is_target = torch.tensor([weight > 0 for weight in example.target_weights[1:]])
        found.append(logits[:-1][is_target].float().log_softmax(-1))
    return torch.cat(found)


def agreement(name: str, trained: Tensor, other: Tensor) -> Agreement:
    """How far another model's log-probabilities ``[T, V]`` are from those of the trained one.

    >>> trained = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    >>> agreement("same", trained, trained)
    Agreement(name='same', mean_kl=0.0, max_kl=0.0, top1=1.0)
    >>> round(agreement("other", trained, trained.flip(1)).max_kl, 4)  # 0.9 · log 9 + 0.1 · log 1/9
    1.7578
    """
    p, q = (found.double().log_softmax(-1) for found in (trained, other))  # float32 sums to 1 only roughly
    kl = (p.exp() * (p - q)).sum(1)
    return Agreement(name, kl.mean().item(), kl.max().item(), (p.argmax(1) == q.argmax(1)).double().mean().item())


def unequal_weights(model: PreTrainedModel, reloaded: PreTrainedModel) -> list[str]:
    """Names of the weights of a model that another does not have bit for bit."""
    theirs = reloaded.state_dict()
    same = {name: name in theirs and _equal(own, theirs[name]) for name, own in model.state_dict().items()}
    return [name for name, is_same in same.items() if not is_same] + sorted(theirs.keys() - same.keys())


def _equal(a: Tensor, b: Tensor) -> bool:
    dtype = torch.promote_types(a.dtype, b.dtype)  # an architecture may keep some weights in float32
    return torch.equal(a.to(dtype), b.to(dtype))


def unequal_ids(
    conversations: Sequence[Conversation], trained: PreTrainedTokenizerBase, reloaded: PreTrainedTokenizerBase
) -> list[str]:
    """Rows that two tokenizers do not turn into the same sequences and the same prompts."""
    ours, theirs = (_ids(conversations, tokenizer) for tokenizer in (trained, reloaded))
    return [row.provenance for row, a, b in zip(conversations, ours, theirs, strict=True) if a != b]


def _ids(conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Of each row what training makes of it, and what ``apply_chat_template`` does at inference."""
    found, template = [], ChatTemplate.of(tokenizer).text  # with its date frozen: two renders are at two times
    for row, encoded in zip(conversations, encode_many(conversations, tokenizer), strict=True):
        trained: Any = str(encoded)  # of a refusal
        if not isinstance(encoded, InputError):
            trained = [(example.input_ids, example.target_weights) for example in encoded]
        tools: Any = row.tools
        asked = [message for message in row.messages if message["role"] != "text"][:-1]
        try:
            settings: dict[str, Any] = {"chat_template": template, "add_generation_prompt": True}
            prompt = asked and tokenizer.apply_chat_template(asked, tools=tools, **settings)
        except Exception as error:  # whatever a template raises, the other has to raise too
            prompt = str(error)
        found.append((trained, str(prompt)))
    return found


def _usable(source: Source, convert: Converter) -> Iterator[Conversation]:
    for row, where in islice((row for leaf in leaves(source) for row in leaf()), _LOOKED_AT):
        with suppress(InputError):  # a run may leave such rows out; here they would only be in the way
            yield convert(parsed(row, where), where)
