from __future__ import annotations

import pickle

import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision

from lightning_sft.data.batches.collate import collate
from lightning_sft.types import IGNORE, Batch, Example, InputError


def test_a_plain_batch_is_shifted_once() -> None:
    batch = Batch.of({"input_ids": torch.tensor([[5, 6, 7, 0]]), "labels": torch.tensor([[IGNORE, 6, 7, IGNORE]])})
    assert batch.labels.tolist() == [[6, 7, IGNORE, IGNORE]]
    assert batch.normalizer is None


def test_a_plain_batch_with_positions_has_no_label_across_documents() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    batch = Batch.of({"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[0, 1, 0, 1]])})
    assert batch.labels.tolist() == [[6, IGNORE, 8, IGNORE]]
    assert batch.is_packed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": torch.ones(1, 2)}, r"got \['input_ids'\]"),
        ([1, 2], "got list"),
        (
            {"input_ids": torch.ones(1, 2), "labels": torch.ones(1, 2), "attention_mask": torch.tensor([[0, 1]])},
            "only say that rows are padded on the right",
        ),
        (
            {"input_ids": torch.ones(1, 3), "labels": torch.ones(1, 3), "attention_mask": torch.tensor([[1, 0, 1]])},
            "only say that rows are padded on the right",
        ),
        (
            {"input_ids": torch.ones(1, 2), "labels": torch.ones(1, 2), "attention_mask": torch.ones(1, 1, 2, 2)},
            "only say that rows are padded on the right",
        ),
    ],
)
def test_what_is_no_batch_is_refused(given: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Batch.of(given)


def test_true_half_precision_does_not_round_the_target_weights() -> None:
    batch = collate([Example([1, 2], [0, 1 / 3])], normalizer=1 / 3)
    converted = HalfPrecision("bf16-true").convert_input(batch)
    assert converted.target_weights[0, 0].item() == 1 / 3


def test_moving_keeps_everything() -> None:
    batch = collate([Example([1, 2], [0, 0.5], "f:1")], normalizer=2.0)
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.target_weights.device.type == "meta"
    assert (moved.normalizer, moved.provenance) == (2.0, ("f:1",))


def test_targets_follow_labels_that_are_changed() -> None:
    batch = pickle.loads(pickle.dumps(collate([Example([5, 6, 7], [0, 1.0, 1.0])])))  # as from a worker process
    assert batch._known_targets is not None
    assert batch.targets.tolist() == [0, 1]
    batch.labels[0, 0] = IGNORE  # in place
    assert batch.targets.tolist() == [1]
    batch.labels = torch.tensor([[6, IGNORE, IGNORE]])
    assert batch.targets.tolist() == batch.to("cpu").targets.tolist() == [0]
    with torch.inference_mode():
        assert Batch.of(dict.fromkeys(("input_ids", "labels"), torch.ones(1, 2).long())).targets.tolist() == [0]


def test_a_batch_is_no_dictionary_of_arguments_and_says_what_to_pass_instead() -> None:
    batch = Batch.of(dict.fromkeys(("input_ids", "labels"), torch.ones(1, 2, dtype=torch.long)))
    with pytest.raises(InputError, match=r"Pass input_ids=batch.input_ids and position_ids=.*, without"):
        torch.nn.Identity()(**batch)
    with pytest.raises(InputError, match=r"attributes: batch.input_ids instead of"):
        batch["input_ids"]
    with pytest.raises(InputError, match=r"A Batch is no list; .* Lightning takes it for several loaders"):
        next(iter(batch))  # type: ignore[call-overload]  # what Lightning does with a list of batches
    with pytest.raises(InputError, match=r"got list. .* Lightning takes it for several loaders.*Return one loader"):
        Batch.of([batch])  # type: ignore[arg-type]  # what a step gets of a list of loaders


IDS = torch.tensor([[5, 6, 7]])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"input_ids": IDS[0], "labels": IDS[0]},
            r"shape \[B, N\], as torch.long; got input_ids \[3\] of torch.int64",
        ),
        ({"input_ids": IDS.tolist(), "labels": IDS.tolist()}, r"got input_ids \[\] of list"),
        ({"input_ids": IDS, "labels": IDS[:, :2]}, r"labels \[1, 2\]"),
        ({"input_ids": IDS.float(), "labels": IDS}, r"input_ids \[1, 3\] of torch.float32"),
        ({"input_ids": IDS[:, :0], "labels": IDS[:, :0]}, r"got input_ids \[1, 0\]"),
        ({"input_ids": IDS, "labels": IDS, "position_ids": torch.arange(3)}, r"position_ids \[3\]"),
        ({"input_ids": IDS, "labels": IDS, "position_ids": IDS}, r"position_ids begin with 0"),
        ({"input_ids": IDS, "labels": IDS, "target_weights": IDS}, r"'target_weights' as well. Give a .*Batch"),
        ({"input_ids": IDS, "labels": IDS, "inputs_embeds": IDS}, r"'inputs_embeds' as well. Leave it out"),
    ],
    ids=range(9),
)
def test_values_of_a_plain_batch_that_cannot_be_meant_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Batch.of(given)


def test_a_mask_of_another_library_is_said_to_have_no_effect() -> None:
    with pytest.warns(UserWarning, match=r"'loss_mask' of the batches has no effect: a label of -100 is no target"):
        Batch.of({"input_ids": IDS, "labels": IDS, "loss_mask": IDS})
