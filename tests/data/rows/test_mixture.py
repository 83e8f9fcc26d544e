from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from lightning.pytorch import Trainer

from lightning_sft import Mixture, Part, SFTDataModule, SFTModule
from lightning_sft.data.batches.split_plan import draw_of
from lightning_sft.data.tokens.dataset import load_split
from lightning_sft.data.tokens.encode_rows import EncodingConfig
from lightning_sft.demos import tiny_tokenizer
from lightning_sft.types import InputError

SHORT = [{"prompt": "Hi", "completion": "Yo"}] * 60
LONG = [{"prompt": "Hi", "completion": "Yo" * 30}] * 20


@pytest.mark.parametrize(
    ("parts", "settings", "message"),
    [
        ({}, {}, "has no parts"),
        ({"a": Part("a", share=1), "b": "b"}, {}, "'b' has none"),
        ({"a": Part("a", share=1)}, {"temperature": 2.0}, "not both"),
        ({"a": "a"}, {"temperature": 0.0}, "Mixture.temperature is 0.0; expected a number > 0"),
    ],
)
def test_what_makes_no_sense_is_refused(parts: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Mixture(parts, **settings)


@pytest.mark.parametrize("settings", [{"share": 0.0}, {"weight": -1.0}, {"weight": float("inf")}])
def test_shares_and_weights_are_positive_numbers(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match="expected a number > 0 and < inf"):
        Part("a", **settings)


def realized(mixture: Mixture) -> tuple[float, float]:
    """The share of the first part in the rows and in the targets of an epoch."""
    split = load_split("train", mixture, EncodingConfig(tiny_tokenizer()))
    drawn = draw_of(split, seed=0).epoch(0)
    targets = split.examples.num_targets[drawn]
    is_first = split.parts[drawn] == 0
    return is_first.mean(), targets[is_first].sum() / targets.sum()


def test_shares_are_of_the_rows_or_of_the_targets() -> None:
    parts = {"short": Part(SHORT, share=1), "long": Part(LONG, share=1)}
    assert realized(Mixture(parts))[0] == pytest.approx(0.5)
    assert realized(Mixture(parts, by="targets"))[1] == pytest.approx(0.5, abs=0.02)


def test_a_temperature_of_one_leaves_sizes_and_a_high_one_makes_parts_alike() -> None:
    parts = {"short": SHORT, "long": LONG}
    shares = [realized(Mixture(dict(parts), temperature=t))[0] for t in (1, 2, 1e6)]
    assert shares == pytest.approx([60 / 80, 60**0.5 / (60**0.5 + 20**0.5), 0.5], abs=0.01)


def test_a_row_of_several_sequences_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    text = [{"text": "x" * 200}]
    recipe = EncodingConfig(tiny_tokenizer(), max_length=50, overflow="split")
    split = load_split("train", Mixture({"a": Part(text * 3, share=1), "b": Part(SHORT[:3], share=1)}), recipe)
    assert draw_of(split, 0).counts == split.part_sizes
    assert split.part_sizes[0] > 10


def test_each_part_has_a_format_columns_and_a_weight_of_its_own() -> None:
    maths = Part([{"q": "1+1", "a": "2"}], columns={"prompt": "q", "completion": "a"}, weight=0.5)
    split = load_split("train", Mixture({"maths": maths, "chat": SHORT[:1]}), EncodingConfig(tiny_tokenizer()))
    assert [max(example.target_weights) for example in split.examples] == [0.5, 1.0]


def test_losses_of_parts_are_those_of_a_run_on_each_alone(
    pretrained: str, jsonl: Callable[..., str], quiet_trainer: Callable[..., Trainer]
) -> None:
    short, long = jsonl(SHORT[:7], "short.jsonl"), jsonl(LONG[:5], "long.jsonl")

    def losses(val: Any) -> dict[str, float]:
        trainer, module = quiet_trainer(), SFTModule(pretrained)
        trainer.validate(module, SFTDataModule(val=val, tokens_per_batch=150), verbose=False)
        return {name: value.item() for name, value in trainer.callback_metrics.items()}

    both = losses(Mixture({"short": short, "long": long}))
    assert both["val/loss/short"] == pytest.approx(losses(short)["val/loss"], rel=1e-6)
    assert both["val/loss/long"] == pytest.approx(losses(long)["val/loss"], rel=1e-6)
    counts = Counter(short=7 * 3, long=5 * 61)  # letters and the stop token
    mean = sum(both[f"val/loss/{name}"] * count for name, count in counts.items()) / counts.total()
    assert both["val/loss"] == pytest.approx(mean, rel=1e-6)


def test_a_part_without_a_usable_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "x", "completion": 7}))
    mixture = Mixture({"a": Part(SHORT), "b": str(tmp_path / "b.jsonl")})
    with pytest.raises(InputError, match="train, b: no row can be used"):
        load_split("train", mixture, EncodingConfig(tiny_tokenizer()), invalid_rows="skip")


def test_settings_without_an_effect_warn(
    pretrained: str, jsonl: Callable[..., str], quiet_trainer: Callable[..., Trainer]
) -> None:
    with pytest.warns(UserWarning, match="by=targets has no effect"):
        Mixture({"a": "a.jsonl"}, by="targets")
    val = Mixture({"a": Part(jsonl(SHORT), share=1)})
    with pytest.warns(UserWarning, match=r"no effect in data.val: there, every row is used once"):
        quiet_trainer().validate(SFTModule(pretrained), SFTDataModule(val=val), verbose=False)


def test_a_part_that_is_wrong_is_named() -> None:
    with pytest.raises(InputError, match="The part 'maths' of a mixture: Part has no 'path'; it has source"):
        Mixture({"chat": "a.jsonl", "maths": cast(Any, {"path": "b.jsonl"})})
    with pytest.raises(InputError, match=r"The part of b\.jsonl: data\.columns=.* 'promt' is no key of a format"):
        Part("b.jsonl", columns={"promt": "x"})
