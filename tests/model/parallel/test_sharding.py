from __future__ import annotations

from typing import Any, cast

import pytest
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_sft.model.parallel.sharding import _to_shard, check_sharded
from lightning_sft.types import InputError
from tests.architectures.configs import config_of


def test_each_layer_is_sharded_once() -> None:
    """Mamba declares its layers and the mixers in them."""
    model = AutoModelForCausalLM.from_config(config_of("mamba"))
    assert _to_shard(model) == list(model.backbone.layers)


def test_layers_that_share_parameters_are_refused() -> None:
    with pytest.raises(InputError, match="In ZambaForCausalLM layers share parameters, which FSDP2 cannot shard"):
        _to_shard(AutoModelForCausalLM.from_config(config_of("zamba")))


def test_a_model_that_was_loaded_whole_is_refused_where_the_strategy_shards_it() -> None:
    """With a strategy that shards it later, each rank would train a model of its own, as it did once."""
    whole = nn.Linear(2, 2)
    check_sharded(whole, None)
    with pytest.raises(InputError, match=r"loaded before its trainer was known .* Pass a new SFTModule"):
        check_sharded(whole, cast(Any, object()))
