from __future__ import annotations

import pytest
import torch

from lightning_sft.metrics import CorpusLikelihood
from lightning_sft.objective import log_likelihood


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
