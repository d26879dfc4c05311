# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Suites are read strictly, and the committed ones are sound."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from trl_cuma.bench import Reference, read_suite
from trl_cuma.bench.sources import GivenBase
from trl_cuma.planning.architecture import CONFIGS
from trl_cuma.testing import tiny_model

SUITES = sorted((Path(__file__).parents[2] / "benchmarks/suites").glob("*.yaml"))
SMALL = {
    "name": "small",
    "data": {"source": "simulated"},
    "base": {"model": {"architecture": "llama"}},
    "training": {"steps": 4, "select_every": 2},
    "tuning": {"worlds": [9], "learning_rates": [1e-3]},
    "reference": {"config": {"r": 2}, "target_modules": ["q_proj"]},
    "worlds": [0],
    "arms": [{"method": ["lora", "cuma"], "prompt_profile": [False, True]}],
}


PREPARED = {
    **SMALL,
    "data": {"source": "prepared", "path": "plain", "splits": ["test"]},
    "base": {"path": "base"},
    "arms": [{"method": ["lora", "cuma"]}],
}


def write(tmp_path, content) -> Path:
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_lists_stand_for_one_arm_each(tmp_path):
    suite = read_suite(write(tmp_path, SMALL))
    assert [arm.key for arm in suite.arms] == ["lora", "lora-prompt", "cuma", "cuma-prompt"]
    assert suite.tuning.alphas == (2.0,)
    assert suite.reference == Reference({"r": 2}, ["q_proj"])


def test_worlds_can_be_given(tmp_path):
    assert read_suite(write(tmp_path, SMALL), worlds=[7, 8]).worlds == (7, 8)


def test_arms_can_be_chosen(tmp_path):
    path = write(tmp_path, {**SMALL, "compare": [["cuma", "lora"], ["cuma", "marginal"]]})
    suite = read_suite(path, arms=["cuma"])
    assert ([arm.key for arm in suite.arms], suite.compare) == (["cuma"], [["cuma", "marginal"]])
    with pytest.raises(ValueError, match="no arm 'cumma'; did you mean 'cuma'"):
        read_suite(path, arms=["cumma"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [1]}, "Unknown key 'seeds' in the suite"),
        ({"training": {"step": 4}}, "Unknown key 'step' in training; did you mean 'steps'"),
        ({"training": {"steps": 5, "select_every": 2}}, "must be a multiple of"),
        ({"tuning": {"worlds": [], "learning_rates": [1e-3]}}, "`worlds` of a suite's tuning is empty"),
        ({"tuning": {"worlds": [1]}}, "lacks the key 'learning_rates'"),
        ({"data": {"source": "wvs"}}, "'wvs', expected .* 'prepared'"),
        ({"data": PREPARED["data"]}, "give `base.path`"),
        ({"base": {"path": "base"}}, "Give `base.model`"),
        ({"data": {"source": "global_opinions"}}, "names GlobalOpinionQA's file"),
        ({"arms": [{"method": "lora"}, {"method": "lora"}]}, "Two arms are called 'lora'"),
        ({"arms": ["lora"]}, "must be a mapping"),
        ({"compare": [["cuma", "lara"]]}, "no arm 'lara'; did you mean 'lora'"),
        ({"arms": [{"method": "cuma", "encoder": "text"}]}, "no `text_encoder`"),
    ],
)
def test_mistakes_are_named(tmp_path, change, message):
    path = write(tmp_path, {**SMALL, **change})
    with pytest.raises(ValueError, match=message) as error:
        read_suite(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": [{"method": "lora", "prompt_profile": True}]}, "'lora-prompt' has .* and `data` no `prompt_path`"),
        ({"dpo": {"arms": ["lora"], "learning_rates": [1e-3]}}, "`dpo` is measured .* Leave `dpo` out"),
        ({"data": {**PREPARED["data"], "cells": 4}}, "Unknown key 'cells' in data"),
        ({"data": {"source": "prepared", "path": "plain"}}, "data lacks the key 'splits'"),
        ({"data": {**PREPARED["data"], "splits": "test"}}, "`data.splits` is 'test', expected a list"),
        ({"data": {**PREPARED["data"], "splits": ["train"]}}, "names 'train', which arms are trained or chosen on"),
        ({"data": {**PREPARED["data"], "validation_split": "test"}}, "names 'test', which"),
        ({"data": {**PREPARED["data"], "answers": 0}}, "`data.answers` is 0"),
        ({"base": {"path": "base", "dtype": "float16"}}, "`base.dtype` is 'float16'"),
        ({"base": {"path": "base", "micro_batch_size": 7}}, "is 7, expected a divisor of .* \\(64\\)"),
        (
            {"base": {"path": "base", "load_in_4bit": True}, "arms": [{"method": "full", "matched": "none"}]},
            "trains the base, which `load_in_4bit` quantizes",
        ),
    ],
)
def test_mistakes_with_prepared_data_are_named(tmp_path, change, message):
    read_suite(write(tmp_path, PREPARED))
    with pytest.raises(ValueError, match=message):
        read_suite(write(tmp_path, {**PREPARED, **change}))


def base_of(suite):
    """A base model of the suite's sizes; of a large one its shapes alone."""
    if not isinstance(suite.base, GivenBase):
        return tiny_model(vocab_size=200, **suite.base.model)
    config = json.loads((CONFIGS / f"{suite.base.path.replace('/', '--')}.json").read_text())
    config["num_hidden_layers"] = 2  # each is like the others
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_committed_suites_have_budgets_that_can_be_met(path):
    suite = read_suite(path, data_path="not-read.jsonl" if "global" in path.stem else None)
    base = base_of(suite)
    for arm in suite.arms:
        suite.reference.adapter(arm, base, {"field": 31, "text": 384, "text_uncentred": 384}, 2.0)
