"""Adapters: their gradients are exact, they merge into what was trained, and a run goes on from them alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.data.batches.collate import collate
from lightning_sft.demos import tiny_model, tiny_pretrained
from lightning_sft.model.tuning.adapters import Lora, has_adapters, inject, merge
from lightning_sft.types import InputError
from tests.helpers.gradients import ROWS, Recorder, encoded, furthest

Make = Callable[..., Trainer]


def lora_module(pretrained: str, lora: Lora | None = None, **settings: Any) -> SFTModule:
    """One whose adapters are not 0, as they would be before the first step."""
    module = SFTModule(pretrained, lora=lora or Lora(r=4), **settings)
    module.configure_model()
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return module.eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(250, (2, 20), generator=torch.Generator().manual_seed(0))


ENDS = ["embed_tokens", "lm_head", "q_proj"]  # not tied


@pytest.mark.parametrize(
    "lora",
    [Lora(r=4), Lora(r=4, dora=True), Lora(r=4, rslora=True), Lora(r=4, targets=ENDS)],
    ids=["lora", "dora", "rslora", "ends"],
)
def test_gradients_of_adapters_are_those_of_the_formula(pretrained: str, lora: Lora) -> None:
    module = lora_module(pretrained, lora)
    module(collate(encoded(pretrained))).total.neg().backward()
    reference = lora_module(pretrained, lora).double()  # full logits, a loop over the rows and their targets
    for example in encoded(pretrained):
        logits = reference.model(input_ids=torch.tensor(example.input_ids)[None].long()).logits[0]
        pairs = zip(example.input_ids, example.target_weights, strict=True)
        targets = [(i, token, weight) for i, (token, weight) in enumerate(pairs) if weight > 0]
        sum(-weight * logits.log_softmax(-1)[i - 1, token] for i, token, weight in targets).backward()
    given, wanted = ([p.grad.double() for n, p in m.named_parameters() if p.requires_grad] for m in (module, reference))
    assert len(given) == (8 if lora.targets == ENDS else 3 * 14 if lora.dora else 2 * 14)
    assert furthest(given, wanted) < 1e-4
    assert all(p.grad is None for p in module.parameters() if not p.requires_grad)
    with torch.no_grad():
        ids = torch.arange(40)[None]
        trained = module.model(ids).logits
        assert torch.allclose(merge(module.model)(ids).logits, trained, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient_of_adapters(pretrained: str) -> None:
    found = []
    for on in (False, True):
        module = lora_module(pretrained, gradient_checkpointing=on).train()
        module(collate(encoded(pretrained))).total.backward()
        found.append([p.grad for p in module.parameters() if p.requires_grad])
    assert all(gradient.any() for gradient in found[0])
    assert furthest(*found) < 1e-6


def test_the_first_step_begins_at_the_pretrained_model(pretrained: str, ids: torch.Tensor) -> None:
    for lora in (Lora(), Lora(dora=True), Lora(rslora=True, init="gaussian")):
        module = SFTModule(pretrained, lora=lora)
        module.configure_model()
        plain = AutoModelForCausalLM.from_pretrained(pretrained)
        assert torch.allclose(module.model(ids).logits, plain(ids).logits, atol=1e-6)


def test_adapters_begin_with_the_same_values_on_every_rank(pretrained: str) -> None:
    before = torch.random.get_rng_state()
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        module = SFTModule(pretrained, lora=Lora())
        module.configure_model()
        states.append({n: p for n, p in module.named_parameters() if p.requires_grad})
    torch.random.set_rng_state(before)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{}, {"lora": Lora(r=4, dora=True)}, {"new_tokens": ["<|a|>", "<|b|>"]}, {"trained": ["*norm*"]}],
    ids=["lora", "dora", "new_tokens", "trained"],
)
def test_a_merged_model_is_plain_and_has_the_logits_of_the_trained_one(
    tmp_path: Path, ids: torch.Tensor, tied: bool, settings: dict[str, Any]
) -> None:
    pretrained = tiny_pretrained(tmp_path / "base", tie_word_embeddings=tied)
    module = lora_module(pretrained, **settings)
    model = module.model
    with torch.no_grad():
        ids[0, :4] = torch.tensor([259, 260, 5, 259])
        trained, untrained = model(ids).logits, AutoModelForCausalLM.from_pretrained(pretrained)(ids).logits
        assert has_adapters(model)
        assert merge(model) is model
        assert not has_adapters(model)
        merged = model(ids).logits
    assert (trained - untrained).abs().max() > 1e-2
    assert torch.allclose(merged, trained, atol=1e-5)
    model.save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert reloaded.state_dict().keys() == AutoModelForCausalLM.from_pretrained(pretrained).state_dict().keys()
    assert torch.equal(reloaded(ids).logits, merged)


def test_adapters_go_where_they_are_told_to(pretrained: str) -> None:
    def adapted(lora: Lora) -> set[str]:
        module = SFTModule(pretrained, lora=lora)
        module.configure_model()
        return {n.split(".lora_")[0].removeprefix("scorer.model.") for n, _ in module.named_parameters() if "lora" in n}

    everything = adapted(Lora())
    assert len(everything) == 2 * 7
    assert not any("lm_head" in name or "embed" in name for name in everything)
    assert adapted(Lora(targets=["q_proj"])) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    assert adapted(Lora(exclude=["mlp.up_proj"])) == {name for name in everything if "up_proj" not in name}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": Lora(targets=["q_proj", "qq"])}, r"names \['qq'\], which match no module"),
        ({"lora": Lora(exclude=["qq"])}, r"names \['qq'\]"),
        ({"lora": Lora(targets=["norm"])}, "cannot be put into LlamaForCausalLM"),
        ({"lora": Lora(), "frozen": ["*lora*"]}, "leaves nothing to train"),
    ],
)
def test_what_has_no_effect_is_refused(pretrained: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SFTModule(pretrained, **settings).configure_model()


def test_experts_have_adapters_too(tmp_path: Path, ids: torch.Tensor) -> None:
    settings = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    pretrained = tiny_pretrained(tmp_path / "base", "mixtral", **settings)
    module = lora_module(pretrained)
    example = encoded(pretrained)[0]
    module(collate([example])).total.neg().backward()
    given = {name: p.grad.double() for name, p in module.named_parameters() if p.requires_grad}
    assert len([name for name, gradient in given.items() if "experts" in name and gradient.any()]) == 2 * 2 * 2
    reference = lora_module(pretrained)  # grouped products of torch take no float64
    log_probs = reference.model(input_ids=torch.tensor(example.input_ids)[None].long()).logits[0].log_softmax(-1)
    pairs = enumerate(zip(example.input_ids, example.target_weights, strict=True))
    sum(-weight * log_probs[i - 1, token] for i, (token, weight) in pairs if weight > 0).backward()
    wanted = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}
    assert furthest(list(given.values()), list(wanted.values())) < 1e-4
    with torch.no_grad():
        trained = module.model(ids).logits
        assert torch.allclose(merge(module.model)(ids).logits, trained, atol=1e-5)
    module.model.save_pretrained(tmp_path / "merged")
    assert torch.allclose(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits, trained, atol=1e-5)
    with pytest.raises(InputError, match="does not work with lora_dropout"):
        SFTModule(pretrained, lora=Lora(dropout=0.1)).configure_model()


def test_adapters_on_tied_embeddings_are_refused(tmp_path: Path) -> None:
    pretrained = tiny_pretrained(tmp_path, tie_word_embeddings=True)
    for target in ("lm_head", "embed_tokens"):
        with pytest.raises(InputError, match="embeddings and head are tied"):
            SFTModule(pretrained, lora=Lora(targets=[target])).configure_model()


def test_only_what_is_trained_is_given_to_the_optimizer(pretrained: str, quiet_trainer: Make) -> None:
    module = SFTModule(pretrained, lora=Lora(r=2, dora=True), optimizer=Recorder)
    quiet_trainer(max_steps=1).fit(module, SFTDataModule(train=ROWS))
    groups = module.optimizers().param_groups
    assert [len(group["params"]) for group in groups] == [2 * 14, 14]  # DoRA's lengths are not decayed
    assert groups[1]["weight_decay"] == 0


def test_projections_that_kernels_read_past_an_adapter_get_none() -> None:
    model = tiny_model("mamba2", num_heads=4, head_dim=8, state_size=8, n_groups=1)
    inject(model, Lora(r=2))
    adapted = {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"in_proj"}
