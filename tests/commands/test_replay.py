from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from lightning_sft import SFTModule
from lightning_sft.demos import tiny_pretrained
from lightning_sft.main import main
from lightning_sft.types import Batch, InputError, LogLikelihood


@pytest.fixture
def arguments(tmp_path: Path, jsonl: Any, rows: list[dict[str, str]]) -> list[str]:
    flags = {
        "model.pretrained": tiny_pretrained(tmp_path / "dropping", attention_dropout=0.3),
        "model.optimizer.lr": "0.05",
        "data.train": jsonl([*rows, {"prompt": "odd", "completion": "~~~~~~"}]),
        "data.tokens_per_batch": "100",
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": str(tmp_path / "run"),
        "trainer.accumulate_grad_batches": "2",
        "trainer.max_epochs": "2",
        "trainer.logger": "false",
        "trainer.enable_progress_bar": "false",
    }
    return [text for key, value in flags.items() for text in (f"--{key}", value)]


def logged(arguments: list[str]) -> list[dict[str, Any]]:
    root = Path(arguments[arguments.index("--trainer.default_root_dir") + 1])
    return [json.loads(line) for line in (root / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "stream", [[], ["--data.streaming", "true", "--data.buffer_rows", "8", "--trainer.max_steps", "8"]]
)
def test_a_step_is_found_again_with_dropout_and_all(
    arguments: list[str], stream: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["fit", *arguments, *stream, "--ckpt_path", "last"])
    lines = logged(arguments)
    of_epoch = next(line for line in lines if line["epoch"] == 1)  # the first of an epoch: there is a checkpoint
    replayed = main(["replay", *arguments, *stream, "--step", str(of_epoch["step"])]).result
    assert replayed.is_exact
    assert replayed.loss == pytest.approx(of_epoch["loss"], rel=1e-6)
    assert sum(sample.share for sample in replayed.samples) == pytest.approx(1.0)
    assert sorted(sample.provenance for sample in replayed.samples) == sorted(
        s for micro in of_epoch["samples"][0] for s in micro
    )
    first = main(["replay", *arguments, *stream, "--step", "1", "--rows", "1"]).result
    assert first.loss == pytest.approx(lines[0]["loss"], rel=1e-6)  # with the pretrained weights
    text = capsys.readouterr().out
    assert f"a loss of {of_epoch['loss']:.6f} was logged" in text
    assert first.samples[0].provenance in text
    assert f"{len(first.samples) - 1} more: --rows" in text


def test_without_the_weights_of_the_step_it_says_which_it_has_taken(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["fit", *arguments, "--ckpt_path", "last"])
    last = logged(arguments)[-1]
    replayed = main(["replay", *arguments, "--step", str(last["step"])]).result
    assert not replayed.is_exact
    assert replayed.loss != pytest.approx(last["loss"], rel=1e-4)
    assert "Weights: not those the step started from, but those after step" in capsys.readouterr().out


def test_other_data_are_refused(arguments: list[str], jsonl: Any, rows: list[dict[str, str]]) -> None:
    main(["fit", *arguments, "--ckpt_path", "last"])
    jsonl(rows[1:])
    with pytest.raises(InputError, match=r"The data have changed since step 2: rank 0 had .*, now "):
        main(["replay", *arguments, "--step", "2"])


def test_the_sample_with_the_highest_loss_is_the_first_of_equals(arguments: list[str]) -> None:
    main(["fit", *arguments, "--ckpt_path", "last", "--trainer.max_epochs", "6"])
    odd = next(x for x in logged(arguments)[-4:] if any(s.endswith(":13") for micro in x["samples"][0] for s in micro))
    samples = main(["replay", *arguments, "--step", str(odd["step"])]).result.samples
    assert max(samples, key=lambda sample: sample.loss).provenance.endswith(":13")


class Focused(SFTModule):
    """(−log Pr)² of each target."""

    def target_loss(self, logits: Tensor, targets: Tensor, *inputs: Tensor) -> Tensor:
        return super().target_loss(logits, targets) ** 2


class Raised(SFTModule):
    """An auxiliary loss beside that of the targets, as docs/howto/subclass.md has it."""

    def forward(self, batch: Batch) -> LogLikelihood:
        likelihood = super().forward(batch)
        return replace(likelihood, total=likelihood.total - 3 * likelihood.weight)


class Whole(SFTModule):
    """A loss of a micro-batch that is no sum over its samples."""

    def forward(self, batch: Batch) -> LogLikelihood:
        likelihood = super().forward(batch)
        return replace(likelihood, total=-(likelihood.total**2))


@pytest.mark.parametrize("kind", [Focused, Raised])
def test_the_shares_are_those_of_the_loss_of_the_module(
    arguments: list[str], kind: type[SFTModule], tmp_path: Path
) -> None:
    own = ["--model", f"{__name__}.{kind.__name__}", *arguments]
    own[own.index("--model.pretrained") + 1] = tiny_pretrained(
        tmp_path / "plain"
    )  # without dropout, which differs alone
    main(["fit", *own, "--ckpt_path", "last"])
    replayed = main(["replay", *own, "--step", "1"]).result
    assert replayed.loss == pytest.approx(logged(own)[0]["loss"], rel=1e-6)
    assert sum(sample.share for sample in replayed.samples) == pytest.approx(1.0)
    whole = sum(sample.loss * sample.num_targets for sample in replayed.samples)
    assert whole / sum(sample.num_targets for sample in replayed.samples) == pytest.approx(replayed.loss, rel=1e-5)
    for sample in replayed.samples:
        assert sample.share == pytest.approx(sample.loss * sample.num_targets / whole, rel=1e-5)


def test_a_loss_that_is_no_sum_over_samples_has_no_shares(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--model", f"{__name__}.Whole", *arguments]
    main(["fit", *own, "--ckpt_path", "last"])
    replayed = main(["replay", *own, "--step", "1"]).result
    assert {sample.share for sample in replayed.samples} == {None}
    assert "Whole.forward gives a loss that is no sum over samples" in capsys.readouterr().out


def test_no_ledger_is_one_message(arguments: list[str]) -> None:
    with pytest.raises(InputError, match=r"There is no samples.jsonl below .*run. Give its path with --ledger"):
        main(["replay", *arguments, "--step", "1"])
