"""A run that is interrupted anywhere resumes bit for bit; see tests/helpers/resuming.py for those that are killed."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import SGD, AdamW

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.checkpoints.resume import POSITION_KEY, RunPosition, RunState, seed_micro_batch
from lightning_sft.checkpoints.run_info import data_differences
from lightning_sft.data.rows.mixture import Mixture
from lightning_sft.demos import tiny_pretrained
from lightning_sft.training.schedules import learning_rate_factor
from lightning_sft.types import InputError
from tests.helpers.processes import fork
from tests.helpers.resuming import RUNS, TRAIN, Run, losses

Make = Callable[..., Trainer]


class InterruptionError(Exception):
    pass


class StopAt(Callback):
    """Interrupts in a forward pass, or in a batch of the validation, and counts batches of validations."""

    def __init__(self, micro_batch: int = 0, validation: int = 0) -> None:
        self.micro_batch, self.validation, self.validated = micro_batch, validation, []

    def on_train_batch_start(self, *args: Any) -> None:
        self.micro_batch -= 1
        if self.micro_batch == 0:
            raise InterruptionError

    def on_validation_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(trainer.global_step)
            if len(self.validated) == self.validation:
                raise InterruptionError


@pytest.fixture(scope="session")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama with dropout, as a Hugging Face folder."""
    return tiny_pretrained(tmp_path_factory.mktemp("pretrained") / "dropping", attention_dropout=0.3)


@pytest.fixture(scope="session")
def whole(dropping: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    RUNS["packed"].fit(dropping, folder)
    return folder


def assert_equal(whole: Path, other: Path) -> None:
    assert losses(whole) == losses(other)
    assert (whole / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
    own, others = (torch.load(folder / "weights", weights_only=True) for folder in (whole, other))
    assert all(torch.equal(own[name], others[name]) for name in own)


@pytest.mark.parametrize("micro_batch", [1, 6, 14, 15, 18], ids=["first", "inside", "last", "next epoch", "later"])
def test_a_run_goes_on_to_the_bit_wherever_it_was_interrupted(
    dropping: str, whole: Path, tmp_path: Path, micro_batch: int
) -> None:
    with pytest.raises(InterruptionError):
        RUNS["packed"].fit(dropping, tmp_path, StopAt(micro_batch))
    RUNS["packed"].fit(dropping, tmp_path)
    assert_equal(whole, tmp_path)


def test_a_validation_that_was_interrupted_is_run_again_as_a_whole(dropping: str, whole: Path, tmp_path: Path) -> None:
    full, stopped, resumed = StopAt(), StopAt(validation=5), StopAt()
    every_step = Run(every_n_train_steps=1)
    every_step.fit(dropping, tmp_path / "full", full)
    with pytest.raises(InterruptionError):
        every_step.fit(dropping, tmp_path / "stopped", stopped)
    trainer = every_step.fit(dropping, tmp_path / "stopped", resumed)
    in_a_pass = full.validated.count(full.validated[0])
    assert 5 % in_a_pass > 1, "the fifth batch has to be inside the second validation"
    assert resumed.validated == full.validated[in_a_pass * (5 // in_a_pass) :]
    assert_equal(whole, tmp_path / "stopped")
    assert torch.isfinite(trainer.callback_metrics["val/loss"])


def test_a_checkpoint_of_lightning_inside_a_step_replays_the_step(
    dropping: str, quiet_trainer: Make, tmp_path: Path
) -> None:
    def fit(*callbacks: Callback, ckpt_path: Any = None) -> list[torch.Tensor]:
        saver = ModelCheckpoint(tmp_path, filename="{step}", save_on_exception=True, every_n_train_steps=100)
        trainer = quiet_trainer(
            accumulate_grad_batches=4, max_epochs=2, enable_checkpointing=True, callbacks=[*callbacks, saver]
        )
        module = SFTModule(dropping, optimizer=partial(AdamW, lr=1e-2))
        trainer.fit(module, SFTDataModule(train=TRAIN, tokens_per_batch=150), ckpt_path=ckpt_path)
        return list(module.parameters())

    uninterrupted = fit()
    with pytest.raises(InterruptionError):
        fit(StopAt(7))  # the third of a step
    assert torch.load(tmp_path / "step=1.ckpt", weights_only=True)[POSITION_KEY]["micro_batches"] == 4
    assert all(torch.equal(a, b) for a, b in zip(fit(ckpt_path=tmp_path / "step=1.ckpt"), uninterrupted, strict=True))


class SaveIn(Callback):
    """Saves a checkpoint the n-th time that a hook is called."""

    def __init__(self, hook: str, number: int, path: Path) -> None:
        self.number, self.path = number, path
        setattr(self, hook, self.hook)

    def hook(self, trainer: Trainer, *args: Any) -> None:
        self.number -= not trainer.sanity_checking
        if self.number == 0:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    ("hook", "number", "at"),
    [
        ("on_train_start", 1, (0, 0, 0, False, False)),
        ("on_train_epoch_start", 2, (1, 0, 0, False, True)),
        ("on_before_optimizer_step", 2, (0, 1, 2, False, True)),
        ("on_validation_start", 2, (0, 2, 4, False, False)),
        ("on_validation_end", 2, (0, 2, 4, False, True)),
        ("on_train_epoch_end", 1, (1, 0, 0, False, True)),
    ],
)
def test_a_checkpoint_that_a_callback_saves_in_any_hook_is_resumed_from_to_the_bit(
    dropping: str, quiet_trainer: Make, tmp_path: Path, hook: str, number: int, at: tuple[int, int, int, bool, bool]
) -> None:
    def fit(*callbacks: Callback, ckpt_path: Any = None) -> list[torch.Tensor]:
        settings = {"accumulate_grad_batches": 2, "max_epochs": 2, "val_check_interval": 2}
        trainer = quiet_trainer(**settings, enable_checkpointing=True, callbacks=list(callbacks))
        module = SFTModule(dropping, optimizer=partial(AdamW, lr=1e-2))
        data = SFTDataModule(train=TRAIN, val=TRAIN[:2], tokens_per_batch=150)
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return list(module.parameters())

    path = tmp_path / "saved.ckpt"
    uninterrupted = fit(SaveIn(hook, number, path))
    saved = torch.load(path, weights_only=True)[POSITION_KEY]
    assert tuple(saved.values())[:5] == at
    assert all(torch.equal(a, b) for a, b in zip(fit(ckpt_path=path), uninterrupted, strict=True))


@pytest.mark.parametrize("saved_after_fit", [False, True])
def test_an_epoch_that_max_steps_has_cut_goes_on_when_it_is_raised(
    dropping: str, quiet_trainer: Make, tmp_path: Path, saved_after_fit: bool
) -> None:
    def fit(max_steps: int, ckpt_path: Any = None) -> tuple[Trainer, SFTModule]:
        saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
        trainer = quiet_trainer(
            max_steps=max_steps, max_epochs=5, accumulate_grad_batches=2, enable_checkpointing=True, callbacks=[saver]
        )
        module = SFTModule(dropping, schedule="constant", optimizer=partial(AdamW, lr=1e-2), warmup=0.0)
        trainer.fit(module, SFTDataModule(train=TRAIN, tokens_per_batch=150), ckpt_path=ckpt_path)
        return trainer, module

    trainer, _ = fit(10)  # an epoch has 7
    path = tmp_path / "step=10.ckpt"
    if saved_after_fit:
        trainer.save_checkpoint(path := tmp_path / "after.ckpt")
    _, resumed = fit(16, path)
    _, uninterrupted = fit(16)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), uninterrupted.parameters(), strict=True))


@pytest.mark.parametrize("data", [{}, {"streaming": True, "buffer_rows": 12}], ids=["planned", "stream"])
@pytest.mark.parametrize("limit", [4, 5])
def test_an_epoch_that_a_limit_has_cut_has_no_further_step_when_it_is_resumed_at_its_end(
    dropping: str, tmp_path: Path, limit: int, data: dict[str, Any]
) -> None:
    class StopAtEnd(Callback):
        """Interrupts when the checkpoint of the epoch's last step is there, and that of the epoch's end is not."""

        def on_train_epoch_end(self, *args: Any) -> None:
            raise InterruptionError

    settings = {"limit_train_batches": limit, "check_val_every_n_epoch": 3, **({"max_steps": 9} if data else {})}
    run = Run({"val": None, **data}, settings, every_n_train_steps=1)
    run.fit(dropping, tmp_path / "whole")
    with pytest.raises(InterruptionError):
        run.fit(dropping, tmp_path / "stopped", StopAtEnd())
    run.fit(dropping, tmp_path / "stopped")
    assert_equal(tmp_path / "whole", tmp_path / "stopped")


def test_settings_given_on_resuming_win_over_those_of_the_checkpoint(
    pretrained: str, quiet_trainer: Make, tmp_path: Path
) -> None:
    rates: list[float] = []

    class Rates(Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    def fit(max_epochs: int, lr: float, ckpt_path: Any = None) -> Trainer:
        callbacks = [Rates(), ModelCheckpoint(tmp_path, filename="{epoch}")]
        trainer = quiet_trainer(max_epochs=max_epochs, enable_checkpointing=True, callbacks=callbacks)
        module = SFTModule(pretrained, optimizer=partial(SGD, lr=lr, weight_decay=lr), schedule="linear", warmup=0.0)
        trainer.fit(module, SFTDataModule(train=TRAIN, tokens_per_batch=300), ckpt_path=ckpt_path)
        return trainer

    first = fit(1, lr=0.5)
    steps = first.global_step
    rates.clear()
    second = fit(3, 0.25, first.checkpoint_callback.best_model_path)
    expected = [0.25 * learning_rate_factor(step, 3 * steps, "linear", 0.0) for step in range(steps, 3 * steps)]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert second.optimizers[0].param_groups[0]["weight_decay"] == 0.25


def test_draws_differ_between_places_and_do_not_depend_on_what_was_drawn_before() -> None:
    def draws(*place: int) -> tuple[float, ...]:
        seed_micro_batch(*place)
        return torch.rand(1).item(), np.random.rand()

    places = [(s, e, n, r) for s in (0, 1) for e in (0, 1) for n in (0, 1, 2) for r in (0, 1)]
    drawn = [draws(*place) for place in places]
    assert len(set(drawn)) == len(places)
    torch.rand(7)
    assert [draws(*place) for place in reversed(places)] == drawn[::-1]


def test_seed_everything_decides_dropout_and_a_resumed_run_keeps_its_seed(
    dropping: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    with pytest.raises(InterruptionError):
        RUNS["packed"].fit(dropping, tmp_path, StopAt(8))
    first = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    assert first["seed"] == 5
    assert losses(tmp_path)[1] != losses(whole)[1]
    monkeypatch.setenv("PL_GLOBAL_SEED", "6")
    with pytest.warns(UserWarning, match=r"original seed, 5: seed_everything=6 has no effect"):
        RUNS["packed"].fit(dropping, tmp_path)
    assert json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[-1])["seed"] == 5


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"train": TRAIN[1:]}, "rows of data.train was 36, now 35. Resume"),
        ({"train": [*TRAIN[1:], TRAIN[0]]}, "36 sequences"),  # no setting differs
        ({"seed": 1}, "data.seed was 0, now 1. Resume"),
        ({"tokens_per_batch": 120}, "data.tokens_per_batch was 150, now 120. Resume"),
        (
            {"packing": "padded", "system": "Be kind.", "chat_template_kwargs": {"a": 1}},
            "data.packing was packed, now padded; data.system was the default, now Be kind.; data.chat_template_kwargs "
            "was the default, now {'a': 1}. Resume",
        ),
    ],
)
def test_other_data_are_refused_inside_an_epoch_by_name_and_allowed_between_two(
    dropping: str, tmp_path: Path, data: dict[str, Any], named: str
) -> None:
    other = Run(data)
    with pytest.raises(InterruptionError):
        RUNS["packed"].fit(dropping, tmp_path, StopAt(6))
    with pytest.raises(
        InputError, match="within epoch 0, and the data or their order have changed since: " + re.escape(named)
    ):
        other.fit(dropping, tmp_path)
    RUNS["packed"].fit(dropping, tmp_path, max_epochs=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The run resumes with its original seed")
        trainer = other.fit(dropping, tmp_path)
    assert trainer.current_epoch == 3


def test_another_temperature_of_a_mixture_is_named(dropping: str, tmp_path: Path) -> None:
    parts: Any = {"one": TRAIN[:12], "two": TRAIN[12:]}
    with pytest.raises(InterruptionError):
        Run({"train": Mixture(parts, temperature=2)}).fit(dropping, tmp_path, StopAt(6))
    with pytest.raises(InputError, match=r": temperature of data\.train was 2(\.0)?, now 3(\.0)?\. Resume"):
        Run({"train": Mixture(parts, temperature=3)}).fit(dropping, tmp_path)


def test_of_a_checkpoint_without_facts_no_setting_is_said_to_differ() -> None:
    assert data_differences(Trainer(accelerator="cpu", logger=False, enable_progress_bar=False), {}) == ""


@pytest.mark.parametrize("accumulate", [1, 3, 4])
def test_another_accumulation_inside_an_epoch_is_called_so_and_not_other_data(
    dropping: str, tmp_path: Path, accumulate: int
) -> None:
    with pytest.raises(InterruptionError):
        RUNS["packed"].fit(dropping, tmp_path, StopAt(6))
    expected = rf"1 ranks x 2 .* now they are 1 x {accumulate}, .* Set trainer.accumulate_grad_batches=2, or"
    with pytest.raises(InputError, match=expected):
        RUNS["packed"].fit(dropping, tmp_path, accumulate_grad_batches=accumulate)


def test_overfitting_takes_the_same_micro_batches_each_epoch_and_after_an_interruption(
    dropping: str, tmp_path: Path
) -> None:
    run = Run(trainer={"overfit_batches": 4})
    with pytest.raises(InterruptionError):
        run.fit(dropping, tmp_path, StopAt(7))
    run.fit(dropping, tmp_path)
    samples = [json.loads(line)["samples"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 6
    assert samples[:2] == samples[2:4] == samples[4:]


def place(**changes: Any) -> RunPosition:
    inside = {"epoch": 2, "steps": 3, "micro_batches": 12, "is_last": False, "is_validated": True}
    return RunPosition(**{**inside, "num_ranks": 2, "accumulate": 4, "seed": 0, "plan": "a", **changes})


def test_the_same_steps_can_be_divided_among_other_ranks() -> None:
    assert place().on(4, 2, "a") == place(num_ranks=4, accumulate=2, micro_batches=6)
    assert place().on(8, 1, "a") == place(num_ranks=8, accumulate=1, micro_batches=3)
    short = place(micro_batches=10, is_last=True, plan=None)  # an epoch that a limit has cut inside a step
    assert short.on(1, 8, None) == place(num_ranks=1, accumulate=8, micro_batches=20, is_last=True, plan=None)


def test_other_steps_are_refused_inside_an_epoch_with_the_setting_that_keeps_them() -> None:
    with pytest.raises(InputError, match=r"2 ranks x 4 .* now they are 4 x 4.*Set trainer.accumulate_grad_batches=2"):
        place().on(4, 4, "b")  # an epoch is filled up to whole steps, so its plan is another
    with pytest.raises(InputError, match=r"devices whose number divides 8"):
        place().on(3, 4, "a")
    begins = place(epoch=3, steps=0, micro_batches=0, num_ranks=3, plan="b")
    assert place(is_last=True).on(3, 4, "b") == begins
    assert place(steps=0, micro_batches=0).on(3, 4, "b") == replace(begins, epoch=2)


def test_another_order_of_the_data_is_refused_inside_an_epoch_alone_and_where_both_are_known() -> None:
    with pytest.raises(InputError, match=r"changed since: a; now b\. Resume"):
        place().on(2, 4, "b")
    with pytest.raises(InputError, match=r"changed since: data\.seed was 0\. Resume"):
        place().on(2, 4, "b", lambda: "data.seed was 0")
    assert place().on(2, 4, None) == place(plan=None)  # a stream
    assert place(plan=None).on(2, 4, "b") == place(plan="b")
    assert place(is_last=True).on(2, 4, "b") == place(is_last=True, plan="b")


def counters(position: RunPosition, accumulated: int, ready: int, now: int, steps: int) -> dict[str, Any]:
    """The counters of a position, where Lightning's say so many micro-batches in all, in the epoch, and steps."""
    saved = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu").fit_loop.state_dict()
    saved["epoch_loop.batch_progress"]["total"]["ready"] = ready
    saved["epoch_loop.batch_progress"]["current"]["ready"] = now
    saved["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"] = steps
    before = deepcopy(saved)
    found = position.counters(saved, accumulated)
    assert saved == before
    return found


def test_counters_are_those_of_the_last_whole_step() -> None:
    """In epoch 2, Lightning has fetched one more micro-batch than the 12 of three steps."""
    found = counters(place(), 4, ready=29, now=13, steps=7)
    batches = found["epoch_loop.batch_progress"]
    assert set(batches["total"].values()) == {28}
    assert set(batches["current"].values()) == {12}
    assert batches["is_last_batch"] is False
    begun = {"ready": 3, "started": 3, "processed": 2, "completed": 2}
    assert found["epoch_progress"]["current"] == found["epoch_progress"]["total"] == begun
    step = found["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    assert step == {"total": {"ready": 7, "completed": 7}, "current": {"ready": 3, "completed": 3}}
    assert found["epoch_loop.state_dict"]["_batches_that_stepped"] == 6
    validation = found["epoch_loop.val_loop.batch_progress"]
    assert set(validation["total"].values()) == set(validation["current"].values()) == {0}
    assert validation["is_last_batch"] is False


def test_counters_between_epochs_under_another_accumulation_and_before_a_validation_that_is_due() -> None:
    between = counters(place(steps=0, micro_batches=0), 4, ready=28, now=12, steps=7)
    assert set(between["epoch_progress"]["total"].values()) == {2}
    assert set(between["epoch_loop.batch_progress"]["total"].values()) == {16}
    assert between["epoch_loop.state_dict"]["_batches_that_stepped"] == 7
    halved = counters(place(accumulate=2, num_ranks=4, micro_batches=6), 4, ready=28, now=12, steps=7)
    assert set(halved["epoch_loop.batch_progress"]["total"].values()) == {14}
    due = counters(place(is_validated=False, is_last=True), 4, ready=28, now=12, steps=7)
    began = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    assert due["epoch_loop.val_loop.batch_progress"]["total"] == began
    assert due["epoch_loop.batch_progress"]["is_last_batch"] is True
    nothing_due = counters(place(is_validated=False, steps=0, micro_batches=0), 4, ready=28, now=12, steps=7)
    assert set(nothing_due["epoch_loop.val_loop.batch_progress"]["total"].values()) == {0}


def results(pretrained: str, folder: Path, plan: dict[str, Any], timeout: float = 500) -> dict[str, dict[str, Any]]:
    """What tests.helpers.resuming has found, in a process of its own: a forked one must not have computed gradients."""
    command = ["tests.helpers.resuming", pretrained, str(folder), json.dumps(plan)]
    [ended] = fork(*command, timeout=timeout, without=["PL_GLOBAL_SEED"])
    found = [json.loads(line) for line in ended.printed.splitlines() if line.startswith("{")]
    return {result["run"]: result for result in found}


def test_runs_that_are_killed_and_told_to_end_go_on_to_the_bit_and_with_other_ranks(
    dropping: str, tmp_path: Path
) -> None:
    plan: dict[str, Any] = {"packed": [["writing", 2], ["told", 3]], "ddp": [["told", 3]], "elastic": 0}
    plan |= {"ddp_four": [["step", 2]], "background": [["writing", 3]]}
    found = results(dropping, tmp_path, plan)
    for name in plan.keys() - {"elastic"}:
        assert found[name]["kills"] == len(plan[name])
        assert not found[name]["differ"]
    elastic = found["elastic"]
    assert set(elastic["ranks"]) == {1, 2}
    assert elastic["same_samples"]
    assert elastic["furthest"] < 1e-5


def fuzz(folder: Path, first_seed: int, resumes: int, timeout: float) -> dict[str, Any]:
    """What tests.fuzzing has found, in a process of its own."""
    command = ["tests.fuzzing", str(folder), str(first_seed), str(resumes)]
    [ended] = fork(*command, timeout=timeout, without=["PL_GLOBAL_SEED"])
    found: dict[str, Any] = json.loads(ended.printed.splitlines()[-1])
    return found


def test_runs_of_drawn_settings_are_the_same_when_they_are_interrupted(tmp_path: Path) -> None:
    found = fuzz(tmp_path, 0, 4, 500)
    assert found["resumes"] >= 4
    assert not found["differ"]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_two_hundred_resumes_of_drawn_settings_change_nothing(tmp_path: Path) -> None:
    found = fuzz(tmp_path, 0, 200, 7000)
    assert found["resumes"] >= 200
    assert not found["differ"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_and_more_kills_at_random_change_nothing(dropping: str, tmp_path: Path) -> None:
    found = results(dropping, tmp_path, dict.fromkeys(RUNS, 10))
    assert found.keys() == RUNS.keys()
    assert sum(result["kills"] for result in found.values()) >= 50
    assert not any(result["differ"] for result in found.values())


def test_ranks_draw_numbers_of_their_own_also_those_that_share_rows() -> None:
    """Else the dropout of the parts of a row would be the same."""
    state, seeds = RunState(), []
    state.seed = 5
    for rank in range(2):
        for part in range(2):
            strategy = SimpleNamespace(context=SimpleNamespace(rank=part, size=2))
            shares = {"rank": rank, "num_replicas": 2}
            trainer: Any = SimpleNamespace(distributed_sampler_kwargs=shares, current_epoch=3, strategy=strategy)
            state.seed_micro_batch(trainer, 7)
            seeds.append(torch.initial_seed())
            seed_micro_batch(5, 3, 7, len(seeds) - 1)
            assert torch.initial_seed() == seeds[-1]
    assert len(set(seeds)) == 4
