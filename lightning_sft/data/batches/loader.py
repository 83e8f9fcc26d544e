"""Plans and prompts to the iterables that Lightning loops over."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from lightning_sft.data.batches.collate import collate
from lightning_sft.data.batches.plan import EpochPlan, MicroBatch
from lightning_sft.data.tokens.chat_template import ChatTemplate
from lightning_sft.data.tokens.workers import iterate, leave_signals
from lightning_sft.types import Batch, Example, Prompt

PAD_ID = 0
"""Token id that prompts are padded with: it is masked, and every model has an embedding for it."""


class EpochLoader:
    """The micro-batches of one rank, epoch after epoch, as the plan says.

    Deliberately not a ``DataLoader``: Lightning would replace its sampler. An iteration asks for its place when
    its first batch is wanted, so that a resumed run continues where the killed one stopped.

    Args:
        examples: Examples that the plan's indices point to.
        plan: The plan of all epochs.
        rank: Data-parallel rank.
        packed: Lay examples end to end, or pad them.
        fill: Positions that a packed row is filled up to, see :func:`~lightning_sft.data.batches.collate.collate`.
        pad_id: Token id of padding.
        parts: Number of the data set that each example comes from, where they are a mixture.
        part_names: The names of all data sets of the mixture.
        num_workers: Worker processes that collate ahead; 0 collates in the training process.
        place: Gives the epoch, and how many micro-batches of it are done.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        plan: EpochPlan,
        rank: int = 0,
        *,
        packed: bool = True,
        fill: int = 0,
        pad_id: int = 0,
        parts: Sequence[int] | NDArray[np.int64] = (),
        part_names: Sequence[str] = (),
        num_workers: int = 0,
        place: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ) -> None:
        self.examples, self.plan, self.rank, self.num_workers, self.place = examples, plan, rank, num_workers, place
        self.parts = parts if part_names else ()
        self._collate = partial(collate, packed=packed, fill=fill, pad_id=pad_id, part_names=part_names)

    def __len__(self) -> int:
        return self.plan.num_micro_batches

    def __iter__(self) -> Iterator[Batch]:
        epoch, done = self.place()
        micro_batches = self.plan.micro_batches(epoch, self.rank)[done:]
        loader: DataLoader[Any] = DataLoader(
            cast(Dataset[MicroBatch], micro_batches),
            batch_size=None,
            collate_fn=cast(Any, partial(_batch, self.examples, self.parts, self._collate)),
            num_workers=self.num_workers,
            worker_init_fn=leave_signals,
            pin_memory=torch.cuda.is_available(),
        )
        yield from iterate(loader)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the place is known from the trainer's own counters. Its presence tells Lightning that we resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load, see :meth:`state_dict`."""


def _batch(
    examples: Sequence[Example],
    parts: Sequence[int] | NDArray[np.int64],
    collate: Callable[..., Batch],
    micro_batch: MicroBatch,
) -> Batch:
    """What a micro-batch of the plan consists of; workers under spawn and forkserver are sent what it needs alone."""
    own = micro_batch.examples
    of_parts = [int(parts[i]) for i in own] if len(parts) else []
    planned = micro_batch.step_weight
    return collate([examples[i] for i in own], micro_batch.normalizer, parts=of_parts, step_weight=planned)


class PromptLoader:
    """One rank's prompts in batches, in order. Not a ``DataLoader``: Lightning would shard a rank's share again.

    Args:
        prompts: Prompts of this rank.
        tokenizer: Tokenizer of the model.
        batch_size: Prompts that are answered at a time.
    """

    def __init__(self, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        self.prompts, self.tokenizer, self.batch_size = prompts, tokenizer, batch_size

    def __len__(self) -> int:
        return -(-len(self.prompts) // self.batch_size)

    def __iter__(self) -> Iterator[PromptBatch]:
        for begin in range(0, len(self.prompts), self.batch_size):
            yield PromptBatch(self.prompts[begin : begin + self.batch_size], self.tokenizer)


class PromptBatch:
    """Prompts padded on the left, for generation; a plain class for the reason that :class:`Batch` is one.

    Args:
        prompts: Prompts to answer.
        tokenizer: Tokenizer that pads prompts and decodes answers.
    """

    def __init__(self, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> None:
        self.prompts, self.tokenizer = prompts, tokenizer
        self.stop_ids = ChatTemplate.of(tokenizer).stop_ids
        longest = max(len(prompt.input_ids) for prompt in prompts)
        padding = [longest - len(prompt.input_ids) for prompt in prompts]
        rows = [[PAD_ID] * n + list(prompt.input_ids) for n, prompt in zip(padding, prompts, strict=True)]
        self.input_ids: Tensor = torch.tensor(rows)  # [B, N]
        self.attention_mask: Tensor = (torch.arange(longest) >= torch.tensor(padding)[:, None]).long()  # [B, N]

    def to(self, device: Any, non_blocking: bool = False) -> PromptBatch:
        """Move the tensors; Lightning calls it."""
        self.input_ids = self.input_ids.to(device, non_blocking=non_blocking)
        self.attention_mask = self.attention_mask.to(device, non_blocking=non_blocking)
        return self


def pad_token_id(tokenizer: PreTrainedTokenizerBase, num_embeddings: int | None = None) -> int:
    """The id to pad with: the tokenizer's, or any that has an embedding, for it is masked wherever it stands.

    Args:
        tokenizer: Tokenizer; an added padding token may lie beyond embeddings that were not resized.
        num_embeddings: Number of token embeddings of the model, or ``None``.
    """
    size = math.inf if num_embeddings is None else num_embeddings
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, PAD_ID)
    return int(next(i for i in ids if i is not None and i < size))
