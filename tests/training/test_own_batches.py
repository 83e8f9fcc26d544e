"""Batches of a user's own loader are refused before the model computes with ids or positions that it does not have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from lightning_sft import Batch, SFTModule
from lightning_sft.demos import tiny_pretrained
from lightning_sft.training.own_batches import OwnBatches
from lightning_sft.types import InputError

Make = Callable[..., Trainer]


def loader(**changed: Any) -> Any:
    """A loader of one batch of two rows of forty ids."""
    ids = torch.arange(80).view(2, 40)
    return DataLoader([{"input_ids": ids, "labels": ids.clone()} | changed], batch_size=None)


def with_value(value: int) -> torch.Tensor:
    ids = torch.arange(80).view(2, 40)
    ids[1, 3] = value
    return ids


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"input_ids": with_value(264)},
            "the token id 264 in row 1, but .* for the ids 0 to 263",
        ),
        ({"input_ids": with_value(-1)}, "the token id -1 in row 1"),
        ({"labels": with_value(4000)}, "the label 4,000 in row 1, .* -100. Use the tokenizer of model.pretrained"),
        ({"labels": with_value(-1)}, "the label -1 in row 1"),
        (
            {"input_ids": torch.arange(12)},
            r"shape \[B, N\], .*; got input_ids \[12\] of torch.int64, labels \[2, 40\]",
        ),
        ({"labels": [[1, 2]]}, r"labels \[\] of list"),
    ],
)
@pytest.mark.parametrize("loop", ["fit", "validate"])
def test_what_the_model_has_no_row_for_is_named(
    pretrained: str, quiet_trainer: Make, changed: dict[str, Any], said: str, loop: str
) -> None:
    with pytest.raises(InputError, match=said):
        getattr(quiet_trainer(), loop)(SFTModule(pretrained), loader(**changed))


def test_sequences_beyond_a_table_of_positions_are_refused(tmp_path: Path, quiet_trainer: Make) -> None:
    module = SFTModule(tiny_pretrained(tmp_path, "gpt2", max_position_embeddings=32))
    with pytest.raises(InputError, match=r"a sequence of 40 tokens, but the model has 32 positions. .*max_length=32"):
        quiet_trainer().fit(module, loader())


def test_sequences_beyond_the_context_are_said_once_and_packed_ones_within_it_are_not(
    tmp_path: Path, quiet_trainer: Make, recwarn: pytest.WarningsRecorder
) -> None:
    folder = tiny_pretrained(tmp_path, max_position_embeddings=32)

    def warned() -> list[str]:
        said = [str(warning.message) for warning in recwarn.list if "made for 32" in str(warning.message)]
        recwarn.clear()
        return said

    quiet_trainer().fit(SFTModule(folder), loader(position_ids=torch.arange(40).expand(2, 40) % 20))
    assert not warned()
    quiet_trainer(max_epochs=2).fit(SFTModule(folder), loader())
    [said] = warned()
    assert "a sequence of 40 tokens, and the model has been made for 32 (max_position_embeddings" in said


def test_on_a_device_the_host_waits_for_the_first_batch_and_longer_ones_alone() -> None:
    """Seen by what is compared: the meta device has no values, so looking at one is an error."""

    class Module:
        num_embeddings, training = 20, True

    def batch(length: int) -> Batch:
        ids = torch.zeros(1, length, dtype=torch.long, device="meta")
        return Batch(ids, ids, ids, ids.double())

    checks, module = OwnBatches(), Module()
    for length, training, is_looked_at in (
        (5, False, True),  # of the sanity check
        (4, True, True),
        (4, True, False),
        (3, True, False),
        (6, True, True),
        (5, False, False),
    ):
        module.training = training
        if is_looked_at:
            with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
                checks.check(module, batch(length))  # type: ignore[arg-type]  # what is asked of one
        else:
            checks.check(module, batch(length))  # type: ignore[arg-type]  # as above


ROW = torch.tensor([[1, 2, 3, 4]])
SHIFTED = torch.tensor([[2, 3, 4, -100]])


def of_windows(row: list[int], length: int) -> dict[str, torch.Tensor]:
    """Windows of a text as loaders for a cross-entropy make them, whose last label stands outside the window."""
    starts = range(len(row) - length)
    ids, labels = ([row[start + k : start + k + length] for start in starts] for k in (0, 1))
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


def plain(batch: Batch) -> dict[str, torch.Tensor]:
    return {"input_ids": batch.input_ids, "labels": batch.labels, "position_ids": batch.position_ids}


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": ROW, "labels": SHIFTED},
        plain(Batch.of({"input_ids": ROW, "labels": ROW})),
        of_windows([5, 6, 7, 8, 5, 5, 5, 9], 5),
        Batch(ROW, torch.tensor([[3, 4, -100, -100]]), torch.arange(4)[None], torch.ones(1, 4)),
    ],
    ids=["rows", "ours", "windows with repeated tokens", "a Batch"],
)
@pytest.mark.parametrize("loop", ["fit", "validate"])
def test_labels_that_are_shifted_twice_are_refused(pretrained: str, quiet_trainer: Make, batch: Any, loop: str) -> None:
    with pytest.raises(InputError, match=r"are shifted twice: .* labels\[i\] is input_ids\[i\], .*_sft.Batch\("):
        getattr(quiet_trainer(), loop)(SFTModule(pretrained), DataLoader([batch], batch_size=None))


def test_a_batch_whose_labels_are_not_shifted_is_refused(pretrained: str, quiet_trainer: Make) -> None:
    batch = Batch(ROW, ROW, torch.arange(4)[None], torch.ones(1, 4))
    with pytest.raises(InputError, match=r"are not shifted: .* labels\[i\] is input_ids\[i \+ 1\]"):
        quiet_trainer().fit(SFTModule(pretrained), DataLoader([batch], batch_size=None))


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": ROW, "labels": ROW},
        {"input_ids": ROW * 0, "labels": ROW * 0},
        {"input_ids": torch.tensor([[7, 7, 7, 8, 8]]), "labels": torch.tensor([[-100, 7, 7, 8, 8]])},
        {"input_ids": ROW, "labels": torch.tensor([[1, 90, 91, 4]])},
        {"input_ids": ROW[:, :2], "labels": ROW[:, :2]},
        Batch(ROW, SHIFTED, torch.arange(4)[None], (SHIFTED > 0).double()),
    ],
    ids=["plain", "one token", "repeated tokens", "labels that are no tokens of the row", "two tokens", "a Batch"],
)
def test_labels_at_their_own_places_are_taken(pretrained: str, quiet_trainer: Make, batch: Any) -> None:
    trainer = quiet_trainer()
    trainer.fit(SFTModule(pretrained), DataLoader([batch], batch_size=None))
    assert trainer.global_step == 1


@pytest.mark.parametrize("positions", [{}, {"position_ids": torch.tensor([[0, 1, 0, 1]])}])
def test_labels_of_padding_are_refused(pretrained: str, quiet_trainer: Make, positions: dict[str, Any]) -> None:
    batch = {"input_ids": ROW, "labels": ROW.clone(), "attention_mask": torch.tensor([[1, 1, 0, 0]]), **positions}
    with pytest.raises(InputError, match=r"^2 labels .* where attention_mask is 0, .*labels\[attention_mask == 0\] = "):
        quiet_trainer().fit(SFTModule(pretrained), DataLoader([batch], batch_size=None))
    batch["labels"][batch["attention_mask"] == 0] = -100  # what it says
    quiet_trainer().fit(SFTModule(pretrained), DataLoader([batch], batch_size=None))


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"the same shape \[B, N\], .* attention_mask \[1, 3\]"):
        Batch.of({"input_ids": ROW, "labels": ROW, "attention_mask": torch.ones(1, 3)})


def left_padded(pad: int, **more: Any) -> dict[str, Any]:
    """Two rows, the second one padded on the left."""
    ids = torch.tensor([[1, 2, 3, 4, 5], [pad, pad, 1, 2, 3]])
    return {"input_ids": ids, "labels": torch.where(ids == pad, -100, ids), **more}


class Data(LightningDataModule):
    """A batch, and the tokenizer that made it."""

    def __init__(self, batch: Any, pad: int) -> None:
        super().__init__()
        self.batch, self.tokenizer = batch, SimpleNamespace(pad_token_id=pad)

    def train_dataloader(self) -> Any:
        return DataLoader([self.batch], batch_size=None)


@pytest.mark.parametrize("pad", [258, 257, 0], ids=["padding", "end", "of the tokenizer"])
def test_rows_that_are_padded_on_the_left_are_refused(pretrained: str, quiet_trainer: Make, pad: int) -> None:
    said = rf"^Row 1 .* the token {pad} at least twice, .*padding_side = 'right'.*give position_ids"
    with pytest.raises(InputError, match=said):
        quiet_trainer().fit(SFTModule(pretrained), Data(left_padded(pad), pad if pad == 0 else 258))


@pytest.mark.parametrize(
    "batch",
    [
        left_padded(90),
        left_padded(258, position_ids=torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])),
        left_padded(258, position_ids=torch.arange(5).repeat(2, 1)),
        Batch.of(left_padded(258)),
        {key: value.flip(1) for key, value in left_padded(258).items()},
        {"input_ids": torch.tensor([[257, 2, 257]]), "labels": torch.tensor([[-100, -100, 257]])},
        {"input_ids": torch.tensor([[257, 257, 2]]), "labels": torch.tensor([[257, 257, 2]])},
        {"input_ids": torch.tensor([[1, 2], [258, 258]]), "labels": torch.tensor([[1, 2], [-100, -100]])},
    ],
    ids=["another token", "apart", "meant so", "Batch", "right", "one token", "trained tokens", "padding alone"],
)
def test_other_rows_that_begin_with_a_token_twice_are_taken(pretrained: str, quiet_trainer: Make, batch: Any) -> None:
    trainer = quiet_trainer()
    trainer.fit(SFTModule(pretrained), DataLoader([batch], batch_size=None))
    assert trainer.global_step == 1
