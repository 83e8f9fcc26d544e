"""A batch back to its documents, and their places in the epoch: shown and audited is what the model will be given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, zip_longest

import torch
from torch import Tensor

from lightning_sft.data.batches.loader import EpochLoader
from lightning_sft.io.words import counted
from lightning_sft.types import IGNORE, Batch


@dataclass(frozen=True)
class Document:
    """One sequence as it stands in a micro-batch.

    Args:
        input_ids: Token ids ``[N]``.
        target_weights: The weight that each token is trained with, ``[N]``; 0 is context.
        provenance: Location of the row, ``file:line``.
    """

    input_ids: Tensor
    target_weights: Tensor
    provenance: str = "?"

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """Tokens that are trained."""
        return int((self.target_weights > 0).sum())


def documents(batch: Batch, pad_id: int = 0) -> list[Document]:
    """The documents of a batch, in order: a token is a target when it is the label of the position before it.

    Padding is no part of a document, and a batch that has nothing else has none.

    Args:
        batch: Packed or padded.
        pad_id: Token id of padding.

    >>> from lightning_sft.data.batches.collate import collate
    >>> from lightning_sft.types import Example
    >>> batch = collate([Example([5, 6, 7], [0, 0, 2.0]), Example([8, 9], [0, 1.0])])
    >>> [(d.input_ids.tolist(), d.target_weights.tolist()) for d in documents(batch)]
    [([5, 6, 7], [0.0, 0.0, 2.0]), ([8, 9], [0.0, 1.0])]
    """
    ids, labels, weights = batch.input_ids.flatten(), batch.labels.flatten(), batch.target_weights.flatten()
    begins = (batch.position_ids.flatten() == 0).nonzero().flatten().tolist()
    names = batch.provenance or ("?",) * len(begins)
    found = []
    for begin, end, name in zip(begins, [*begins[1:], len(ids)], names, strict=True):
        own, following = ids[begin:end], labels[begin:end]
        is_target = torch.cat([torch.zeros(1, dtype=torch.bool), following[:-1] != IGNORE])
        assert following[-1] == IGNORE, f"{name}: the last token predicts the first of the next document"
        assert (own[1:] == following[:-1])[is_target[1:]].all(), f"{name}: a label is not the token that follows"
        if len(batch.input_ids) > 1 or name == "padding":
            is_padding = (own == pad_id) & ~is_target
            own = own[: len(own) - int(is_padding.flip(0).long().cumprod(0).sum())]
        if len(own):
            before = torch.cat([weights.new_zeros(1), weights[begin : end - 1]])
            found.append(Document(own, (before * is_target)[: len(own)], name))
    return found


@dataclass(frozen=True)
class PlacedDocument:
    """A document and where it is used.

    Args:
        document: The tokens and their weights.
        step: Number of the optimizer step, from 1.
        micro_batch: Number of the micro-batch among those of its rank, from 1.
        rank: The rank that computes it, where there are several.
    """

    document: Document
    step: int
    micro_batch: int
    rank: int | None

    @property
    def remark(self) -> str:
        """Where it is used and how long it is, in words."""
        rank = "" if self.rank is None else f" of rank {self.rank}"
        size = f"{counted(len(self.document), 'token')}, {counted(self.document.num_targets, 'target')}"
        return f"step {self.step}, micro-batch {self.micro_batch}{rank}, {size}"


def is_place(asked: str, place: str) -> bool:
    """Whether a row is at a place: the folder may be left out, or all but the number; so may the word before it.

    Args:
        asked: What a user has given.
        place: Provenance of the row.

    >>> [is_place(asked, "a/b.json:row 2") for asked in ("b.json:row 2", "b.json:2", "2", "row 2", "12", "c.json:2")]
    [True, True, True, True, False, False]
    """
    file, colon, number = asked.rpartition(":")
    known, _, last = place.rpartition(":")
    is_number = number.removeprefix("row ") == last.removeprefix("row ")
    return is_number and (not colon or f"/{known}".endswith(f"/{file}"))


class EpochDocuments:
    """All documents of the first epoch, rank after rank, taken from the collated micro-batches.

    Args:
        loader: Data loader of any rank.
        pad_id: Token id of padding.
    """

    def __init__(self, loader: EpochLoader, pad_id: int) -> None:
        self.loader, self.pad_id = loader, pad_id

    def __iter__(self) -> Iterator[PlacedDocument]:
        return (placed for batch in self._batches() for placed in batch)

    def first(self, count: int) -> list[PlacedDocument]:
        """``count`` documents from different micro-batches: the first of each, then the second of each, ..."""
        turns = zip_longest(*islice(self._batches(), count))
        return [placed for turn in turns for placed in turn if placed is not None][:count]

    def _batches(self) -> Iterator[list[PlacedDocument]]:
        plan = self.loader.plan
        for rank in range(plan.num_ranks):
            self.loader.rank = rank
            for number, batch in enumerate(self.loader):
                place = (number // plan.accumulate + 1, number + 1, rank if plan.num_ranks > 1 else None)
                yield [PlacedDocument(document, *place) for document in documents(batch, self.pad_id)]
