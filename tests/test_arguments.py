# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import os

import pytest
import yaml

from trl_cuma import (
    CuMADPOConfig,
    CuMAGRPOConfig,
    CuMAKTOConfig,
    CuMARewardConfig,
    CuMASFTConfig,
    FieldEncoder,
    TextEncoder,
)
from trl_cuma.arguments import CuMAModelConfig, parse_strictly


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe; returns its path."""

    def write(**fields):
        path = tmp_path / "recipe.yaml"
        path.write_text(
            yaml.safe_dump({"output_dir": str(tmp_path / "out"), "use_cpu": True, "dataset_name": "data"} | fields)
        )
        return str(path)

    return write


def parse(*args: str):
    return parse_strictly(CuMASFTConfig, list(args))


# ---------------------------------------------------------------------- parsing
@pytest.mark.parametrize(
    "key, said",
    [
        ("learning_rat", r"'learning_rat' \(did you mean 'learning_rate'\?\)"),
        ("lora_alfa", r"'lora_alfa' \(did you mean 'lora_alpha'\?\)"),
        ("cuma_num_expert", r"'cuma_num_expert' \(did you mean 'cuma_num_experts'\?\)"),
        ("num_experts", r"'num_experts' \(did you mean 'cuma_num_experts'\?\)"),  # CuMAConfig's name
        ("num_train", r"'num_train' \(did you mean 'num_train_epochs'\?\)"),  # argparse would take the abbreviation
        ("torch_dtype", "'torch_dtype' is now `dtype`"),
        ("torch-dtype", "'torch-dtype' is now `dtype`"),
        ("max_seq_length", "'max_seq_length' is now `max_length`"),
        ("dataset_mixture", "'dataset_mixture' is now `datasets`, at the top level"),
        ("warmup_ratio", "'warmup_ratio' is now `warmup_steps`, where a number below 1 is a share of all steps"),
        ("save_safetensors", "'save_safetensors' is gone: weights are always saved as safetensors"),
        ("num_processes", "'num_processes' is for `accelerate launch`, or for a recipe that `trl-cuma` starts"),
    ],
)
def test_an_unknown_key_is_an_error_that_says_what_to_write(key, said, recipe):
    with pytest.raises(ValueError, match="Unknown arguments: " + said):
        parse("--config", recipe(**{key: 1}))
    for args in ([f"--{key}", "1"], [f"--{key}=1"]):
        with pytest.raises(ValueError, match="Unknown arguments: " + said):
            parse("--config", recipe(), *args)


def test_a_recipe_takes_no_negated_key(recipe):
    with pytest.raises(ValueError, match="'no_packing': write `packing: false`"):
        parse("--config", recipe(no_packing=True))
    with pytest.raises(ValueError, match="'no_remove_unused_columns': write `remove_unused_columns: false`"):
        parse("--config", recipe(no_remove_unused_columns=True))
    assert not parse("--config", recipe(), "--no_remove_unused_columns")[1].remove_unused_columns


def test_advice_depends_on_the_trainer(recipe):
    path = recipe(max_prompt_length=128)
    for config, said in (
        (CuMADPOConfig, "cut to `max_length`"),
        (CuMAKTOConfig, "cut to `max_length`"),
        (CuMAGRPOConfig, "prompts are not cut"),
    ):
        with pytest.raises(ValueError, match=f"'max_prompt_length' is gone: .*{said}"):
            parse_strictly(config, ["--config", path])


def test_all_unknown_keys_are_named(recipe):
    with pytest.raises(ValueError, match=r"'qqqqq'; 'lora_alfa' \(did you mean 'lora_alpha'\?\)"):
        parse("--config", recipe(qqqqq=[1, 2]), "--lora_alfa", "3")


def test_stray_and_wrong_values_are_one_line(recipe):
    with pytest.raises(ValueError, match="Unknown arguments: 'stray'"):
        parse("--config", recipe(), "--lora_r", "4", "stray")
    with pytest.raises(ValueError, match="lora_r.* invalid int value: 'four'"):
        parse("--config", recipe(lora_r="four"))
    with pytest.raises(ValueError, match="dtype.* invalid choice: 'int3'"):
        parse("--config", recipe(), "--dtype", "int3")


def test_a_recipe_that_cannot_be_read(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("learning_rate: [1")
    with pytest.raises(ValueError, match="broken.yaml is not YAML"):
        parse("--config", str(path))
    path.write_text("- learning_rate")
    with pytest.raises(ValueError, match="broken.yaml must hold `key: value` lines, got list"):
        parse("--config", str(path))
    path.write_text("env: [A]")
    with pytest.raises(ValueError, match="`env` in .*broken.yaml must hold `NAME: value` lines, got list"):
        parse("--config", str(path))
    for args in (["--config"], ["--config", "a", "--config", "b"]):
        with pytest.raises(ValueError, match="`--config` takes one path, once"):
            parse(*args)


def test_environment_of_a_recipe(recipe, monkeypatch):
    monkeypatch.setenv("CUMA_TEST", "before")
    parse("--config", recipe(env={"CUMA_TEST": 3}))
    assert os.environ["CUMA_TEST"] == "3"


def test_both_spellings_of_config_and_the_command_line_wins(recipe):
    path = recipe(learning_rate=0.5, lora_r=4)
    for args in (["--config", path], [f"--config={path}"]):
        _, training, model, _ = parse(*args, "--lora_r", "16")
        assert training.learning_rate == 0.5 and model.lora_r == 16
        assert isinstance(training, CuMASFTConfig)


def test_adapter_keys_arrive(recipe):
    path = recipe(
        lora_r=4,
        lora_alpha=9,
        lora_dropout=0.25,
        use_rslora=True,
        lora_target_modules=["q_proj", "k_proj", "v_proj"],
        lora_modules_to_save=["lm_head"],
        cuma_num_experts=6,
        cuma_top_k=3,
        cuma_gate="softmax_topk",
        cuma_routing="demographic",
        cuma_demographic_projection=5,
        cuma_router_hidden=7,
        cuma_router_layers=3,
        cuma_share_a=True,
        cuma_router_groups=["q_proj,k_proj", "v_proj"],
        cuma_missing_demographics="zero",
        cuma_aux_loss_coef=0.5,
    )
    _, training, model, _ = parse("--config", path)
    config = model.adapter_config().to_dict()
    expected = {
        "r": 4,
        "lora_alpha": 9,
        "lora_dropout": 0.25,
        "use_rslora": True,
        "modules_to_save": ["lm_head"],
        "num_experts": 6,
        "top_k": 3,
        "gate": "softmax_topk",
        "routing": "demographic",
        "demographic_projection": 5,
        "router_hidden": 7,
        "router_layers": 3,
        "share_a": True,
        "router_groups": [["q_proj", "k_proj"], ["v_proj"]],
        "missing_demographics": "zero",
        "task_type": "CAUSAL_LM",
    }
    assert {name: config[name] for name in expected} == expected
    assert set(config["target_modules"]) == {"q_proj", "k_proj", "v_proj"}
    assert training.cuma_aux_loss_coef == 0.5


def test_the_task_follows_from_the_trainer(recipe):
    for config in (CuMASFTConfig, CuMADPOConfig, CuMAKTOConfig, CuMAGRPOConfig):
        assert parse_strictly(config, ["--config", recipe()])[2].adapter_config().task_type == "CAUSAL_LM"
    for fields in ({}, {"lora_task_type": "SEQ_CLS"}):  # TRL's recipes for reward models say it
        _, _, model, _ = parse_strictly(CuMARewardConfig, ["--config", recipe(**fields)])
        assert model.adapter_config().task_type == "SEQ_CLS"
    with pytest.raises(ValueError, match="`lora_task_type` must be 'SEQ_CLS' for CuMARewardConfig, got 'CAUSAL_LM'"):
        parse_strictly(CuMARewardConfig, ["--config", recipe(lora_task_type="CAUSAL_LM")])


def test_one_name_where_a_list_is_asked(recipe):
    path = recipe(lora_target_modules="all-linear", lora_modules_to_save="lm_head", cuma_router_groups="q_proj,k_proj")
    config = parse("--config", path)[2].adapter_config()
    assert config.target_modules == "all-linear" and config.modules_to_save == ["lm_head"]
    assert config.router_groups == [["q_proj", "k_proj"]]


def test_which_encoder():
    text = CuMAModelConfig(cuma_encoder_model="some/model", cuma_encoder_revision="abc").encoder()
    assert isinstance(text, TextEncoder) and (text.model, text.revision) == ("some/model", "abc")
    field = CuMAModelConfig(cuma_encoder="field", cuma_encoder_min_count=7).encoder()
    assert isinstance(field, FieldEncoder) and field.min_count == 7 and not field.is_fitted
    assert CuMAModelConfig(cuma_encoder="none").encoder() is None
    assert CuMAModelConfig(cuma_routing="semantic").encoder() is None


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"use_dora": True}, "`use_dora` is not available"),
        ({"lora_target_parameters": ["experts"]}, "`lora_target_parameters` is not available"),
        ({"use_peft": False}, "`use_peft=False`: these scripts train a CuMA adapter"),
        ({"cuma_encoder": "qwen"}, "`cuma_encoder` must be 'text', 'field' or 'none', got 'qwen'"),
    ],
)
def test_what_cuma_has_not_got(fields, message, recipe):
    with pytest.raises(ValueError, match=message):
        parse("--config", recipe(**fields))


# ---------------------------------------------------------------------- data
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"dataset_name": None}, r"either `dataset_name` or `datasets`, got None and \[\]"),
        ({"datasets": [{"path": "json"}]}, "either `dataset_name` or `datasets`, got 'data' and"),
        ({"streaming": True}, "`streaming` belongs to `datasets`. With `dataset_name` use `dataset_streaming`"),
        ({"test_split_size": 0.1}, "`test_split_size` belongs to `datasets`"),
        (
            {"dataset_name": None, "datasets": [{"path": "json"}], "dataset_streaming": True},
            "`dataset_streaming` is not read with `datasets`. Use `streaming`",
        ),
        (
            {"dataset_name": None, "datasets": [{"path": "json"}], "dataset_config": "en"},
            "`dataset_config` is not read with `datasets`. Use 'name' in each entry",
        ),
        (
            {"dataset_name": None, "datasets": [{"id": "json", "path_": 1, "weight": 0.5}]},
            r"Unknown keys in `datasets\[0\]`: 'id' is now `path`; 'path_' \(did you mean 'path'\?\); 'weight' is now "
            "`fraction`",
        ),
        (
            {"dataset_name": None, "datasets": [{"path": "json"}, {"path": "json", "columns": ["prompt"]}]},
            r"`datasets\[1\]` keeps only the columns \['prompt'\]. Add the demographic column, 'demographic'",
        ),
    ],
)
def test_how_data_is_named(fields, message, recipe):
    with pytest.raises(ValueError, match=message):
        parse("--config", recipe(**fields))


def test_a_mixture_without_profiles_is_fine_where_none_are_read(recipe):
    fields = {"dataset_name": None, "datasets": [{"path": "json", "columns": ["prompt"]}]}
    *_, mixture = parse("--config", recipe(cuma_routing="semantic", **fields))
    assert mixture.datasets[0].columns == ["prompt"]


@pytest.mark.parametrize("value", [True, [2], None, {"a": 1}])
def test_a_number_is_a_number(recipe, value):
    """YAML gives these as they are; argparse converts text only."""
    with pytest.raises(ValueError, match=r"`learning_rate` must be a number, got "):
        parse("--config", recipe(learning_rate=value))
    _, training, *_ = parse("--config", recipe(learning_rate="1e-4", hub_revision=None, max_steps=2))
    assert training.learning_rate == 1e-4 and training.max_steps == 2


def test_a_key_with_hyphens_is_written_with_underscores(recipe):
    with pytest.raises(ValueError, match="'learning-rate': write `learning_rate`"):
        parse("--config", recipe(**{"learning-rate": 1}))
    with pytest.raises(ValueError, match="'no_bf16': write `bf16: false`"):
        parse("--config", recipe(no_bf16=True))
