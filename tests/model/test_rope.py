"""Documents get the rotary frequencies of their own length, whatever else is or was in their batch."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_sft import SFTModule
from lightning_sft.data.batches.collate import collate
from lightning_sft.demos import tiny_pretrained
from lightning_sft.model.attention.masks import Rows
from lightning_sft.model.parallel.context import Context
from lightning_sft.types import Batch, Example

TRAINED = 24  # positions that the model was trained on, above which frequencies depend on the length
LENGTHS = (30, 10, 24, 25, 40, 23)
LONGROPE = {
    **{"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
    **{"factor": 8.0, "original_max_position_embeddings": TRAINED},
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("llama", {"rope_parameters": LONGROPE}),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": TRAINED}),
    "dynamic in some layers": (
        "gemma3_text",
        {
            "rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": PLAIN},
            **{"layer_types": ["full_attention", "sliding_attention"], "max_position_embeddings": TRAINED},
        },
    ),
}


def documents() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(256, (length,), generator=generator).tolist() for length in LENGTHS]
    return [Example(own, [0.0] + [1.0] * (len(own) - 1)) for own in ids]


def plain(examples: list[Example]) -> Batch:
    """As a collator of transformers pads them."""
    rows = [torch.as_tensor(example.input_ids) for example in examples]
    ids, labels = (torch.nn.utils.rnn.pad_sequence(rows, True, value) for value in (0, -100))
    return Batch.of({"input_ids": ids, "labels": labels, "attention_mask": (labels != -100).long()})


def alone(pretrained: str, example: Example) -> Tensor:
    """Log-probabilities of a document's tokens, by a model of transformers that has seen no other."""
    model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float64)
    ids = torch.as_tensor(example.input_ids)[None]
    found: Tensor = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    return found


@pytest.mark.parametrize("name", MODELS)
def test_each_document_is_computed_as_if_it_were_alone(tmp_path: Path, name: str) -> None:
    kind, settings = MODELS[name]
    pretrained = tiny_pretrained(tmp_path / "model", kind, initializer_range=0.5, **settings)
    module, examples = SFTModule(pretrained), documents()
    module.configure_model()
    module.double()
    with torch.no_grad():
        wanted = torch.cat([alone(pretrained, example) for example in examples])
        for batch in (collate(examples), collate(examples, packed=False), plain(examples), collate(examples)):
            assert (module(batch).log_probs - wanted).abs().max() <= 1e-5  # norms are computed in float32
        short = collate(examples[1:2])
        assert torch.equal(deepcopy(module)(short).log_probs, module(short).log_probs)


def test_ranks_that_share_a_row_know_how_long_documents_are() -> None:
    spans, positions = (5, 2), torch.tensor([[0, 1, 2, 3, 4, 0, 1]])
    parts = [Rows(positions, spans, Context(rank, 2, cast(Any, None))).lengths().tolist() for rank in (0, 1)]
    assert parts == [[[5, 5, 5, 5]], [[5, 2, 2, 0]]]
    assert Rows(torch.arange(4).repeat(2, 1), (4, 4), None, (4, 3)).lengths().tolist() == [[4] * 4, [3] * 4]
