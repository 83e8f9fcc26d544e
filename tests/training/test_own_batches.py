"""Batches of a user's own loader are refused before the model computes with ids or positions that it does not have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
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
