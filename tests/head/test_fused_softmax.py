"""The Triton kernel gives what the eager softmax of objective.py gives: under Triton's interpreter, without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sft import objective
from lightning_sft.head import fused_softmax
from tests.helpers import interpreting
from tests.helpers.processes import run

pytest.importorskip("triton", reason="the kernel needs Triton")
CASES = interpreting.cases()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("interpreted") / "results.pt"
    run([sys.executable, "-m", "tests.helpers.interpreting", str(out)])
    return torch.load(out)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_gives_what_the_eager_softmax_gives(results: Any, name: str) -> None:
    case, got = CASES[name], results[name]
    wanted = case.computed(objective._softmax_of_rows)
    assert torch.equal(got["correct"], wanted["correct"])
    for figure in ("log_probs", "entropy"):
        assert torch.allclose(got[figure], wanted[figure], rtol=1e-5, atol=5e-6, equal_nan=True), figure
    one_ulp = torch.finfo(case.raw.dtype).eps  # the interpreter truncates to bfloat16, a GPU rounds to the nearest
    assert got["gradient"].dtype == case.raw.dtype
    assert torch.allclose(
        got["gradient"].float(), wanted["gradient"].float(), rtol=max(1e-5, one_ulp), atol=1e-6, equal_nan=True
    )


def test_what_is_not_finite_shows_in_the_likelihood(results: Any) -> None:
    assert results["not finite"]["log_probs"].isfinite().tolist() == [False, False, False, False, True, False]


def test_without_a_place_of_its_own_the_logits_are_left_alone(results: Any) -> None:
    name = next(iter(CASES))
    assert torch.equal(results["apart"]["gradient"], results[name]["gradient"])


def test_a_chunk_may_have_more_than_2_to_the_31_logits(results: Any) -> None:
    log_probs = (torch.arange(48.0).view(3, 16) % 31).log_softmax(1)
    assert torch.allclose(results["far apart"]["log_probs"], log_probs[[0, 1, 2], [3, 4, 5]], rtol=1e-5)


@pytest.mark.parametrize("kind", ["matrix", "autograd"])
def test_a_likelihood_with_it_has_the_same_gradients(results: Any, kind: str) -> None:
    for got, wanted in zip(results["likelihoods"][kind], interpreting.likelihoods()[kind], strict=True):
        assert got.dtype == wanted.dtype
        assert torch.allclose(got.double(), wanted.double(), rtol=1e-4, atol=1e-6)


def test_it_compiles_for_a_gpu(tmp_path: Path) -> None:
    """The interpreter takes code that the compiler does not."""
    pytest.importorskip("triton", minversion="3.3", reason="compiling without a GPU was called otherwise before")
    run(
        [sys.executable, "-m", "tests.helpers.interpreting", str(tmp_path / "sizes.pt"), "compile"],
        without=["TRITON_INTERPRET"],
    )
    assert all(size > 0 for size in torch.load(tmp_path / "sizes.pt").values())


def test_cpus_and_float64_take_the_eager_softmax() -> None:
    assert not fused_softmax.fuses(torch.zeros(2, 3))
