"""Optimizers of all kinds resume bit for bit: with state among their settings, with modes, and several as one."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.callbacks import OptimizerInBackward
from lightning_sft.training.optimizers import (
    DEFAULT_RATE,
    Chained,
    OptimizerPart,
    clip_gradients,
    make_optimizer,
    parameter_groups,
)
from lightning_sft.types import InputError
from tests.helpers import optimizing
from tests.helpers.gradients import ROWS, Recorder
from tests.helpers.processes import torchrun
from tests.training.test_optimizer_states import Rates

Make = Callable[..., Trainer]


class Estimating(Optimizer):
    """SGD whose rate it estimates itself and keeps in its groups, as Prodigy and D-Adaptation do."""

    def __init__(self, params: Any, lr: float = 1.0, d0: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "d": d0, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure else None
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["lr"] * group["d"])
            group["d"] *= 1.5
            group["k"] += 1
        return loss


class ScheduleFree(Optimizer):
    """Schedule-free SGD (Defazio et al. 2024): gradients at y, steps of z, and x, the mean of z, to evaluate."""

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "train_mode": False})

    def _move(self, to_train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != to_train:
                for parameter in group["params"]:
                    if "z" in self.state[parameter]:
                        weight = 1 - group["beta"] if to_train else 1 - 1 / group["beta"]
                        parameter.data.lerp_(self.state[parameter]["z"], weight)
                group["train_mode"] = to_train

    def train(self) -> None:
        self._move(True)

    def eval(self) -> None:
        self._move(False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure else None
        for group in self.param_groups:
            assert group["train_mode"]
            share = 1 / (group["k"] + 1)
            for y in group["params"]:
                z = self.state[y].setdefault("z", y.clone())
                y.lerp_(z, share).add_(y.grad, alpha=group["lr"] * (group["beta"] * (1 - share) - 1))
                z.sub_(y.grad, alpha=group["lr"])
            group["k"] += 1
        return loss


PARTS = [OptimizerPart(partial(Muon, lr=1e-2), ["*_proj.weight"]), OptimizerPart(partial(AdamW, lr=1e-3))]

KINDS: dict[str, dict[str, Any]] = {
    "state in groups": {"optimizer": Estimating},
    "modes": {"optimizer": ScheduleFree, "schedule": "constant"},
    "parts": {"optimizers": PARTS},
    "parts with modes": {
        "optimizers": [OptimizerPart(ScheduleFree, ["*norm*"]), OptimizerPart(partial(Adam, lr=1e-3))]
    },
    "in backward": {"optimizers": PARTS},
}


def fit(make: Make, pretrained: str, folder: Path, ckpt_path: Any = None, **settings: Any) -> Trainer:
    """Six steps, with a validation after every second, and a checkpoint after every third."""
    callbacks = settings.pop("callbacks", [])
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=settings.pop("every", 3), save_top_k=-1)
    trainer = make(
        max_steps=6,
        max_epochs=-1,
        enable_checkpointing=True,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        callbacks=[Rates(), saver, *callbacks],
    )
    data = SFTDataModule(train=ROWS, val=settings.pop("val", ROWS[:4]), tokens_per_batch=100)
    cls = settings.pop("module", SFTModule)
    trainer.fit(cls(pretrained, **{"warmup": 0.4, **settings}), data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def rates(trainer: Trainer) -> list[float]:
    return next(callback.seen for callback in trainer.callbacks if isinstance(callback, Rates))


def settings(trainer: Trainer) -> list[dict[str, Any]]:
    return [{n: v for n, v in group.items() if n != "params"} for group in trainer.optimizers[0].param_groups]


def everything(trainer: Trainer) -> list[Tensor]:
    """Each weight, followed by the optimizer's state of it."""
    [optimizer], found = trainer.optimizers, list[Tensor]()
    for parameter in trainer.lightning_module.parameters():
        found += [
            parameter.detach(),
            *(torch.as_tensor(value) for _, value in sorted(optimizer.state[parameter].items())),
        ]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_has_the_state_and_settings_of_a_whole_one(
    quiet_trainer: Make, pretrained: str, tmp_path: Path, kind: str
) -> None:
    more = {"callbacks": [OptimizerInBackward()]} if kind == "in backward" else {}
    whole = fit(quiet_trainer, pretrained, tmp_path / "one", **KINDS[kind], **more)
    more = {"callbacks": [OptimizerInBackward()]} if kind == "in backward" else {}
    resumed = fit(quiet_trainer, pretrained, tmp_path / "two", tmp_path / "one" / "step=3.ckpt", **KINDS[kind], **more)
    assert rates(resumed) == rates(whole)[3:]
    assert settings(resumed) == settings(whole)
    assert all(map(torch.equal, everything(whole), everything(resumed)))
    assert len(everything(whole)) == len(everything(resumed))


def test_state_among_the_settings_is_kept_when_one_of_them_is_changed(
    quiet_trainer: Make, pretrained: str, tmp_path: Path
) -> None:
    fit(quiet_trainer, pretrained, tmp_path, optimizer=Estimating)
    ckpt = tmp_path / "step=3.ckpt"
    resumed = fit(quiet_trainer, pretrained, tmp_path, ckpt, optimizer=partial(Estimating, lr=0.5), schedule="constant")
    assert rates(resumed) == [0.5] * 3
    assert [group["d"] for group in settings(resumed)] == pytest.approx([1e-3 * 1.5**6] * 2)


def test_neither_validations_nor_checkpoints_change_what_an_optimizer_with_modes_trains(
    quiet_trainer: Make, pretrained: str, tmp_path: Path
) -> None:
    runs = [
        fit(quiet_trainer, pretrained, tmp_path / str(every), optimizer=ScheduleFree, every=every, val=val)
        for every, val in ((1, ROWS[:4]), (100, None))
    ]
    assert all(map(torch.equal, *map(everything, runs)))


def test_what_an_optimizer_with_modes_evaluates_is_validated_saved_and_left_behind(
    quiet_trainer: Make, pretrained: str, tmp_path: Path
) -> None:
    seen: list[Tensor] = []

    class Seen(Callback):
        def on_validation_start(self, trainer: Any, module: Any) -> None:
            seen.append(torch.cat([p.detach().flatten() for p in module.parameters()]))

    trainer = fit(quiet_trainer, pretrained, tmp_path, optimizer=ScheduleFree, every=2, callbacks=[Seen()])
    for step, weights in zip((2, 4, 6), seen[-3:], strict=True):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["state_dict"]
        module = trainer.lightning_module
        found = torch.cat([saved[name].flatten() for name, _ in module.named_parameters()])
        assert torch.equal(found, weights)
    assert torch.equal(torch.cat([p.detach().flatten() for p in module.parameters()]), seen[-1])
    [optimizer] = trainer.optimizers
    optimizer.train()
    assert not torch.equal(torch.cat([p.detach().flatten() for p in module.parameters()]), seen[-1])


def test_a_checkpoint_of_another_optimizer_is_refused_by_name(
    quiet_trainer: Make, pretrained: str, tmp_path: Path
) -> None:
    fit(quiet_trainer, pretrained, tmp_path, optimizer=partial(AdamW, lr=1e-3))
    ckpt = tmp_path / "step=3.ckpt"
    with pytest.raises(InputError, match=r"state of AdamW, but model.optimizer is SGD"):
        fit(quiet_trainer, pretrained, tmp_path, ckpt, optimizer=partial(SGD, lr=1e-3))
    with pytest.raises(InputError, match=r"state of AdamW, but model.optimizer is Muon and AdamW"):
        fit(quiet_trainer, pretrained, tmp_path, ckpt, optimizers=PARTS)
    with pytest.raises(InputError, match=r"run with model.frozen=\[\], now"):
        fit(quiet_trainer, pretrained, tmp_path, ckpt, optimizer=partial(AdamW, lr=1e-3), frozen=["*.layers.0.*"])


@pytest.mark.parametrize("bare", [True, False])
def test_another_schedule_begins_at_the_learning_rate_that_was_asked_for(
    quiet_trainer: Make, pretrained: str, tmp_path: Path, bare: bool
) -> None:
    class Own(SFTModule):
        def configure_optimizers(self) -> Any:
            own: Any = None if bare else super().configure_optimizers()
            optimizer = self.make_optimizer() if bare else own["optimizer"]
            scheduler = CosineAnnealingLR(optimizer, T_max=6)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    whole = fit(quiet_trainer, pretrained, tmp_path, module=Own, optimizer=partial(AdamW, lr=1e-3))
    wanted = [1e-3 * (1 + torch.cos(torch.tensor(torch.pi * step / 6)).item()) / 2 for step in range(6)]
    assert rates(whole) == pytest.approx(wanted, rel=1e-5)
    resumed = fit(
        quiet_trainer, pretrained, tmp_path, tmp_path / "step=3.ckpt", module=Own, optimizer=partial(AdamW, lr=1e-3)
    )
    assert rates(resumed) == rates(whole)[3:]


def test_each_parameter_is_updated_by_the_first_part_that_names_it(
    quiet_trainer: Make, pretrained: str, tmp_path: Path
) -> None:
    monitor, logger = LearningRateMonitor("step"), CSVLogger(tmp_path)
    module = SFTModule(pretrained, optimizers=PARTS, warmup=0.0)
    trainer = quiet_trainer(max_steps=3, callbacks=[monitor], logger=logger, log_every_n_steps=1, gradient_clip_val=1.0)
    trainer.fit(module, SFTDataModule(train=ROWS, tokens_per_batch=100))
    names = {id(p): name for name, p in module.named_parameters()}
    [optimizer] = trainer.optimizers
    assert isinstance(optimizer, Chained)
    muon, adamw = optimizer.parts
    own = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert own == {name for name in names.values() if name.endswith("_proj.weight")}
    others = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert own | others == set(names.values())
    assert not own & others
    groups = ["Muon_decay", "AdamW_decay", "AdamW_no_decay"]
    assert [group["name"] for group in optimizer.param_groups] == groups
    assert set(monitor.lrs) == {f"lr-Chained/{name}" for name in groups}
    assert {round(g["lr"] / g["initial_lr"], 9) for g in optimizer.param_groups} == {0.0}


def test_parts_take_the_steps_that_each_would_take_alone() -> None:
    def weights() -> list[nn.Parameter]:
        return [nn.Parameter(torch.arange(6.0).view(2, 3) / 7), nn.Parameter(torch.ones(3))]

    together, alone = weights(), weights()
    chained = Chained([Muon([together[0]], lr=0.1), AdamW([together[1]], lr=0.2)])
    apart = [Muon([alone[0]], lr=0.1), AdamW([alone[1]], lr=0.2)]
    for _ in range(3):
        for one, other in zip(together, alone, strict=True):
            one.grad, other.grad = one.detach().cos(), other.detach().cos()
        chained.step()
        for optimizer in apart:
            optimizer.step()
    assert all(map(torch.equal, together, alone))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([OptimizerPart(SGD, ["*_proj.weight"])], r"No part of model.optimizers .* match model\.embed_tokens\.weight"),
        ([OptimizerPart(SGD, ["*.nothing"]), OptimizerPart(SGD)], r"the part with parameters=\['\*\.nothing'\]"),
        ([OptimizerPart(Muon)], r"Not matrices are .*norm.*An optimizer of matrices alone"),
    ],
    ids=["left over", "empty", "not matrices"],
)
def test_parts_that_do_not_fit_the_parameters_are_refused_by_name(
    pretrained: str, parts: list[OptimizerPart], message: str
) -> None:
    module = SFTModule(pretrained)
    module.configure_model()
    assert module.model is not None
    with pytest.raises(InputError, match=message):
        make_optimizer(parts, module.model.named_parameters())


def test_muon_for_all_parameters_is_one_message(quiet_trainer: Make, pretrained: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"matrices alone is one of model\.optimizers"):
        fit(quiet_trainer, pretrained, tmp_path, optimizer=Muon)


def test_states_keep_the_dtype_that_they_were_saved_in() -> None:
    class Wide(Optimizer):
        """Keeps a float32 state of parameters in bfloat16, which torch would round on loading."""

        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 1.0})
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["mean"] = torch.full_like(parameter, 1 / 3, dtype=torch.float32)

    named: Iterator[tuple[str, nn.Parameter]] = iter([("w", nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16)))])
    optimizer = make_optimizer(Wide, named)
    optimizer.load_state_dict(optimizer.state_dict())
    [state] = optimizer.state.values()
    assert torch.equal(state["mean"], torch.full((2, 2), 1 / 3))


def test_groups_have_names_of_their_own() -> None:
    layer = nn.Linear(2, 2)
    assert [group["name"] for group in parameter_groups(layer.parameters())] == ["decay", "no_decay"]


def test_parts_take_the_same_steps_under_ddp_and_fsdp2_and_resume_bit_for_bit(
    pretrained_for_two: str, tmp_path: Path
) -> None:
    optimizing.run(pretrained_for_two, "single", tmp_path)
    torchrun("tests.helpers.optimizing", pretrained_for_two, str(tmp_path), "ddp", "fsdp2")
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in optimizing.CASES}
    for losses, resumed, weights, resumed_weights in found.values():
        assert resumed == losses[3:]
        assert resumed_weights == weights != ""
        assert losses == pytest.approx(found["single"][0], rel=1e-4)


class CPUOffloadOptimizer(AdamW):
    """Stands for torchao's, which needs a GPU."""


def test_an_optimizer_that_copies_gradients_before_they_are_clipped_is_refused() -> None:
    with pytest.raises(InputError, match=r"CPUOffloadOptimizer copies each gradient .* cpu_offload=true"):
        make_optimizer(CPUOffloadOptimizer, nn.Linear(2, 2).named_parameters())


@pytest.mark.parametrize("make", [AdamW, partial(AdamW, weight_decay=0.1), partial(SGD, momentum=0.9)])
def test_a_learning_rate_that_nobody_has_set_is_said(
    pretrained: str, jsonl: Any, quiet_trainer: Make, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.warns(UserWarning, match=r"without a learning rate, so it is torch's default, 0.001; .* lr=2e-05"):
        quiet_trainer().fit(SFTModule(pretrained, optimizer=make), SFTDataModule(jsonl(ROWS), cache=None))
    assert re.search("Optimizer: (AdamW|SGD) with a learning rate of 0.001", caplog.text)


@pytest.mark.parametrize("settings", [{}, {"optimizer": partial(AdamW, lr=3e-4)}, {"optimizer": lambda p: AdamW(p)}])
def test_the_learning_rate_in_use_is_said(
    pretrained: str, jsonl: Any, quiet_trainer: Make, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        quiet_trainer().fit(module := SFTModule(pretrained, **settings), SFTDataModule(jsonl(ROWS), cache=None))
    assert not [one for one in said if "learning rate" in str(one.message)]
    rate = module.trainer.optimizers[0].param_groups[0]["initial_lr"]
    assert rate == (DEFAULT_RATE if not settings else rate)
    assert f"Optimizer: AdamW with a learning rate of {rate:g}" in caplog.text


def test_an_optimizer_made_of_no_weights_says_to_give_a_class(pretrained: str) -> None:
    module = SFTModule(pretrained)
    with (
        pytest.warns(UserWarning, match="no parameters yet: .* optimizer as a class or functools"),
        pytest.raises(ValueError, match="empty"),
    ):
        AdamW(module.parameters())
    module.configure_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = AdamW(module.parameters())
    for wrong in (made, {"lr": 1e-4}, "AdamW"):
        with pytest.raises(InputError, match=r"expected a function. .*functools.partial\(torch.optim.AdamW, lr=2e-5\)"):
            SFTModule(pretrained, optimizer=wrong)  # type: ignore[arg-type]  # what is tested


class First(SFTModule):
    """Trains its first layer alone, by what it hands to the optimizer."""

    def configure_optimizers(self) -> Any:
        return Recorder([{"params": [p for name, p in self.named_parameters() if "layers.0" in name]}])


def test_gradients_of_parameters_that_no_optimizer_has_are_neither_clipped_with_nor_logged(
    pretrained: str, quiet_trainer: Make
) -> None:
    """Nobody sets these to zero, so they would grow from step to step."""
    norms: list[float] = []

    class Norms(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            norms.append(trainer.callback_metrics["train/gradient_norm"].item())

    found = []
    for clip in (None, 1e-3):
        trainer = quiet_trainer(callbacks=[Norms()], gradient_clip_val=clip)
        trainer.fit(First(pretrained), SFTDataModule(train=ROWS, tokens_per_batch=150))
        found.append([gradient.norm().item() for gradient in trainer.optimizers[0].gradients])
    whole, clipped = found
    assert len(whole) > 2
    assert clipped == pytest.approx([1e-3] * len(whole), rel=1e-3)
    assert norms == pytest.approx(whole + whole, rel=1e-5)


def test_an_unknown_way_of_clipping_is_refused() -> None:
    with pytest.raises(InputError, match=r"gradient_clip_algorithm is 'norrm'; expected 'norm' or 'value'"):
        clip_gradients(SGD([nn.Parameter(torch.zeros(1))]), 1.0, "norrm")
