"""The documents of an epoch one after another, each with its place in the plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, zip_longest

from lightning_sft.data.batches.loader import EpochLoader
from lightning_sft.data.inspect.documents import Document, documents


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

    def is_at(self, place: str) -> bool:
        """Whether it comes from this ``file:line``; the folder may be left out."""
        return f"/{self.document.provenance}".endswith(f"/{place}")

    @property
    def remark(self) -> str:
        """Where it is used and how long it is, in words."""
        rank = "" if self.rank is None else f" of rank {self.rank}"
        size = f"{len(self.document):,} tokens, {self.document.num_targets:,} targets"
        return f"step {self.step}, micro-batch {self.micro_batch}{rank}, {size}"


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
