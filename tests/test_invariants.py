"""The gradient of an optimizer step is that of the data-set objective, however the step is split."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sft.data.rows.mixture import Mixture, Part
from lightning_sft.demos import tiny_pretrained
from tests.helpers.gradients import ROWS, Run, capacity_for, encoded, fit, furthest, row_gradients, step_gradients
from tests.helpers.processes import torchrun

TOLERANCE = {"64-true": 1e-10, "32-true": 1e-5}
NORMALIZE = ["token", "sequence", "sqrt", "dataset"]
STREAM = {"streaming": True, "buffer_rows": 5, "tokens_per_batch": 100}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """No part of it computes in float32 when the weights are float64, as Llama's norms do."""
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return tiny_pretrained(tmp_path_factory.mktemp("pretrained") / "gpt2", "gpt2", **off)


@cache
def alone(pretrained: str, normalize: str, precision: str) -> dict[str, tuple[Tensor, float]]:
    dtype = torch.float64 if precision == "64-true" else torch.float32
    return row_gradients(pretrained, encoded(pretrained, normalize), dtype)


def error(
    pretrained: str,
    ranks: list[Run],
    accumulate: int,
    normalize: str = "token",
    precision: str = "64-true",
    clip: Any = None,
) -> float:
    """How far the applied gradients are from those of the formula."""
    rows = alone(pretrained, normalize, precision)
    consumed = [rank.consumed for rank in ranks]
    mean_weight = sum(weight for _, weight in rows.values()) / (len(consumed[0]) / accumulate)
    wanted = step_gradients(rows, consumed, accumulate, mean_weight if normalize == "dataset" else None)
    if clip is not None:
        wanted = [g * min(1.0, clip / (g.norm().item() + 1e-6)) for g in wanted]
    return furthest(ranks[0].gradients, wanted)


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_one_step_has_the_same_gradient_however_it_is_split(
    gpt2: str, precision: str, normalize: str, packing: str
) -> None:
    lengths = [len(example) for example in encoded(gpt2)]
    for num_micro_batches in (8, 4, 2, 1):
        capacity = capacity_for(lengths, num_micro_batches)
        if packing == "padded":
            capacity = max(lengths) * -(-len(lengths) // num_micro_batches)
        settings = {"accumulate_grad_batches": 12, "precision": precision}
        run = fit(gpt2, {"packing": packing, "tokens_per_batch": capacity}, normalize, **settings)
        assert len(run.gradients) == 1
        assert sum(map(bool, run.consumed)) <= num_micro_batches
        assert error(gpt2, [run], 12, normalize, precision) <= TOLERANCE[precision]


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_every_step_of_an_epoch_is_exact_and_every_row_is_used_once(gpt2: str, normalize: str) -> None:
    run = fit(gpt2, {"tokens_per_batch": 150}, normalize, accumulate_grad_batches=2, precision="64-true")
    assert len(run.gradients) > 2
    assert sorted(source for micro in run.consumed for source in micro) == sorted(alone(gpt2, "token", "64-true"))
    assert error(gpt2, [run], 2, normalize) <= 1e-10


def test_a_short_last_window_is_exact(gpt2: str) -> None:
    settings = {"accumulate_grad_batches": 3, "limit_train_batches": 5, "precision": "64-true"}
    run = fit(gpt2, {"tokens_per_batch": 120}, **settings)
    assert len(run.consumed) == 5  # windows of 3 and 2 micro-batches
    assert error(gpt2, [run], 3) <= 1e-10


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_step_of_a_stream_is_exact_and_every_row_is_used_once(gpt2: str, num_workers: int) -> None:
    run = fit(gpt2, {**STREAM, "num_workers": num_workers}, accumulate_grad_batches=2, precision="64-true")
    assert len(run.gradients) > 3
    assert sorted(source for micro in run.consumed for source in micro) == sorted(alone(gpt2, "token", "64-true"))
    assert error(gpt2, [run], 2) <= 1e-10


@pytest.mark.parametrize(("streaming", "uses"), [(False, (5, 7)), (True, (8, 12))])
def test_every_step_of_a_mixture_is_exact(gpt2: str, tmp_path: Path, streaming: bool, uses: tuple[int, int]) -> None:
    """Of 8 rows with half the weight and 4 with a share of 60 %: an epoch of 12, or until all have been used."""
    for name, part in (("a", ROWS[:8]), ("b", ROWS[8:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    mixture = Mixture(
        {"a": Part(f"{tmp_path}/a.jsonl", share=2, weight=0.5), "b": Part(f"{tmp_path}/b.jsonl", share=3)}
    )
    data = {**STREAM, "streaming": streaming, "train": mixture}
    run = fit(gpt2, data, accumulate_grad_batches=2, precision="64-true")
    rows = {}
    for number, (gradient, weight) in enumerate(alone(gpt2, "token", "64-true").values()):
        part, scale = ("a", 0.5) if number < 8 else ("b", 1.0)
        rows[f"{tmp_path}/{part}.jsonl:{number % 8 + 1}"] = (gradient * scale, weight * scale)
    used = Counter(source.rpartition(":")[0][-7] for micro in run.consumed for source in micro)
    assert (used["a"], used["b"]) == uses
    assert furthest(run.gradients, step_gradients(rows, [run.consumed], 2)) <= 1e-10


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_clipping_sees_the_exact_gradient(gpt2: str, clip: float) -> None:
    settings = {"accumulate_grad_batches": 3, "gradient_clip_val": clip, "precision": "64-true"}
    run = fit(gpt2, {"tokens_per_batch": 120}, **settings)
    assert error(gpt2, [run], 3, clip=clip) <= 1e-10


def test_dataset_normalization_makes_an_epoch_add_up_to_the_gradient_of_the_objective(gpt2: str) -> None:
    run = fit(gpt2, {"tokens_per_batch": 100}, "dataset", precision="64-true", accumulate_grad_batches=2)
    rows = alone(gpt2, "dataset", "64-true").values()
    whole = torch.stack([gradient for gradient, _ in rows]).sum(0)  # ∇ of −L(θ)
    constant = sum(weight for _, weight in rows) / len(run.gradients)
    assert furthest([torch.stack(run.gradients).sum(0) * constant], [whole]) <= 1e-10


def test_the_mean_of_means_would_be_caught(gpt2: str) -> None:
    """What Lightning does with a loss that is a mean over its own micro-batch is far outside the tolerance."""
    run = fit(gpt2, {"tokens_per_batch": 120}, accumulate_grad_batches=12, precision="64-true")
    rows = alone(gpt2, "token", "64-true")
    means = [step_gradients(rows, [[micro]], 1)[0] for micro in run.consumed if micro]
    naive = torch.stack(means).mean(0)
    assert furthest([naive], run.gradients) > 0.1


class PlainBatches(LightningDataModule):
    """A user's own data module: what a Hugging Face collator makes, without a normalizer."""

    def __init__(self, pretrained: str, batch_size: int) -> None:
        super().__init__()
        self.pretrained, self.batch_size = pretrained, batch_size

    def train_dataloader(self) -> Any:
        def collate(examples: list[Any]) -> dict[str, Any]:
            longest = max(map(len, examples))
            ids = torch.tensor([[*e.input_ids, *[0] * (longest - len(e))] for e in examples])
            weights = torch.tensor([[*e.target_weights, *[0.0] * (longest - len(e))] for e in examples])
            return {"input_ids": ids, "labels": torch.where(weights > 0, ids, -100)}

        return DataLoader(encoded(self.pretrained), batch_size=self.batch_size, collate_fn=collate)


def test_batches_without_a_normalizer_are_normalized_when_the_step_is_complete(gpt2: str) -> None:
    settings = {"accumulate_grad_batches": 3, "precision": "64-true"}
    run = fit(gpt2, PlainBatches(gpt2, 3), **settings)  # 4 micro-batches: windows of 3 and 1
    sources = [f"row {i}" for i in range(1, 13)]
    run.consumed = [sources[i : i + 3] for i in range(0, 12, 3)]
    assert len(run.gradients) == 2
    assert error(gpt2, [run], 3) <= 1e-10


def test_two_processes_with_uneven_token_counts_are_exact(gpt2: str, tmp_path: Path) -> None:
    """Real DDP over gloo, each case in the same two processes."""
    common = {"accumulate_grad_batches": 2, "data": {"tokens_per_batch": 120}, "precision": "64-true"}
    cases: list[dict[str, Any]] = [{**common, "normalize": n, "precision": p} for n in NORMALIZE for p in TOLERANCE]
    cases.append({**common, "limit_train_batches": 3})
    cases.append({**common, "gradient_clip_val": 1e-3})
    cases.append({**common, "data": {"packing": "padded", "tokens_per_batch": 200}})
    cases.append({**common, "data": STREAM, "normalize": "sequence"})
    cases.append({**common, "data": STREAM, "limit_train_batches": 3})
    for number, case in enumerate(cases):
        torch.save(case, tmp_path / f"{number}.case")
    torchrun("tests.helpers.gradients", gpt2, str(tmp_path))
    for number, case in enumerate(cases):
        ranks = [Run(*torch.load(tmp_path / f"{number}.rank{rank}")) for rank in (0, 1)]
        normalize, precision = case.get("normalize", "token"), case["precision"]
        assert ranks[0].consumed != ranks[1].consumed
        got = error(gpt2, ranks, 2, normalize, precision, clip=case.get("gradient_clip_val"))
        assert got <= TOLERANCE[precision], case
        assert all(torch.equal(a, b) for a, b in zip(ranks[0].gradients, ranks[1].gradients, strict=True))
