"""Rows whose tokens are split over ranks have the likelihood and the gradient of whole rows."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from lightning_sft.model.parallel.context import Context
from lightning_sft.strategies import FSDP2Strategy
from lightning_sft.types import InputError
from tests.helpers.processes import torchrun
from tests.helpers.splitting import ARCHITECTURES

IN_FLOAT32 = ("a soft-cap", "windows in some layers", "sinks", "chunks", "experts")  # norms, routers or positions are


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("context") / "found.json"
    torchrun("tests.helpers.splitting", str(out), processes=request.param)
    result: dict[str, Any] = json.loads(out.read_text()) | {"size": request.param}
    return result


@pytest.mark.parametrize("name", [*ARCHITECTURES, "checkpointed", "compiled"])
def test_likelihood_and_gradient_are_those_of_whole_rows(found: dict[str, Any], name: str) -> None:
    assert found[name] < (1e-5 if name in IN_FLOAT32 else 1e-10)


@pytest.mark.parametrize("name", ["dropout", "dropout, checkpointed"])
def test_each_rank_drops_entries_of_its_own_tokens_as_one_process_would_with_their_masks_joined(
    found: dict[str, Any], name: str
) -> None:
    assert found[name] < 1e-10


def test_ranks_send_each_other_the_bytes_that_the_page_says(found: dict[str, Any]) -> None:
    counted, said = found["sent"]
    assert counted == said > 0


def test_layers_that_mix_tokens_in_other_ways_are_refused_before_training(found: dict[str, Any]) -> None:
    assert "mamba2" in found["recurrent"].lower()
    assert "context_parallel_size" in found["recurrent"]


def test_heads_that_the_ranks_cannot_share_are_refused_before_training(found: dict[str, Any]) -> None:
    assert f"context_parallel_size={found['size']} does not fit 3 attention heads on 3" in found["three heads"]


@pytest.mark.parametrize("length", [1, 3, 4, 7])
def test_the_parts_of_all_ranks_are_the_row_and_padding(length: int) -> None:
    ranks = [Context(rank, 4, None) for rank in range(4)]
    row = torch.arange(1, length + 1)[None].repeat(2, 1)
    joined = torch.cat([rank.part(row, fill=-100) for rank in ranks], 1)
    assert torch.equal(joined[:, :length], row)
    assert (joined[:, length:] == -100).all()
    positions, spans = ranks[0].padded(row - 1, [length, length])
    assert positions.shape == joined.shape
    assert sum(spans) == joined.numel()


def test_a_size_that_does_not_divide_the_devices_is_refused() -> None:
    strategy = FSDP2Strategy(context_parallel_size=2)
    strategy.num_nodes, strategy.parallel_devices = 1, [torch.device("cpu")] * 3
    with pytest.raises(InputError, match=r"context_parallel_size=2 does not divide the 3 data-parallel devices"):
        strategy.setup_environment()
