# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import json

import pytest
from peft import PeftConfig

from trl_cuma import CuMAConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "`r` must be a positive integer, got 0"),
        ({"num_experts": 2.5}, "`num_experts` must be a positive integer, got 2.5"),
        ({"top_k": True}, "`top_k` must be a positive integer, got True"),
        ({"router_hidden": -1}, "`router_hidden`"),
        ({"router_layers": 0}, "`router_layers`"),
        ({"demographic_dim": 0}, "`demographic_dim`"),
        ({"demographic_projection": 0}, "`demographic_projection`"),
        ({"lora_dropout": 1.0}, r"`lora_dropout` must be in \[0, 1\), got 1.0"),
        ({"routing": "both"}, "`routing` must be one of 'joint', 'demographic', 'semantic', got 'both'"),
        ({"missing_demographics": "mean"}, "`missing_demographics` must be one of 'error', 'zero', got 'mean'"),
        ({"gate": "top2"}, "`gate` must be one of .*'topk_softmax'.* got 'top2'"),
        ({"num_experts": 4, "top_k": 5}, "`top_k=5` is more than `num_experts=4`"),
        ({"top_k": 1}, "`top_k=1` with `gate='topk_softmax'` .*no gradient"),
        ({"top_k": 1, "gate": "double_softmax"}, "`top_k=1` with `gate='double_softmax'`"),
        ({"routing": "semantic", "demographic_projection": 4}, "`demographic_projection=4` has no effect"),
        ({"layers_pattern": "layers"}, "`layers_pattern` needs `layers_to_transform`"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, r"`layers_to_transform=\[0\]` has no effect"),
        ({"router_groups": [["q_proj"], ["q_proj", "k_proj"]]}, "names a module twice"),
        ({"format_version": 99}, "`format_version=99` is newer .*Upgrade trl_cuma"),
    ],
)
def test_a_bad_value_is_an_error_that_names_the_field(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CuMAConfig(**fields)


def test_top_1_is_accepted_where_the_router_gets_a_gradient_or_there_is_no_choice() -> None:
    CuMAConfig(top_k=1, gate="softmax_topk")
    CuMAConfig(top_k=1, num_experts=1)
    CuMAConfig(top_k=1, gate="soft")  # ignores top_k


def test_the_first_layer_alone_can_be_chosen() -> None:
    assert CuMAConfig(target_modules=["q_proj"], layers_to_transform=0, layers_pattern="layers").layers_pattern


def test_it_survives_saving_and_loading(tmp_path) -> None:
    config = CuMAConfig(
        target_modules=["q_proj", "v_proj"],
        gate="soft",
        demographic_projection=8,
        router_groups=[["q_proj", "k_proj"]],
        rank_pattern={"q_proj": 2},
        demographic_encoder={"kind": "fields", "fields": {"country": ["A", "B"]}},
        task_type="CAUSAL_LM",
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is CuMAConfig
    loaded.inference_mode = config.inference_mode  # saving sets it, as for every PEFT method
    assert loaded == config
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "CUMA"
