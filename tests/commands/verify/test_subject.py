"""What stands for the data is chosen deterministically; what is random is off, and nothing of the user's changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft.commands.verify.subject import choose, without_chance
from lightning_sft.demos import tiny_model
from tests.helpers.verifying import LORA, subject


@given(st.lists(st.integers(2, 300), min_size=1, max_size=40), st.integers(1, 8), st.integers(0, 3))
def test_the_longest_that_fits_and_the_shortest_are_chosen_and_the_rest_by_the_seed(
    lengths: list[int], most: int, seed: int
) -> None:
    tokens = 200
    chosen = choose(np.array(lengths), most, tokens, seed)
    assert chosen == choose(np.array(lengths), most, tokens, seed)
    assert 1 <= len(chosen) == len(set(chosen)) <= most
    sizes = [lengths[i] for i in chosen]
    assert sum(sizes) <= tokens or len(chosen) == 1
    fitting = [length for length in lengths if length <= tokens // 2]
    assert max(fitting, default=min(lengths)) in sizes
    assert min(lengths) in sizes or most == 1


def test_dropout_is_off_and_no_trained_parameter_is_zero() -> None:
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    without_chance(model)
    ids = torch.arange(9)[None]
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert model.training
    assert all(parameter.any() for parameter in model.parameters())


def test_the_plain_model_has_the_weights_of_the_loaded_one_and_the_users_module_stays(
    pretrained: str, tmp_path: Path
) -> None:
    found = subject(pretrained, tmp_path, **LORA)
    loaded, plain = found.loaded(), found.plain()
    assert loaded.model is not None
    own = plain.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in loaded.model.state_dict().items())
    assert plain.config._attn_implementation == "eager"
    assert found.module.scorer is None
    assert found.module.neftune_alpha == 5.0


def test_of_a_stream_the_first_rows_are_taken(pretrained: str, tmp_path: Path) -> None:
    data = {"streaming": True, "buffer_rows": 5, "tokens_per_batch": 100}
    assert len(subject(pretrained, tmp_path, data).data.splits["train"].examples) == 5
