from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.data.rows.messages import Converter, Reading
from lightning_sft.data.rows.mixture import Mixture, Part
from lightning_sft.data.tokens.dataset import load_split
from lightning_sft.data.tokens.encode import encode
from lightning_sft.data.tokens.encode_rows import EncodingConfig
from lightning_sft.demos import tiny_tokenizer
from lightning_sft.model.pretrained import load_tokenizer
from lightning_sft.types import Example, InputError

IDS = [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("row", "ids", "weights"),
    [
        ({"labels": [-100, -100, 7, 8]}, IDS, [0, 0, 1, 1]),
        ({"labels": IDS}, IDS, [0, 1, 1, 1]),
        ({"assistant_masks": [0, 0, 1, 1], "labels": None}, IDS, [0, 0, 1, 1]),
        ({"completion_mask": [False, True, True, False]}, IDS, [0, 1, 1, 0]),
        ({"loss_mask": [0, 0.5, 0, 2], "weight": 0.5}, IDS, [0, 0.25, 0, 1]),
        ({"completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 1, 0, 1]}, IDS, [0, 1, 0, 1]),
        ({"labels": [-100, 6, 7, -100], "attention_mask": [1, 1, 1, 0]}, IDS[:3], [0, 1, 1]),
        ({"labels": [-100, -100, 7, 8], "attention_mask": [0, 1, 1, 1]}, IDS[1:], [0, 1, 1]),
        ({"labels": IDS, "position_ids": [0, 1, 2, 3], "text": "x"}, IDS, [0, 1, 1, 1]),
    ],
)
def test_token_ids_are_an_example_as_they_are(row: dict[str, Any], ids: list[int], weights: list[float]) -> None:
    example = Converter().read({"input_ids": IDS, **row}, "f:1")
    assert isinstance(example, Example)
    assert (list(example.input_ids), list(example.target_weights)) == (ids, weights)
    assert example.provenance == "f:1"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": "x"}, "f:1: 'input_ids' must be a list of numbers, got str 'x'"),
        ({"input_ids": [1, 2.5, 3, 4]}, "'input_ids' must be a list of token ids, integers from 0"),
        ({"input_ids": [1, -2, 3, 4]}, "must be a list of token ids"),
        ({"input_ids": [1, 2**31, 3, 4]}, "must be a list of token ids"),
        (
            {"labels": IDS, "weight": 1e300},
            "the weight of a token times that of the row is 1e.300: a weight must",
        ),
        ({"loss_mask": [0, 1, 1e5, 1], "weight": 1e5}, "that of the row is 1e.10: a weight must be"),
        ({"loss_mask": [0, 1, 1e-20, 1], "weight": 1e-20}, "that of the row is 1e-40: a weight must be"),
        ({"input_ids": []}, "must be a list of token ids"),
        ({"labels": [6, 7, 8, -100]}, "they are shifted later.; at 0 they have 6 where the id is 5"),
        ({"labels": [-100, 7, 8]}, "'labels' has 3 values for 4 ids"),
        ({"labels": [123456789, 6, 7, 8]}, "at 0 they have 123456789 where the id is 5"),
        ({"labels": [-100, None, 7, 8]}, "'labels' must be a list of numbers"),
        ({"labels": [-100] * 4}, "no token of the row is to be trained"),
        ({"labels": [5, -100, -100, -100]}, "no token of the row is to be trained"),
        ({"loss_mask": [0, -1, 0, 1]}, "'loss_mask' must have 0, 1 or a positive weight for each id, got -1"),
        ({"labels": IDS, "attention_mask": [1, 0, 1, 1]}, "'attention_mask' must be 1 at one stretch"),
        ({"labels": IDS, "attention_mask": [0] * 4}, "'attention_mask' must be 1 at one stretch"),
        ({"labels": IDS, "attention_mask": [1, 1, 1, 0]}, "'attention_mask' is 0 at a token that is to be trained"),
        ({"labels": IDS, "position_ids": [0, 1, 0, 1]}, "'position_ids' do not count from 0: .* several documents"),
    ],
)
def test_what_is_no_row_of_token_ids_is_refused(row: dict[str, Any], message: str) -> None:
    given = {"input_ids": IDS, **row}
    if not given.keys() & {"labels", "loss_mask"}:
        given["labels"] = [-100, 6, 7, 8]
    with pytest.raises(InputError, match=message):
        Converter(Reading("tokens")).read(given, "f:1")


@pytest.mark.parametrize("last", [259, 99_999_999])
def test_an_id_that_the_tokenizer_has_not_is_refused_in_its_place(last: int, jsonl: Callable[..., str]) -> None:
    tokenizer = tiny_tokenizer()
    given = [5, len(tokenizer) - 1], [5, max(last, len(tokenizer))]
    path = jsonl([{"input_ids": ids, "labels": ids} for ids in given])
    split = load_split("train", path, EncodingConfig(tokenizer), invalid_rows="skip", cache=None)
    assert len(split.examples) == 1
    [refused] = split.account.refused
    assert re.search(rf":2: 'input_ids' has the id {given[1][1]:,}, but those of the tokenizer are from 0 to", refused)


@pytest.mark.parametrize(
    "row", [{"input_ids": [5, 6], "labels": [5, 6]}, {"prompt": "q", "completion": "a"}, {"text": "a"}]
)
def test_weights_that_are_too_large_together_are_refused(row: dict[str, Any], jsonl: Callable[..., str]) -> None:
    path = jsonl([{**row, "weight": weight} for weight in (1e5, 1e300, 1)])
    given = Mixture({"a": Part(path, weight=1e5)})
    split = load_split("train", given, EncodingConfig(tiny_tokenizer()), invalid_rows="skip", cache=None)
    first, second = split.account.refused
    assert re.search(r":1: a weight times that of the data set is 1e\+10: a weight must be 0, or", first)
    assert re.search(r":2: .*the (weight of the )?row is 1e\+300: a weight must be 0, or a number from 1e-30", second)


def test_token_ids_have_no_messages() -> None:
    with pytest.raises(InputError, match="f:1: a row of token ids has no messages"):
        Converter()({"input_ids": IDS, "labels": IDS}, "f:1")


@pytest.mark.parametrize("normalize", ["token", "sequence"])
def test_training_on_token_ids_is_training_on_the_texts_that_they_are_of(
    pretrained: str, quiet_trainer: Callable[..., Trainer], normalize: Any
) -> None:
    texts: list[dict[str, Any]] = [{"prompt": f"Say {i}", "completion": "ha" * i} for i in range(1, 6)]
    tokenizer = load_tokenizer(pretrained)
    ids = []
    for row in texts:
        [example] = encode(Converter()(row, "row"), tokenizer)
        ids.append({"input_ids": example.input_ids, "loss_mask": [float(w > 0) for w in example.target_weights]})
    weights = []
    for rows in (texts, ids):
        seed_everything(0)
        module = SFTModule(pretrained, normalize=normalize)
        quiet_trainer(max_steps=3).fit(module, SFTDataModule(rows, tokens_per_batch=64))
        weights.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    assert torch.equal(*weights)
