from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from lightning_sft.model.parallel.sharding import _to_shard
from lightning_sft.types import InputError
from tests.architectures.configs import config_of


def test_each_layer_is_sharded_once() -> None:
    """Mamba declares its layers and the mixers in them."""
    model = AutoModelForCausalLM.from_config(config_of("mamba"))
    assert _to_shard(model) == list(model.backbone.layers)


def test_layers_that_share_parameters_are_refused() -> None:
    with pytest.raises(InputError, match="In ZambaForCausalLM layers share parameters, which FSDP2 cannot shard"):
        _to_shard(AutoModelForCausalLM.from_config(config_of("zamba")))
