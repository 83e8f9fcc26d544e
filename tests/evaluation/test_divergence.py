from __future__ import annotations

import pytest
import torch

from lightning_sft.data.batches.collate import collate
from lightning_sft.demos import tiny_model
from lightning_sft.evaluation.divergence import divergence, likeliest
from lightning_sft.model.backbone import backbone_and_head
from lightning_sft.model.likelihood import LikelihoodModel
from lightning_sft.model.probes import probe
from lightning_sft.types import Example

BATCH = collate([Example(list(range(20, 60)), [0.0] * 5 + [1.0] * 35)], packed=False)


def scorer(seed: int, **config: float) -> LikelihoodModel:
    model = tiny_model(seed=seed, **config).eval()
    return LikelihoodModel(model, probe(model, *backbone_and_head(model)))


@torch.no_grad()
def whole(before: LikelihoodModel, now: LikelihoodModel) -> torch.Tensor:
    """KL over the whole vocabulary, from the logits of transformers."""
    p, q = (one.model(BATCH.input_ids).logits[0, 4:39].double().log_softmax(-1) for one in (before, now))
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("softcap", [None, 2.0])
@torch.no_grad()
def test_with_the_whole_vocabulary_it_is_the_divergence_and_with_less_a_lower_bound(softcap: float | None) -> None:
    config = {} if softcap is None else {"model_type": "gemma2", "final_logit_softcapping": softcap}
    before, now = scorer(0, **config), scorer(1, **config)
    assert before.findings.softcap == now.findings.softcap == softcap
    for head in (before, now):
        backbone_and_head(head.model)[1].weight.mul_(20)
    wanted = whole(before, now)
    exact = divergence(now, BATCH, *likeliest(before, BATCH, 10_000))
    tolerance = 1e-6 + 1e-5 * wanted.max().item()  # log-probabilities are kept in float32
    assert torch.allclose(exact, wanted, atol=tolerance)
    last = torch.zeros_like(wanted)
    for most in (1, 8, 64, 200):
        bound = divergence(now, BATCH, *likeliest(before, BATCH, most))
        assert (bound >= last - 1e-6).all()  # finer partitions have more of it
        assert (bound <= wanted + tolerance).all()
        last = bound
    assert divergence(before, BATCH, *likeliest(before, BATCH, 32)).max() < 1e-6
