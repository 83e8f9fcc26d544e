from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sft.data.rows.mixture import Mixture, Part
from lightning_sft.data.tokens.template_config import TemplateConfig, configure, for_inference
from lightning_sft.demos import CHATML, tiny_model, tiny_tokenizer
from lightning_sft.export.parity import (
    Agreement,
    Report,
    agreement,
    built_in,
    held_out,
    log_probs,
    sequences,
    unequal_ids,
    unequal_weights,
)
from lightning_sft.types import Conversation, InputError


def test_the_divergence_is_that_of_its_definition_over_the_targets() -> None:
    tokenizer, one, other = tiny_tokenizer(), tiny_model(seed=0), tiny_model(seed=1)
    examples = sequences(built_in()[:2], tokenizer)
    found = agreement("other", log_probs(one, examples), log_probs(other, examples))
    kls, same = [], []
    for example in examples:
        ids = torch.tensor([list(example.input_ids)])
        p, q = (model(ids).logits[0].double().softmax(-1).tolist() for model in (one, other))
        for i in range(1, len(example)):
            if example.target_weights[i] > 0:
                a, b = p[i - 1], q[i - 1]
                kls.append(sum(x * math.log(x / y) for x, y in zip(a, b, strict=True)))
                same.append(a.index(max(a)) == b.index(max(b)))
    assert found.mean_kl == pytest.approx(sum(kls) / len(kls), rel=1e-4)
    assert found.max_kl == pytest.approx(max(kls), rel=1e-4)
    assert found.top1 == sum(same) / len(same)
    assert found.mean_kl > 1e-3  # there was something to see


def test_the_least_change_of_a_weight_is_seen() -> None:
    one, other = tiny_model(), tiny_model()
    assert not unequal_weights(one, other)
    weight = other.model.layers[1].mlp.up_proj.weight.data
    weight[3, 5] = weight[3, 5].nextafter(torch.tensor(1.0))
    assert unequal_weights(one, other) == ["model.layers.1.mlp.up_proj.weight"]
    assert unequal_weights(one, tiny_model(num_hidden_layers=1))


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("user", "User").replace("m['role'] + '\n'", "m['role'] + ' '"),
        CHATML.replace("assistant\n", "assistant"),  # in the prompt of inference alone
    ],
)
def test_another_template_is_seen_by_the_ids(template: str) -> None:
    assert not unequal_ids(built_in(), tiny_tokenizer(), tiny_tokenizer())
    assert unequal_ids(built_in(), tiny_tokenizer(), tiny_tokenizer(template)) == ["#1", "#2", "#3", "#4"]


def test_ids_are_compared_as_rendered_in_the_training() -> None:
    trained, unconfigured = (tiny_tokenizer("{{ effort }}|" + CHATML) for _ in range(2))
    configure(trained, TemplateConfig({"effort": "low"}, thoughts="split"))
    thinking = {"role": "assistant", "content": "<think>t</think>b"}
    rows = [Conversation([{"role": "user", "content": "a"}, thinking], weights=[0, 1])]
    assert not unequal_ids(rows, trained, for_inference(trained))
    assert unequal_ids(rows, trained, trained)  # plain transformers would be told no effort
    assert unequal_ids(rows, trained, unconfigured)


def test_ids_of_a_template_that_writes_the_time_are_equal_at_any_time() -> None:
    clocks = [tiny_tokenizer("{{ strftime_now ('%f') }}" + CHATML) for _ in range(2)]
    assert not unequal_ids(built_in(), *clocks)


def test_a_report_fails_above_its_threshold_and_with_what_is_no_number() -> None:
    def failures(**found: Any) -> list[str]:
        return Report("rows", 1e-6, **found).failures

    assert not failures(models=[Agreement("reloaded", 1e-6, 1.0, 0.0)], live=1e-3)
    assert failures(models=[Agreement("reloaded", 2e-6, 1.0, 1.0)])
    assert failures(models=[Agreement("reloaded", math.nan, 1.0, 1.0)])
    assert failures(live=2e-3)
    assert failures(live=math.nan)
    assert failures(unequal_ids=["a:1"])
    assert failures(unequal_weights=["w"])


def test_rows_are_those_that_can_be_used_of_each_part(jsonl: Any) -> None:
    a = jsonl([{"prompt": f"{i}", "completion": "a"} for i in range(20)], "a.jsonl")
    b = jsonl('{"broken\n{"question": "b", "answer": "b"}\n{"no": 1}\n', "b.jsonl")
    columns = {"prompt": "question", "completion": "answer"}
    mixture = Mixture({"a": Part(a), "b": Part(b, format="prompt-completion", columns=columns)})
    found = held_out(mixture, most=6)
    assert [Path(row.provenance).name for row in found] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "b.jsonl:2"]
    with pytest.raises(InputError, match="No row of the data can be used"):
        held_out(Mixture({"": Part(jsonl('{"no": 1}\n', "c.jsonl"))}))


def test_long_rows_are_looked_at_up_to_a_limit() -> None:
    tokenizer = tiny_tokenizer()
    [row] = held_out(Mixture({"": Part([{"prompt": "x" * 50, "completion": "y" * 5000}])}))
    found = sequences([row, row], tokenizer)
    assert sum(weight > 0 for example in found for weight in example.target_weights) == 512
    assert all(len(example) <= 1024 for example in found)
    [row] = held_out(Mixture({"": Part([{"prompt": "x" * 5000, "completion": "y"}])}))
    with pytest.raises(InputError, match="has a target in its first 1024 tokens"):
        sequences([row], tokenizer)
