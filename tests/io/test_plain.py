from __future__ import annotations

import pytest

from lightning_sft.io.plain import plain


def test_what_is_no_config_of_omegaconf_is_left_as_it_is() -> None:
    rows = [{"prompt": "Hi"}]
    assert plain(rows) is rows
    assert plain(None) is None


def test_configs_of_omegaconf_become_plain_with_their_interpolations() -> None:
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create({"a": {"b": [1, {"c": "x"}]}, "d": "${a.b}"})
    assert plain(config.d) == [1, {"c": "x"}]
    assert type(plain(config)["a"]["b"][1]) is dict
