# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import re
from dataclasses import fields

import pytest
from trl.scripts.utils import DatasetConfig

import trl_cuma
from trl_cuma.arguments import METHODS, TrainingParser
from trl_cuma.retired import RETIRED, advice

CONFIGS = [getattr(trl_cuma, f"CuMA{name}Config") for name in METHODS.values()]


def parsers_of(class_name: str) -> dict[type, set[str]]:
    """The configuration classes that a part of the table is for, with the keys that are known beside them."""
    if class_name == "DatasetConfig":
        return {DatasetConfig: {field.name for field in fields(DatasetConfig)}}
    configs = [config for config in CONFIGS if class_name in [base.__name__ for base in config.__mro__]]
    return {config: TrainingParser(config).known for config in configs}


@pytest.mark.parametrize("class_name", RETIRED)
def test_every_key_is_retired_and_every_replacement_is_a_field(class_name):
    parsers = parsers_of(class_name)
    assert parsers, f"no trainer's configuration is a {class_name}"
    for config, known in parsers.items():
        for key, today in RETIRED[class_name].items():
            assert key not in known, f"{config.__name__} reads {key!r}"
            assert set(re.findall(r"`([^`]+)`", today)) <= known, f"{key!r} for {config.__name__}: {today}"
            assert today.startswith(("`", "gone", "accelerate's"))
            assert advice(config, key) == today


def test_a_key_that_never_was_has_no_advice():
    assert advice(trl_cuma.CuMASFTConfig, "learning_rat") is None
    assert advice(trl_cuma.CuMASFTConfig, "rpo_alpha") is None  # DPO's
