"""A split with the plan of its epochs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lightning_sft.data.batches.loader import EpochLoader
from lightning_sft.data.batches.packing import PARTITIONS, Packing
from lightning_sft.data.batches.plan import Division, EpochPlan
from lightning_sft.data.batches.sampling import EpochSampler
from lightning_sft.data.tokens.dataset import Split
from lightning_sft.data.tokens.outliers import outlier_remark
from lightning_sft.io.words import counted
from lightning_sft.types import InputError

_TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16_384}  # a GPU idles where kernels are small


def default_tokens_per_batch(on_cuda: bool) -> int:
    """Maximum number of positions in a micro-batch if none is given: 2,048, or 16,384 on CUDA devices."""
    return _TOKENS_PER_BATCH["cuda" if on_cuda else "cpu"]


def draw_of(split: Split, seed: int | None) -> EpochSampler:
    """What an epoch uses of each data set; without a seed, every example once."""
    repeats = [1.0] * len(split.part_sizes)
    if seed is not None and split.mixture.has_shares:
        counted = split.examples.num_targets if split.mixture.by == "targets" else split.examples.shares_of_row
        repeats = split.mixture.repeats(np.bincount(split.parts, counted, len(split.part_sizes)).tolist())
    return EpochSampler(split.lengths, split.part_sizes, repeats, seed)


@dataclass(frozen=True)
class SplitPlan:
    """A split, and how its examples are dealt out.

    Args:
        split: The examples.
        plan: Plan of all epochs.
        capacity: Maximum number of positions in a micro-batch.
        packing: Packing strategy of micro-batches.
    """

    split: Split
    plan: EpochPlan
    capacity: int
    packing: Packing

    @classmethod
    def of(
        cls,
        split: Split,
        work: Division,
        packing: Packing = "packed",
        tokens_per_batch: int | None = None,
        *,
        default: int = _TOKENS_PER_BATCH["cpu"],
        constant: bool = False,
        seed: int | None = None,
        at_least_longest: bool = False,
    ) -> SplitPlan:
        """Plan the epochs of a split.

        Args:
            split: The examples.
            work: Division of an epoch over ranks and steps.
            packing: Packing strategy of micro-batches.
            tokens_per_batch: Maximum number of positions in a micro-batch; by default ``default``.
            default: Default of ``tokens_per_batch``, raised to the length of the longest sequence.
            constant: Whether the normalizer is the same for all steps.
            seed: Seed of the order; ``None`` takes every example once and keeps the longest first, for validation.
            at_least_longest: Whether ``tokens_per_batch`` is raised to the longest sequence, rather than refused.

        Raises:
            InputError: When a sequence is longer than ``tokens_per_batch``.
        """
        lengths = split.lengths
        longest = int(lengths.max())
        capacity = tokens_per_batch or max(default, longest)
        capacity = max(capacity, longest) if at_least_longest else capacity
        if longest > capacity:
            raise InputError(
                f"{split.examples[int(lengths.argmax())].provenance}: the sequence has {longest:,} tokens, more than "
                f"data.tokens_per_batch={capacity:,}. Raise it, or leave such rows out with data.max_length={capacity}."
            )
        plan = EpochPlan(
            lengths,
            split.examples.weights,
            lambda lengths: PARTITIONS[packing](lengths, capacity),
            draw=draw_of(split, seed),
            num_ranks=work.num_ranks,
            accumulate=work.accumulate,
            limit=work.limit,
            constant=constant,
            seed=seed,
        )
        return cls(split, plan, capacity, packing)

    def loader(
        self,
        rank: int,
        pad_id: int,
        num_workers: int,
        place: Callable[[], tuple[int, int]] = lambda: (0, 0),
        *,
        full: bool = False,
    ) -> EpochLoader:
        """The micro-batches of a rank, see :class:`lightning_sft.data.batches.loader.EpochLoader`.

        Args:
            rank: Data-parallel rank.
            pad_id: Token id of padding.
            num_workers: Worker processes that collate ahead.
            place: Gives the epoch, and how many micro-batches of it are done.
            full: Whether all micro-batches are filled up to the capacity, so that they are of one shape.
        """
        return EpochLoader(
            self.split.examples,
            self.plan,
            rank,
            packed=self.packing == "packed",
            fill=self.capacity if full else 0,
            pad_id=pad_id,
            parts=self.split.parts,
            part_names=self.split.mixture.names,
            num_workers=num_workers,
            place=place,
        )

    @property
    def fill(self) -> float:
        """The share of positions that a token takes, in micro-batches that hold a sequence."""
        return int(self.plan.draw.bounds.sum()) / (len(self.plan.packs) * self.capacity)

    @property
    def outliers(self) -> str | None:
        """What there is to say of sequences that alone decide how large a micro-batch is; ``None`` where none does."""
        lengths = self.split.lengths
        if self.capacity > lengths.max():
            return None
        return outlier_remark(lengths, lambda index: self.split.examples[index].provenance)

    def __str__(self) -> str:
        steps = counted(self.plan.num_steps, "optimizer step")
        size = self.plan.num_ranks * self.plan.accumulate
        least, more = divmod(len(self.plan.packs), self.plan.num_full_steps)
        batches = counted(least + (more > 0), f"{self.packing} micro-batch")
        batches = f"{least:,} or {batches}" if more else batches
        empty = f", filled up to {size:,} with empty ones" if least < size else ""
        return f"An epoch: {steps} of {batches} of at most {self.capacity:,} tokens ({self.fill:.0%} full){empty}."

    @property
    def mixture(self) -> list[list[str]]:
        """What an epoch has of each data set, as a table; the first row is its head. Empty for a lone data set."""
        split, draw, names = self.split, self.plan.draw, self.split.mixture.names
        targets = np.bincount(split.parts, split.examples.num_targets * draw.rates, len(split.part_sizes))
        table = [["data set", "sequences", "times an epoch", "share of sequences", "share of targets", "weight"]]
        for number, name in enumerate(names):
            size, count = split.part_sizes[number], draw.counts[number]
            shares = f"{count / sum(draw.counts):.1%}", f"{targets[number] / targets.sum():.1%}"
            weight = split.mixture.of_name[name].weight
            table.append([name, f"{size:,}", f"{count / size:.2f}", *shares, f"{weight:g}"])
        return table if names else []
