# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""PEFT's tests of configs: saving, loading, copying, task types, versions."""

import pytest

from trl_cuma import CuMAConfig

from .cases import HUB, ROUTINGS, SMALL
from .upstream import reparametrize, upstream_module

config = upstream_module("test_config")

TestPeftConfig = reparametrize(
    config.TestPeftConfig,
    {
        "config_class, mandatory_kwargs": [
            pytest.param(CuMAConfig, SMALL | {"routing": routing}, id=routing) for routing in ROUTINGS
        ],
        "config_class": [pytest.param(CuMAConfig, id="joint")],
    },
    minimum=20,
    also=["test_from_peft_type"],
    skip=dict.fromkeys(
        ("test_from_pretrained", "test_from_pretrained_cache_dir", "test_save_pretrained_with_runtime_config"), HUB
    ),
)
