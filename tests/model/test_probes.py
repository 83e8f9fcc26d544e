"""What is measured on a model: real architectures with tiny random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lightning_sft.data.batches.collate import collate
from lightning_sft.demos import tiny_model
from lightning_sft.model.backbone import backbone_and_head, hidden_states
from lightning_sft.model.probes import ProbeResult, probe
from lightning_sft.objective import log_likelihood
from lightning_sft.types import Batch, Example, InputError

TRANSFORMED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("gemma2", {"final_logit_softcapping": 2.0, "initializer_range": 2.0}),
    ("cohere", {"logit_scale": 0.125}),
    ("granite", {"logits_scaling": 4.0}),
    ("nanochat", {}),
    ("gpt2", {}),
    ("qwen3", {}),
]


def examine(model: PreTrainedModel) -> ProbeResult:
    return probe(model, *backbone_and_head(model))


def examples() -> list[Example]:
    torch.manual_seed(0)
    return [Example(torch.randint(256, (n,)).tolist(), [0.0, *[1.0] * (n - 1)]) for n in (9, 20, 5)]


@pytest.mark.parametrize(("model_type", "config"), TRANSFORMED)
def test_the_likelihood_is_that_of_the_models_own_logits(model_type: str, config: dict[str, Any]) -> None:
    model = tiny_model(model_type, **config).eval()
    backbone, head = backbone_and_head(model)
    found = examine(model)
    [example, *_] = examples()
    batch = collate([example])
    with torch.no_grad():
        hidden = hidden_states(backbone, batch.input_ids, batch.position_ids)
        total, _ = log_likelihood(hidden, head, batch.labels, scale=found.scale, softcap=found.softcap)
        loss = model(input_ids=batch.input_ids, labels=batch.input_ids).loss  # transformers' own mean
    assert -total.item() / 8 == pytest.approx(loss.item(), rel=1e-5)


def test_a_wrong_transform_would_change_the_likelihood_of_these_models() -> None:
    model = tiny_model("gemma2", final_logit_softcapping=2.0, initializer_range=2.0).eval()
    backbone, head = backbone_and_head(model)
    batch: Batch = collate(examples())
    with torch.no_grad():
        hidden = hidden_states(backbone, batch.input_ids, batch.position_ids)
        right, wrong = (log_likelihood(hidden, head, batch.labels, softcap=cap).total for cap in (2.0, None))
    assert abs(right / wrong - 1) > 0.01


def test_logits_that_are_not_a_known_function_of_the_head_are_refused() -> None:
    model = tiny_model()
    forward = model.forward

    def shifted(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits**2
        return output

    model.forward = shifted
    with pytest.raises(InputError, match="not the output of its head, scaled or soft-capped in a known way"):
        examine(model)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mistral", "qwen3", "gpt2", "phi3"])
def test_packed_documents_are_computed_as_if_each_were_alone(model_type: str) -> None:
    model = tiny_model(model_type)
    backbone, _ = backbone_and_head(model)
    batch = collate(examples())
    assert examine(model).isolates_documents
    model.eval()
    packed = hidden_states(backbone, batch.input_ids, batch.position_ids)[0]
    alone = [hidden_states(backbone, torch.tensor([e.input_ids]))[0] for e in examples()]
    assert (packed - torch.cat(alone)).abs().max() <= 1e-5 * packed.abs().max()


@pytest.mark.parametrize("model_type", ["opt", "bloom"])
def test_architectures_that_leak_between_documents_are_found_out(model_type: str) -> None:
    assert not examine(tiny_model(model_type)).isolates_documents


def test_a_model_that_sees_the_future_is_refused() -> None:
    with pytest.raises(InputError, match="lets tokens attend to later tokens"):
        examine(tiny_model("bert", pad_token_id=0))


def test_probing_leaves_the_mode_as_it_was() -> None:
    model = tiny_model().train()
    examine(model)
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_feature_a_thousand_times_as_large_hides_no_leak(dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    backbone, _ = backbone_and_head(model)
    with torch.no_grad():
        backbone.norm.weight[3] = 1000.0  # an outlier dimension, as trained models have
    assert examine(model).isolates_documents

    def leaky(module: Any, given: Any, output: Any) -> Any:
        hidden = output.last_hidden_state
        others = torch.ones_like(hidden)
        others[..., 3] = 0
        leak = 0.05 * hidden[:, :1].roll(1, -1).clamp(-1, 1) * others  # of the row's first token, whatever its document
        output.last_hidden_state = hidden + leak if hidden.shape[1] > 12 else hidden
        return output

    backbone.register_forward_hook(leaky)
    assert not examine(model).isolates_documents
