from __future__ import annotations

import pytest
import torch

from lightning_sft.demos import tiny_model
from lightning_sft.model.parallel.rank_zero import FirstRank, whole_state


def test_alone_the_work_is_done_and_its_error_raised() -> None:
    assert FirstRank().is_here
    assert FirstRank()(lambda: "done") == "done"
    with pytest.raises(KeyError):
        FirstRank()(lambda: {}["missing"])
    result, error = FirstRank().tried(lambda: {}["missing"])
    assert (result, type(error)) == (None, KeyError)


def test_weights_are_copies_of_all_that_a_checkpoint_has() -> None:
    model = tiny_model(tie_word_embeddings=True)
    found = whole_state(model, keep=True)
    assert found.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(found[name], value)
        assert found[name].data_ptr() != value.data_ptr()
    assert not whole_state(model, keep=False)
