from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import pytest
import torch

from lightning_sft.data.batches.collate import collate
from lightning_sft.evaluation.metrics import NUM_SUMS, CorpusLikelihood, metrics_by_part, sums_by_part, target_positions
from lightning_sft.objective import log_likelihood
from lightning_sft.types import Batch, Example


def test_figures_are_of_the_corpus_however_it_is_split_into_batches() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(30, 6), torch.randn(11, 6)
    labels = torch.randint(11, (30,))
    results = []
    for sizes in ((30,), (1, 29), (10, 7, 13)):
        metric, begin = CorpusLikelihood(), 0
        for size in sizes:
            part = slice(begin, begin + size)
            metric.update(log_likelihood(hidden[part], head, labels[part]))
            begin += size
        results.append(metric.compute())
    logits = (hidden @ head.T).double()
    loss = torch.nn.functional.cross_entropy(logits, labels)
    for result in results:
        assert result["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
        assert result["perplexity"].item() == pytest.approx(loss.exp().item(), rel=1e-6)
        assert result["token_accuracy"].item() == pytest.approx((logits.argmax(-1) == labels).double().mean().item())
        entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
        assert result["entropy"].item() == pytest.approx(entropy.item(), rel=1e-6)


def documents() -> list[Example]:
    """Of two data sets: answers of several lengths, weighted ones, and answers that stand in another sequence."""
    torch.manual_seed(1)
    made = []
    of_documents = [
        [(2, 1.0), (13, 1.0)],
        [(1, 0.5)],
        [(1003, 1.0)],
        [(3, 2.0), (4, 0.0), (5, 1.0)],
        [(1, 1.0 + turn) for turn in range(12)],
    ]
    for number, answers in enumerate(of_documents):
        ids, weights = [3], [0.0]
        for length, weight in answers:
            ids += [4, *torch.randint(11, (length,)).tolist()]
            weights += [0.0, *[weight] * length]
        made.append(Example(ids, weights, f"row {number}", answers_before=3 if number == 1 else 0))
    return made


def expected(examples: list[Example], log_probs: dict[tuple[str, int], float]) -> dict[str, float]:
    """The figures by a loop over the tokens of each document."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for number, example in enumerate(examples):
        turn, position = example.answers_before, 0
        for i, weight in enumerate(example.target_weights):
            if weight == 0:
                position = 0
                continue
            turn, position = turn + (position == 0), position + 1
            names = {1: "1", 10: "2-10", 100: "11-100", 1000: "101-1000", math.inf: "1001_and_later"}
            at = next(name for last, name in names.items() if position <= last)
            answer = str(turn) if turn < 10 else "10_and_later"
            for name in ("loss", f"loss_turn/{answer}", f"loss_position/{at}", f"loss/{'ab'[number % 2]}"):
                sums[name][0] -= weight * log_probs[example.provenance, i]
                sums[name][1] += weight
    return {name: total / weight for name, (total, weight) in sums.items()}


def of_predictions(examples: list[Example], hidden: dict[str, torch.Tensor], head: torch.Tensor) -> tuple[float, float]:
    """Mean entropy of the predictions, and the share of targets that are predicted, by a loop over the targets."""
    entropies, correct = [], []
    for example in examples:
        for i, weight in enumerate(example.target_weights):
            if weight > 0:
                probabilities = (hidden[example.provenance][i - 1] @ head.T).double().softmax(-1)
                entropies.append(-(probabilities * probabilities.log()).sum().item())
                correct.append(int(probabilities.argmax()) == example.input_ids[i])
    return math.fsum(entropies) / len(entropies), sum(correct) / len(correct)


@pytest.mark.parametrize("packed", [True, False])
def test_losses_of_data_sets_turns_and_positions_are_those_of_a_loop_over_tokens(packed: bool) -> None:
    examples, hidden, head = documents(), {}, torch.randn(11, 6)
    by_token: dict[tuple[str, int], float] = {}
    for example in examples:
        hidden[example.provenance] = torch.randn(len(example), 6)
        log_probs = (hidden[example.provenance] @ head.T).double().log_softmax(-1)
        for i in range(1, len(example)):
            by_token[example.provenance, i] = log_probs[i - 1, example.input_ids[i]].item()
    token_bytes = torch.arange(11)
    metric = CorpusLikelihood(("a", "b"), token_bytes)
    for chosen in ([0, 1, 3], [2, 4]):
        batch = collate(
            [examples[i] for i in chosen], packed=packed, parts=[i % 2 for i in chosen], part_names=("a", "b")
        )
        states = torch.zeros(*batch.input_ids.shape, 6)
        begin = 0
        for row, i in enumerate(chosen):
            own = hidden[examples[i].provenance]
            states[0 if packed else row, begin : begin + len(own)] = own
            begin += len(own) if packed else 0
        metric.update(log_likelihood(states, head, batch.labels, batch.target_weights), batch)
    found = {name: value.item() for name, value in metric.compute().items()}
    wanted = expected(examples, by_token)
    trained = [(e, i) for e in examples for i, weight in enumerate(e.target_weights) if weight > 0]
    nll = -sum(by_token[e.provenance, i] for e, i in trained)
    wanted["perplexity"] = math.exp(nll / len(trained))
    wanted["bits_per_byte"] = nll / math.log(2) / sum(int(token_bytes[e.input_ids[i]]) for e, i in trained)
    entropy, accuracy = of_predictions(examples, hidden, head)
    assert found.pop("token_accuracy") == pytest.approx(accuracy, rel=1e-12)
    assert found.pop("entropy") == pytest.approx(entropy, rel=1e-6)
    assert found == pytest.approx(wanted, rel=1e-6)
    assert {"loss_turn/4", "loss_turn/10_and_later", "loss_position/1001_and_later"} <= wanted.keys()


def test_turns_are_left_out_where_every_conversation_has_one_answer() -> None:
    example: Any = Example([1, 2, 3], [0.0, 1.0, 1.0])
    metric, batch = CorpusLikelihood(), collate([example, example])
    metric.update(log_likelihood(torch.randn(1, 6, 4), torch.randn(5, 4), batch.labels, batch.target_weights), batch)
    of_corpus = {"loss", "token_accuracy", "entropy", "perplexity"}
    assert metric.compute().keys() == of_corpus | {"loss_position/1", "loss_position/2-10"}


def test_turns_are_there_from_the_second_answer_on() -> None:
    metric, batch = CorpusLikelihood(), collate([Example([1, 2, 3, 4], [0.0, 1.0, 0.0, 1.0])])
    metric.update(log_likelihood(torch.randn(1, 4, 4), torch.randn(5, 4), batch.labels, batch.target_weights), batch)
    assert {"loss_turn/1", "loss_turn/2"} <= metric.compute().keys()


def test_a_text_that_is_a_target_from_its_second_token_on_is_one_answer() -> None:
    texts = collate([Example([5, 6, 7], [0.0, 1.0, 1.0]), Example([8, 9], [0.0, 1.0])])
    assert [place.tolist() for place in target_positions(texts)] == [[1, 1, 1], [1, 2, 1]]
    empty = Batch.of({"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[-100, -100]])})
    assert [place.tolist() for place in target_positions(empty)] == [[], []]


def test_the_sums_of_a_batch_are_those_of_its_data_sets() -> None:
    torch.manual_seed(0)
    examples = [Example([1, 2, 3], [0.0, 1.0, 2.0]), Example([4, 5], [0.0, 0.5]), Example([6, 7, 8], [0.0, 0.0, 3.0])]
    hidden, head = torch.randn(1, 8, 4), torch.randn(9, 4)
    batch = collate(examples, parts=[1, 0, 1], part_names=("a", "b", "none"))
    likelihood = log_likelihood(hidden, head, batch.labels, batch.target_weights)
    everything, *of_parts = sums_by_part(likelihood, batch)
    log_probs, entropies = likelihood.log_probs.tolist(), likelihood.entropy.tolist()
    correct = likelihood.correct.tolist()
    for found, targets in ((everything, [0, 1, 2, 3]), (of_parts[0], [2]), (of_parts[1], [0, 1, 3]), (of_parts[2], [])):
        weights = [[1.0, 2.0, 0.5, 3.0][t] for t in targets]
        loss = -sum(w * log_probs[t] for w, t in zip(weights, targets, strict=True))
        rest = [sum(correct[t] for t in targets), len(targets), sum(entropies[t] for t in targets)]
        assert found.tolist() == pytest.approx([loss, sum(weights), *rest], rel=1e-6)
    for alone in (collate(examples), None):
        assert sums_by_part(likelihood, alone).shape == (1, NUM_SUMS)
        assert torch.allclose(sums_by_part(likelihood, alone)[0], everything)
    assert metrics_by_part(sums_by_part(likelihood, batch), batch.part_names).keys() == {
        *("loss", "token_accuracy", "entropy", "loss/a", "loss/b")
    }


def test_metrics_are_those_of_all_data_sets_together_and_a_loss_for_each_that_has_targets() -> None:
    totals = torch.tensor(
        [[12.0, 4.0, 2.0, 4.0, 8.0], [10.0, 2.0, 1.0, 3.0, 6.0], [2.0, 2.0, 1.0, 1.0, 2.0], [0.0] * 5]
    )
    found = {name: value.item() for name, value in metrics_by_part(totals, ("a", "b", "none")).items()}
    assert found == {"loss": 3.0, "token_accuracy": 0.5, "entropy": 2.0, "loss/a": 5.0, "loss/b": 1.0}
    assert not CorpusLikelihood(token_bytes=torch.ones(3)).state_dict()  # a checkpoint is not to hold the vocabulary


def test_the_loss_of_a_data_set_is_the_own_loss_that_a_module_trains_on() -> None:
    batch = Batch.of({"input_ids": torch.tensor([[1, 2], [3, 1]]), "labels": torch.tensor([[-100, 2], [-100, 1]])})
    batch.parts, batch.part_names = (0, 1), ("a", "b")
    hidden, head = torch.randn(2, 2, 8), torch.randn(4, 8)
    found = log_likelihood(hidden, head, batch.labels, loss=lambda z, y: z.sum(-1) * 0 + y)
    metrics = metrics_by_part(sums_by_part(found, batch), batch.part_names)
    assert {name: metrics[name].item() for name in ("loss", "loss/a", "loss/b")} == {
        "loss": 1.5,
        "loss/a": 2.0,
        "loss/b": 1.0,
    }
