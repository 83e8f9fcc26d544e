"""Losses of subclasses: exact however a step is split, in chunks, and refused where they are not per target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lightning_sft import SFTModule, log_likelihood
from lightning_sft.data.batches.collate import collate
from lightning_sft.demos import tiny_pretrained
from lightning_sft.training.losses import TargetLosses
from lightning_sft.types import InputError
from tests.helpers.gradients import ROWS, capacity_for, encoded, fit, furthest
from tests.helpers.likelihoods import Operations, large_case
from tests.helpers.losses import SETTINGS, applied, models, wanted
from tests.helpers.pages import blocks, page
from tests.helpers.processes import torchrun

TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pretrained")
    models(path)
    return path


@pytest.fixture(scope="module")
def given(folder: Path) -> tuple[str, str]:
    return str(folder / "student"), str(folder / "teacher")


@pytest.mark.parametrize("name", SETTINGS)
def test_the_gradient_of_a_loss_of_the_page_is_that_of_the_whole_however_it_is_split(
    given: tuple[str, str], name: str
) -> None:
    lengths, whole = [len(example) for example in encoded(given[0])], wanted(name, *given)
    for packing, num in (("packed", 8), ("packed", 1), ("padded", 5)):
        capacity = capacity_for(lengths, num) if packing == "packed" else max(lengths) * 2
        data = {"packing": packing, "tokens_per_batch": capacity}
        run = applied(name, *given, data, accumulate_grad_batches=12)
        assert sum(map(bool, run.consumed)) == num
        assert furthest(run.gradients, [whole]) <= TOLERANCE


def test_two_ranks_apply_the_gradient_of_the_whole(folder: Path, given: tuple[str, str]) -> None:
    torchrun("tests.helpers.losses", str(folder))
    for name in SETTINGS:
        (first, own), (second, other) = (torch.load(folder / f"{name}.rank{rank}") for rank in (0, 1))
        assert sorted(row for micro in own + other for row in micro) == sorted(f"row {i + 1}" for i in range(len(ROWS)))
        assert sum(map(len, own)) > 0 < sum(map(len, other))
        assert furthest(first, [wanted(name, *given)]) <= TOLERANCE
        assert torch.equal(first[0], second[0])


class InPlace(SFTModule):
    """A temperature, written into the logits."""

    def target_loss(self, logits: Tensor, targets: Tensor, *inputs: Tensor) -> Tensor:
        logits /= 2
        return F.cross_entropy(logits, targets, reduction="none")


class OutOfPlace(SFTModule):
    def target_loss(self, logits: Tensor, targets: Tensor, *inputs: Tensor) -> Tensor:
        return F.cross_entropy(logits / 2, targets, reduction="none")


def test_a_loss_may_change_its_logits_in_place(given: tuple[str, str]) -> None:
    data = {"tokens_per_batch": 4096}
    one, other = (fit(given[0], data, kind=kind) for kind in (InPlace, OutOfPlace))
    assert torch.equal(one.gradients[0], other.gradients[0])


class Spelled(SFTModule):
    """The default loss, as a loss of a subclass."""

    def target_loss(self, logits: Tensor, targets: Tensor, *inputs: Tensor) -> Tensor:
        return super().target_loss(logits, targets)


def test_the_default_loss_is_the_one_in_closed_form(given: tuple[str, str]) -> None:
    settings: dict[str, Any] = {"data": {"tokens_per_batch": 150}, "precision": "64-true"}
    own, default = (fit(given[0], kind=kind, **settings).gradients for kind in (Spelled, SFTModule))
    assert len(own) > 1
    assert furthest(own, default) <= 1e-12


@pytest.mark.parametrize("chunk_size", [1, 7, None])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, 2.0)])
def test_a_loss_sees_the_logits_and_inputs_of_its_targets(
    chunk_size: int | None, scale: float, softcap: float | None
) -> None:
    hidden, head, labels = large_case(20, dtype=torch.float64)
    weights, inputs = torch.rand(labels.shape), torch.rand(*labels.shape, 3)

    def loss(logits: Tensor, targets: Tensor, more: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, reduction="none") * more[:, 1] + logits.square().mean(-1)

    logit_settings: dict[str, Any] = {"scale": scale, "softcap": softcap}
    own: dict[str, Any] = {"chunk_size": chunk_size, "loss": loss, "loss_inputs": [inputs]}
    found = log_likelihood(hidden, head, labels, weights, **logit_settings, **own)
    got = torch.autograd.grad(found.total, (hidden, head.weight))
    at = labels != -100
    logits = head(hidden[at]) * scale
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    total = -(weights[at].double() * loss(logits, labels[at], inputs[at])).sum()
    for ours, theirs in zip(got, torch.autograd.grad(total, (hidden, head.weight)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.total, total)
    plain = log_likelihood(hidden, head, labels, weights, **logit_settings)
    torch.testing.assert_close(found.log_probs, plain.log_probs)
    torch.testing.assert_close(found.entropy, plain.entropy)


def test_the_logits_of_all_targets_are_never_there() -> None:
    hidden, head, labels = large_case(64)
    targets = int((labels != -100).sum())
    with Operations((targets, 48)) as seen:
        log_likelihood(hidden, head, labels, chunk_size=8, loss=TargetLosses().target_loss).total.backward()
    assert not seen.made


@pytest.mark.parametrize(
    "loss",
    [lambda z, y: F.cross_entropy(z, y), lambda z, y: z, lambda z, y: z.detach().sum(-1)],
    ids=["mean", "V", "no"],
)
def test_a_loss_that_is_not_one_number_per_target_is_refused(loss: Any) -> None:
    hidden, head, labels = large_case(20)
    with pytest.raises(InputError, match="one number for each target"):
        log_likelihood(hidden, head, labels, loss=loss)


def test_validation_measures_the_likelihood(given: tuple[str, str]) -> None:
    """In evaluation mode a subclass gives what SFTModule gives, and in training its own loss."""
    from lightning_sft.data.batches.collate import collate
    from tests.helpers.losses import classes

    batch = collate(encoded(given[0])[:3])
    own, plain = (kind(given[0]) for kind in (classes()["LabelSmoothing"], SFTModule))
    for module in (own, plain):
        module.configure_model()
    assert own.eval()(batch).total == plain.eval()(batch).total
    assert own.train()(batch).total != plain.train()(batch).total


def test_inputs_of_a_loss_that_is_not_given_are_said(given: tuple[str, str]) -> None:
    class Half(SFTModule):
        def loss_inputs(self, batch: Any) -> Any:
            return [batch.target_weights]

    class Whole(Half):
        def target_loss(self, logits: Tensor, targets: Tensor, *inputs: Tensor) -> Tensor:
            return super().target_loss(logits, targets)

    with pytest.warns(UserWarning, match=r"Half.loss_inputs has no effect without a target_loss"):
        fit(given[0], kind=Half)
    fit(given[0], kind=Whole)  # a warning would be an error


class Hardest(SFTModule):
    """The half of the targets with the highest loss counts twice, the others not."""

    def target_loss(self, logits: Tensor, targets: Tensor, *inputs: Tensor) -> Tensor:
        losses = super().target_loss(logits, targets)
        return 2 * losses * (losses.detach() >= losses.detach().quantile(0.5))


class Tempered(SFTModule):
    """A temperature that would be trained, but for its gradient."""

    def __init__(self, pretrained: str, **settings: Any) -> None:
        super().__init__(pretrained, **settings)
        self.log_temperature = torch.nn.Parameter(torch.zeros(()))

    def target_loss(self, logits: Tensor, targets: Tensor, *inputs: Tensor) -> Tensor:
        return super().target_loss(logits / self.log_temperature.exp(), targets)


class OnStates(SFTModule):
    """A loss on hidden states, which would get no gradient."""

    def loss_inputs(self, batch: Any) -> list[Tensor]:
        assert self.scorer is not None
        return [self.scorer.hidden(batch)]

    def target_loss(self, logits: Tensor, targets: Tensor, *inputs: Tensor) -> Tensor:
        return super().target_loss(logits, targets) + 0.1 * inputs[0].pow(2).sum(-1)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Hardest, r"Hardest.target_loss of a target depends on those it is given with: \S+ among \d+, \S+ among \d+\."),
        (Tempered, r"Tempered.target_loss uses a parameter, which would not be trained"),
        (OnStates, r"OnStates.loss_inputs gives a tensor that needs a gradient"),
    ],
)
def test_a_loss_whose_gradient_would_be_another_is_refused(given: tuple[str, str], kind: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        fit(given[0], kind=kind)


class Noisy(SFTModule):
    """A loss that draws at random, and is not asked twice."""

    asked = 0

    def target_loss(self, logits: Tensor, targets: Tensor, *inputs: Tensor) -> Tensor:
        self.asked += 1
        losses = super().target_loss(logits, targets)
        return losses * torch.rand_like(losses)


def test_a_random_loss_is_not_held_against_another_draw(given: tuple[str, str]) -> None:
    module = Noisy(given[0])
    module.configure_model()
    module.train()
    batch = collate(encoded(given[0]))
    module(batch)
    once = module.asked
    module(batch)
    assert module.asked == 2 * once


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # of peft
def test_without_adapters_the_loss_sees_the_base_model(tmp_path: Path) -> None:
    """The loss of the page, against the formula with a model of its own for the base."""
    pytest.importorskip("peft")
    from lightning_sft.model.tuning.adapters import Lora

    scope: dict[str, Any] = {"__name__": "near"}
    text = next(block for block in blocks(page("howto/losses.md"), "python") if "class NearBase" in block)
    exec(text.partition("trainer = ")[0], scope)
    pretrained = tiny_pretrained(tmp_path / "base")
    module = scope["NearBase"](pretrained, strength=0.5, lora=Lora(r=2))
    module.configure_model()
    batch = collate(encoded(pretrained)[:3])
    at_begin = module.train()(batch)
    torch.testing.assert_close(at_begin.losses, -at_begin.log_probs)  # B is 0, so the model is its base
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1, generator=torch.Generator().manual_seed(0))
    found = module(batch)
    base = AutoModelForCausalLM.from_pretrained(pretrained)
    documents = [batch.document(number) for number in range(3)]

    def log_probs(model: Any) -> Tensor:
        of_documents = [(own.labels[0] != -100, model(input_ids=own.input_ids).logits[0]) for own in documents]
        return torch.cat([logits.detach().log_softmax(-1)[at] for at, logits in of_documents])

    log_p, log_q = map(log_probs, (module.model, base))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert kl.mean() > 1e-4
    torch.testing.assert_close(found.losses, -found.log_probs + 0.5 * kl, rtol=1e-4, atol=1e-5)
    found.total.backward()
    trained = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert trained
    assert all("lora" in name for name in trained)
