# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Suites are read strictly, and the committed ones are sound."""

import json
from dataclasses import replace
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
        ({"tuning": {"worlds": [], "learning_rates": [1e-3]}}, "`tuning.worlds` is empty"),
        ({"tuning": {"worlds": [1]}}, "lacks the key 'learning_rates'"),
        ({"training": {"steps": 0}}, "`training.steps` is 0, expected 1 or more"),
        ({"training": {"batch_size": 0}}, "`training.batch_size` is 0"),
        ({"training": {"select_every": 0}}, "`training.select_every` is 0"),
        ({"training": {"factors": []}}, "`training.factors` is empty"),
        ({"training": {"factors": [0]}}, "`training.factors` has 0, expected more than 0"),
        ({"training": {"steps": "many"}}, "`training.steps` is 'many', expected a whole number"),
        ({"training": {"steps": 2.5}}, "`training.steps` is 2.5, expected a whole number"),
        ({"tuning": {"worlds": 3, "learning_rates": [1e-3]}}, "`tuning.worlds` is 3, expected a list"),
        (
            {"tuning": {"worlds": [9], "learning_rates": ["abc"]}},
            "`tuning.learning_rates` is 'abc', expected a number",
        ),
        ({"tuning": {"worlds": [9], "learning_rates": [0]}}, "`tuning.learning_rates` has 0, expected more than 0"),
        ({"tuning": {"worlds": [9], "learning_rates": [-1e-3]}}, "has -0.001, expected more than 0"),
        ({"tuning": {"worlds": [9], "learning_rates": [1e-3, 1e-3]}}, "`tuning.learning_rates` holds 0.001 twice"),
        ({"worlds": 3}, "`worlds` is 3, expected a list"),
        ({"worlds": []}, "`worlds` is empty"),
        ({"worlds": [1, 1]}, "`worlds` holds 1 twice"),
        ({"arms": None}, "`arms` is None, expected a list"),
        ({"arms": []}, "`arms` is empty"),
        ({"arms": [{"method": []}]}, "`method` is an empty list"),
        ({"arms": [{"method": "cuma", "prompt_profile": "no"}]}, "`arms.prompt_profile` is 'no', expected true or"),
        ({"data": None}, "data must be a mapping"),
        ({"data": {"source": "simulated", "cells": 0}}, "`data.cells` is 0, expected 1 or more"),
        ({"data": {"source": "simulated", "args": {"num_question": 8}}}, "data.args; did you mean 'num_questions'"),
        (
            {"data": {"source": "simulated", "args": {"beta": "steep"}}},
            "`data.args.beta` is 'steep', expected a number",
        ),
        ({"data": {"source": "simulated", "args": {"seed": 8}}}, "Unknown key 'seed' in data.args"),
        ({"data": {"source": "global_opinions", "path": "x", "args": {"holdouts": 0.1}}}, "did you mean 'holdout'"),
        ({"base": {"model": {}, "learning_rate": -1}}, "`base.learning_rate` has -1, expected more than 0"),
        ({"reference": {"config": {"rank": 2}, "target_modules": ["q_proj"]}}, "'rank' in reference.config"),
        ({"reference": {"config": {}, "target_modules": ["q_proj"]}}, "lacks the key 'r'"),
        ({"reference": {"config": {"r": 2}, "target_modules": "q_proj"}}, "is 'q_proj', expected a list"),
        ({"arms": [{"method": "cuma", "config": {"gat": "soft"}}]}, "'gat' in arms.cuma.config; did you mean 'gate'"),
        (
            {"arms": [{"method": "cuma", "config": {"gate": "hard"}}]},
            "`arms.cuma.config.gate` is 'hard', expected one",
        ),
        ({"arms": [{"method": "cuma", "config": {"top_k": 9}}]}, "Arm 'cuma': `top_k"),
        ({"arms": [{"method": "cuma", "config": {"r": 8}}]}, "`arms.cuma.config` has 'r', which the benchmark sets"),
        ({"arms": [{"method": "film", "config": {"film_hidden": 8}}]}, "has 'film_hidden', which the benchmark sets"),
        ({"arms": [{"method": "cuma", "training": {"aux": 0}}]}, "Unknown key 'aux' in arms.cuma.training"),
        ({"arms": [{"method": "cuma", "training": {"learning_rate": 1}}]}, "Unknown key 'learning_rate'"),
        ({"compare": [["cuma"]]}, "`compare` holds \\['cuma'\\], expected the keys of two different arms"),
        ({"compare": [["cuma", "cuma"]]}, "expected the keys of two different arms"),
        ({"compare": ["cuma", "lora"]}, "`compare` is 'cuma', expected a list"),
        ({"dpo": {"arms": ["lora"], "learning_rates": [0.0]}}, "`dpo.learning_rates` has 0.0"),
        ({"dpo": {"arms": ["lora"], "learning_rates": [1e-3], "beta": 0}}, "`dpo.beta` has 0"),
        ({"dpo": {"arms": ["lara"], "learning_rates": [1e-3]}}, "no arm 'lara'"),
        (
            {
                "dpo": {"arms": ["lora"], "learning_rates": [1e-3]},
                "training": {"factors": [2, 1]},
            },
            "the first must be 1",
        ),
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


@pytest.mark.parametrize("method", ["full", "p_tuning"])
def test_arms_that_dpo_cannot_go_on_from_are_refused(tmp_path, method):
    dpo = {"arms": ["lora", method], "learning_rates": [1e-3]}
    arms = [{"method": "lora"}, {"method": method, "matched": "none"}]
    with pytest.raises(ValueError, match=f"`dpo.arms` names '{method}'.*Leave it out"):
        read_suite(write(tmp_path, {**SMALL, "arms": arms, "dpo": dpo}))


def test_arguments_that_dpo_does_not_know_are_refused(tmp_path):
    dpo = {"arms": ["cuma"], "learning_rates": [1e-3]}
    arms = [{"method": "cuma", "training": {"demographic_dropout": 0.1}}]
    with pytest.raises(ValueError, match="`training` has 'demographic_dropout', which DPO doesn't know"):
        read_suite(write(tmp_path, {**SMALL, "arms": arms, "dpo": dpo}))


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path):
    """YAML 1.1 wants a dot in 1.0e-4, and reads 1e-4 as text."""
    (tmp_path / "suite.yaml").write_text(
        """
        name: small
        data: {source: simulated, args: {beta: 4e0, num_people: 3e3}}
        base: {model: {architecture: llama}, learning_rate: 3e-3}
        training: {steps: 4, select_every: 2}
        tuning: {worlds: [9], learning_rates: [1e-4, 1.0e-3, 1]}
        reference: {config: {r: 2}, target_modules: [q_proj]}
        worlds: [0]
        arms: [{method: cuma, training: {cuma_aux_loss_coef: 1e-2}}]
        """
    )
    suite = read_suite(tmp_path / "suite.yaml")
    assert suite.tuning.learning_rates == (1e-4, 1e-3, 1)
    assert (suite.base.learning_rate, suite.data.args) == (3e-3, {"beta": 4.0, "num_people": 3000})
    assert suite.arms[0].training == {"cuma_aux_loss_coef": 0.01}


@pytest.mark.parametrize("content", [b"name: [small\nworlds: 3", b"name: a: b", b"\xff\xfe", b""])
def test_files_that_are_no_mapping_in_yaml_are_one_line(tmp_path, content):
    (tmp_path / "suite.yaml").write_bytes(content)
    with pytest.raises(ValueError, match="suite.yaml") as error:
        read_suite(tmp_path / "suite.yaml")
    assert "\n" not in str(error.value)


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
    # A prompt that states the profile makes no other adapter.
    for arm in {str(replace(arm, prompt_profile=False)): arm for arm in suite.arms}.values():
        suite.reference.adapter(arm, base, {"field": 31, "text": 384, "text_uncentred": 384}, 2.0)
