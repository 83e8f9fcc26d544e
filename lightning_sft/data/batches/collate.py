"""Examples to a Batch: documents laid end to end or one a row, positions restarting, labels shifted once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lightning_sft.types import IGNORE, Batch, Example

_PADDING = 64  # tokens of a document of padding where there is no example to go by


def collate(
    examples: Sequence[Example],
    normalizer: float | None = None,
    *,
    packed: bool = True,
    fill: int = 0,
    pad_id: int = 0,
    parts: Sequence[int] = (),
    part_names: Sequence[str] = (),
    step_weight: float | None = None,
) -> Batch:
    """One micro-batch of examples.

    Args:
        examples: May be empty: the batch then is one padding token and no target, so that a rank can keep in step.
        normalizer: Z of the optimizer step.
        packed: All in one row without padding (``True``), or one example a row, padded on the right.
        fill: Positions that a packed row has at least: it is filled up with documents of padding, none of them longer
            than the longest example. Where all rows are of one size, kernels are compiled once.
        pad_id: Token id of padding; it is never a target, whatever it is.
        parts: Number of the data set that each example comes from, where they are a mixture.
        part_names: The names of all data sets of the mixture.
        step_weight: Planned sum of the target weights of the optimizer step, if that is not Z.

    >>> batch = collate([Example([5, 6, 7], [0, 0, 2.0]), Example([8, 9], [0, 1.0])])
    >>> batch.input_ids.tolist(), batch.position_ids.tolist()
    ([[5, 6, 7, 8, 9]], [[0, 1, 2, 0, 1]])
    >>> batch.labels.tolist(), batch.target_weights.tolist()
    ([[-100, 7, -100, 9, -100]], [[0.0, 2.0, 0.0, 1.0, 0.0]])
    """
    documents = [*examples, *_padding([len(example) for example in examples], fill if packed else 0, pad_id)]
    lengths = [len(document) for document in documents]
    shape = (1, sum(lengths)) if packed else (len(documents), max(lengths))
    ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORE, dtype=np.int64)
    weights = np.zeros(shape, dtype=np.float64)
    positions = np.zeros(shape, dtype=np.int64) if packed else np.tile(np.arange(shape[1]), (shape[0], 1))
    begin = 0
    for number, (document, length) in enumerate(zip(documents, lengths, strict=True)):
        row = 0 if packed else number
        here = slice(begin, begin + length)
        before = slice(begin, begin + length - 1)  # position t predicts token t + 1
        ids[row, here] = document.input_ids
        positions[row, here] = np.arange(length)
        next_weights = np.asarray(document.target_weights[1:], dtype=np.float64)
        weights[row, before] = next_weights
        labels[row, before] = np.where(next_weights > 0, ids[row, begin + 1 : begin + length], IGNORE)
        begin += length if packed else 0
    num_padding = len(documents) - len(examples)
    return Batch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(positions),
        target_weights=torch.from_numpy(weights),
        normalizer=normalizer,
        provenance=[document.provenance for document in documents],
        parts=[*parts, *[0] * num_padding] if part_names else (),
        part_names=part_names,
        lengths=lengths[: len(examples)] + [0] * num_padding,
        answers_before=[document.answers_before for document in documents],
        spans=lengths if packed else [shape[1]] * shape[0],
        targets=torch.from_numpy(np.flatnonzero(labels != IGNORE)),
        step_weight=step_weight,
    )


def _padding(lengths: Sequence[int], fill: int, pad_id: int) -> list[Example]:
    """Documents of padding that fill a row up; without an example there is at least one."""
    missing, most = max(fill - sum(lengths), 0 if lengths else 1), max(lengths, default=_PADDING)
    sizes = [most] * (missing // most) + ([missing % most] if missing % most else [])
    return [Example([pad_id] * size, [0.0] * size, "padding") for size in sizes]
