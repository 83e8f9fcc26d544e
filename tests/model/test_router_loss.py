"""The auxiliary loss of routers is that of the formula, however a step is split; the balance of experts is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_sft import SFTModule
from lightning_sft.data.batches.collate import collate
from lightning_sft.demos import tiny_model, tiny_pretrained
from lightning_sft.model.experts import Routers, find_routers
from lightning_sft.types import Batch, InputError
from tests.helpers.composites import composite
from tests.helpers.gradients import capacity_for, encoded
from tests.helpers.processes import torchrun
from tests.helpers.routing import COEFFICIENT, EXPERTS, STRATEGIES, Run, distance, fit, mixture, wanted
from tests.helpers.slow import slow_but

TOLERANCE = 2e-5  # of float32
DEEPSEEK = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8} | {
    "num_key_value_heads": 2,
    "head_dim": 4,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
}
ALL = {"num_local_experts": 4, "num_experts_per_tok": 2}
READ: dict[str, tuple[dict[str, Any], str]] = {
    "mixtral": (ALL, "softmax"),
    "gpt_oss": (ALL, "softmax"),
    "granitemoe": (ALL, "softmax"),
    "qwen2_moe": ({**EXPERTS, "shared_expert_intermediate_size": 16}, "softmax"),
    "qwen3_moe": (EXPERTS, "softmax"),
    "olmoe": (EXPERTS, "softmax"),
    "deepseek_v2": ({**DEEPSEEK, "topk_method": "group_limited_greedy"}, "softmax"),
    "deepseek_v3": (DEEPSEEK, "sigmoid"),
    "glm4_moe": ({**DEEPSEEK, "head_dim": 8, "num_key_value_heads": 1}, "sigmoid"),
    "minimax_m2": (ALL, "sigmoid"),
    "llama4_text": ({"intermediate_size_mlp": 32, "num_local_experts": 4, "moe_layers": [0, 1]}, "sigmoid"),
}


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return mixture(tmp_path_factory.mktemp("pretrained") / "moe")


def check(pretrained: str, runs: list[Run], accumulate: int) -> None:
    """Every step has the gradient and the router loss of its rows, of all ranks."""
    first = runs[0]
    assert first.gradients
    for step, (gradient, metrics) in enumerate(zip(first.gradients, first.metrics, strict=True)):
        window = slice(step * accumulate, (step + 1) * accumulate)
        sources = [source for run in runs for micro in run.consumed[window] for source in micro]
        expected, router_loss = wanted(pretrained, sources)
        assert distance(gradient, expected) < TOLERANCE
        assert metrics["train/router_loss"] == pytest.approx(router_loss, rel=1e-5)


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_one_step_has_the_same_gradient_however_it_is_split(moe: str, packing: str) -> None:
    lengths, seen = [len(example) for example in encoded(moe)], []
    for num_micro_batches in (8, 3, 1):
        capacity = capacity_for(lengths, num_micro_batches)
        if packing == "padded":
            capacity = max(lengths) * -(-len(lengths) // num_micro_batches)
        data = {"packing": packing, "tokens_per_batch": capacity}
        run = fit(moe, data, {"accumulate_grad_batches": 12}, router_loss=COEFFICIENT)
        assert len(run.gradients) == 1
        check(moe, [run], 12)
        seen.append([run.metrics[0][f"train/{name}"] for name in ("expert_imbalance", "unused_experts")])
    assert seen[0] == pytest.approx(seen[1])
    assert seen[0] == pytest.approx(seen[2])


def test_every_step_of_an_epoch_is_exact(moe: str) -> None:
    run = fit(moe, {"tokens_per_batch": 150}, {"accumulate_grad_batches": 2}, router_loss=COEFFICIENT)
    assert len(run.gradients) > 2
    check(moe, [run], 2)


def test_the_loss_of_a_whole_micro_batch_would_be_caught(moe: str) -> None:
    """That of transformers over several documents is another function."""
    examples = encoded(moe)
    model = AutoModelForCausalLM.from_pretrained(moe)
    ids = torch.tensor([token for example in examples for token in example.input_ids])[None]
    positions = torch.cat([torch.arange(len(example)) for example in examples])[None]
    pooled = model(ids, position_ids=positions, output_router_logits=True, use_cache=False).aux_loss.item()
    _, of_documents = wanted(moe, [example.provenance for example in examples])
    assert abs(pooled - of_documents) > 0.01 * of_documents


@pytest.mark.parametrize("normalize", ["sequence", "dataset"])
def test_documents_weigh_what_their_targets_weigh(moe: str, normalize: str) -> None:
    run = fit(moe, {"tokens_per_batch": 150}, normalize=normalize, router_loss=COEFFICIENT)
    plain = fit(moe, {"tokens_per_batch": 150}, normalize=normalize)
    examples = {example.provenance: example for example in encoded(moe, normalize)}
    constant = sum(sum(e.target_weights) for e in examples.values()) / len(run.consumed)
    for step, sources in enumerate(run.consumed):
        weights = {source: sum(examples[source].target_weights) for source in sources}
        z = constant if normalize == "dataset" else sum(weights.values())
        of_loss = sum(_router_gradient(moe, source) * weight for source, weight in weights.items()) / z
        assert distance(run.gradients[step] - plain.gradients[step], of_loss) < 1e-4


def _router_gradient(pretrained: str, source: str) -> torch.Tensor:
    """COEFFICIENT · ∇ R_d of a row."""
    (whole, _), (without, _) = (wanted(pretrained, [source], coefficient) for coefficient in (COEFFICIENT, 0.0))
    return whole - without


class PlainBatches(LightningDataModule):
    """Batches of a Hugging Face collator, with a mask and without a normalizer."""

    def __init__(self, pretrained: str) -> None:
        super().__init__()
        self.pretrained = pretrained

    def train_dataloader(self) -> Any:
        return DataLoader(encoded(self.pretrained), batch_size=5, collate_fn=self.collate)

    def collate(self, examples: list[Any]) -> dict[str, Any]:
        longest = max(map(len, examples))
        ids = torch.tensor([[*e.input_ids, *[0] * (longest - len(e))] for e in examples])
        weights = torch.tensor([[*e.target_weights, *[0.0] * (longest - len(e))] for e in examples])
        mask = torch.tensor([[1] * len(e) + [0] * (longest - len(e)) for e in examples])
        return {"input_ids": ids, "labels": torch.where(weights > 0, ids, -100), "attention_mask": mask}


def test_batches_without_a_normalizer_are_exact_and_their_padding_does_not_count(moe: str) -> None:
    run = fit(moe, PlainBatches(moe), {"accumulate_grad_batches": 2}, router_loss=COEFFICIENT)
    sources = [example.provenance for example in encoded(moe)]
    run.consumed = [sources[i : i + 5] for i in range(0, 12, 5)]
    assert len(run.gradients) == 2
    check(moe, [run], 2)


def test_two_processes_are_exact_whole_and_sharded(moe: str, tmp_path: Path) -> None:
    torchrun("tests.helpers.routing", moe, str(tmp_path))
    for name in STRATEGIES:
        ranks = []
        for rank in (0, 1):
            run = Run(*torch.load(tmp_path / f"{name}.rank{rank}"))
            run.metrics = json.loads((tmp_path / f"{name}.rank{rank}.json").read_text())
            ranks.append(run)
        assert ranks[0].consumed != ranks[1].consumed
        check(moe, ranks, 2)
        assert ranks[0].metrics[0]["train/expert_imbalance"] == ranks[1].metrics[0]["train/expert_imbalance"]


def test_one_document_and_one_layer_of_experts_are_the_loss_of_transformers(tmp_path: Path) -> None:
    pretrained = mixture(tmp_path, num_hidden_layers=1, router_aux_loss_coef=0.3)
    module = SFTModule(pretrained, router_loss="config")
    module.configure_model()
    example = encoded(pretrained)[2]
    likelihood = module(collate([example]))
    objective = module.scorer.routers.objective(likelihood) / likelihood.weight
    objective.backward()
    model = AutoModelForCausalLM.from_pretrained(pretrained).train()
    ids = torch.tensor(example.input_ids)[None].long()
    labels = torch.where(torch.tensor(example.target_weights)[None] > 0, ids, -100)
    theirs = model(ids, labels=labels, output_router_logits=True, use_cache=False)
    theirs.loss.backward()
    assert torch.allclose(objective, theirs.loss, rtol=1e-6)
    own = dict(module.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert distance(own[name].grad, parameter.grad) < TOLERANCE, name


def test_a_sigmoid_router_has_the_loss_of_the_deepseek_paper(tmp_path: Path) -> None:
    pretrained = tiny_pretrained(tmp_path, "deepseek_v3", initializer_range=0.2, **DEEPSEEK)
    module = SFTModule(pretrained, router_loss=0.1)
    module.configure_model()
    seen: list[Any] = []
    module.model.model.layers[1].mlp.gate.register_forward_hook(lambda m, args, output: seen.append(output))
    batch = collate(encoded(pretrained)[:3])
    likelihood = module(batch)
    logits, _, chosen = seen[0]
    expected, begin = torch.zeros(()), 0
    for length, weight in zip(batch.spans, likelihood_weights(batch), strict=True):
        here = slice(begin, begin + length)
        s = logits[here].sigmoid()
        share = torch.stack([(chosen[here] == e).sum() for e in range(8)]) / length
        mean = (s / s.sum(1, keepdim=True)).mean(0)
        expected += weight * 8 * (share * mean).sum()
        begin += length
    assert likelihood.router_loss.item() == pytest.approx(expected.item(), rel=1e-5)


def likelihood_weights(batch: Batch) -> list[float]:
    """Σ w_t of each document of a packed batch."""
    return [float(part.sum()) for part in batch.target_weights[0].split(list(batch.spans))]


@pytest.mark.parametrize("architecture", READ)
def test_routers_are_read_by_what_they_return(architecture: str) -> None:
    settings, score = READ[architecture]
    model = tiny_model(architecture, **settings)
    found, reason = find_routers(model)
    assert found, reason
    assert {router.score for router in found} == {score}
    blocks = sum("Experts" in type(module).__name__ for module in model.modules())
    assert len(found) == blocks
    ids = torch.arange(3, 23)[None]
    routers = Routers(found)
    with routers.recording(), torch.no_grad():
        model(ids, use_cache=False)
    loss, load = routers.balance(Batch.of({"input_ids": ids, "labels": ids}))
    assert loss is None
    assert load.view(len(found), -1).sum(1).tolist() == [20 * found[0].num_chosen] * len(found)


def test_checkpointed_layers_count_once(moe: str) -> None:
    plain, recomputed = (
        fit(moe, {"tokens_per_batch": 300}, router_loss=COEFFICIENT, gradient_checkpointing=setting)
        for setting in (False, True)
    )
    assert all(map(torch.equal, plain.gradients, recomputed.gradients))
    for name in ("router_loss", "expert_imbalance", "unused_experts"):
        assert [m[f"train/{name}"] for m in plain.metrics] == [m[f"train/{name}"] for m in recomputed.metrics]
    assert not any("_routing" in vars(part) for part in recomputed.module.modules())  # no graph is kept


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")  # of transformers
@pytest.mark.parametrize("checkpointing", slow_but([True], [False, True]))
def test_layers_are_compiled_without_a_graph_break(moe: str, checkpointing: bool) -> None:
    batch = collate(encoded(moe)[:4])
    results = []
    for compiles in (False, True):
        module = SFTModule(moe, router_loss=COEFFICIENT, gradient_checkpointing=checkpointing)
        module.configure_model()
        for layer in module.model.model.layers if compiles else ():
            layer._compiled_call_impl = torch.compile(layer._call_impl, backend="aot_eager", fullgraph=True)
        with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):  # as model.kernels does
            likelihood = module(batch)
            module.scorer.routers.objective(likelihood).backward()
        results.append((likelihood, [p.grad for p in module.parameters()]))
        assert not any("_routing" in vars(part) for part in module.modules())
    (eager, of_eager), (compiled, of_compiled) = results
    assert torch.allclose(eager.router_loss, compiled.router_loss, rtol=1e-5)
    assert torch.equal(eager.expert_load, compiled.expert_load)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(of_eager, of_compiled, strict=True))


def test_adapters_get_the_gradient_of_the_loss_through_frozen_routers(moe: str) -> None:
    def gradients(router_loss: float | None) -> torch.Tensor:
        module = SFTModule(moe, lora={"r": 4, "targets": ["o_proj"]}, router_loss=router_loss)
        module.configure_model()
        torch.manual_seed(0)
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_()
        likelihood = module(collate(encoded(moe)[:4]))
        module.scorer.routers.objective(likelihood).backward()
        if router_loss:
            trained = [p for p in module.parameters() if p.requires_grad]
            of_loss.extend(torch.autograd.grad(module(collate(encoded(moe)[:4])).router_loss, trained))
        return torch.cat([p.grad.flatten() for p in module.parameters() if p.requires_grad])

    of_loss: list[torch.Tensor] = []
    both, plain = gradients(COEFFICIENT), gradients(None)
    expected = COEFFICIENT * torch.cat([gradient.flatten() for gradient in of_loss])
    assert expected.abs().max() > 1e-3
    assert distance(both - plain, expected) < 1e-4


def test_the_routers_of_a_composite_checkpoint_are_those_of_its_text(tmp_path: Path) -> None:
    module = SFTModule(composite(tmp_path, "llama4"), router_loss=0.1)
    module.configure_model()
    likelihood = module(collate(encoded(str(tmp_path))[:2]))
    likelihood.router_loss.backward()
    trained = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("router" in name for name in trained)


def test_the_loss_is_logged_by_itself_and_only_where_it_is_asked_for(moe: str) -> None:
    data = {"tokens_per_batch": 300}
    off, measured, on = (fit(moe, data, router_loss=value) for value in (None, 0.0, COEFFICIENT))
    assert "train/router_loss" not in off.metrics[0]
    assert measured.metrics[0]["train/router_loss"] == on.metrics[0]["train/router_loss"] > 2  # 2 = k is balanced
    assert all(map(torch.equal, off.gradients, measured.gradients))
    assert off.metrics[0]["train/loss"] == measured.metrics[0]["train/loss"] == on.metrics[0]["train/loss"]
    assert off.metrics[0]["train/expert_imbalance"] == on.metrics[0]["train/expert_imbalance"] > 1


def test_under_mixed_precision_the_loss_is_summed_in_float32(moe: str) -> None:
    exact, mixed = (
        fit(moe, {"tokens_per_batch": 300}, {"precision": precision}, router_loss=COEFFICIENT)
        for precision in ("32-true", "bf16-mixed")
    )
    for a, b in zip(exact.metrics, mixed.metrics, strict=True):
        assert a["train/router_loss"] == pytest.approx(b["train/router_loss"], rel=0.02)
    assert all(distance(b, a) < 0.2 for a, b in zip(exact.gradients, mixed.gradients, strict=True))
    module = SFTModule(moe, router_loss=COEFFICIENT)
    module.configure_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(collate(encoded(moe)[:2])).router_loss.dtype == torch.float32


def test_balance_counts_experts_of_all_layers() -> None:
    found, _ = find_routers(tiny_model("mixtral", **ALL))
    load = torch.tensor([6.0, 2.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0])
    metrics = Routers(found).metrics(torch.cat([torch.zeros(1), load]), 1.0)
    assert metrics["expert_imbalance"].item() == (3 + 1) / 2
    assert metrics["unused_experts"].item() == 2 / 8


def test_a_model_without_experts_or_with_unreadable_routers_is_refused(pretrained: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model.router_loss=0.01 cannot be .* LlamaForCausalLM: it has no experts"):
        SFTModule(pretrained, router_loss=0.01).configure_model()
    jetmoe = tiny_pretrained(tmp_path / "jetmoe", "jetmoe", kv_channels=8, **ALL)
    with pytest.raises(InputError, match="JetMoeTopKGating does not return the experts of each token"):
        SFTModule(jetmoe, router_loss=0.01).configure_model()
    SFTModule(jetmoe).configure_model()
    deepseek = tiny_pretrained(tmp_path / "deepseek", "deepseek_v3", **DEEPSEEK)
    with pytest.raises(
        InputError, match=r"has no router_aux_loss_coef. Give a number, such as model.router_loss=0.001"
    ):
        SFTModule(deepseek, router_loss="config").configure_model()
    with pytest.raises(InputError, match=r"model.router_loss is -1"):
        SFTModule(pretrained, router_loss=-1)
