from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from lightning_sft.model.parallel.sharding import _check_unshared
from lightning_sft.types import InputError
from tests.architectures.configs import config_of


def test_layers_that_share_parameters_are_refused() -> None:
    _check_unshared(AutoModelForCausalLM.from_config(config_of("llama")))
    with pytest.raises(InputError, match="In ZambaForCausalLM layers share parameters, which FSDP2 cannot shard"):
        _check_unshared(AutoModelForCausalLM.from_config(config_of("zamba")))
