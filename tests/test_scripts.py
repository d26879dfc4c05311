# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from trl import DatasetMixtureConfig, ScriptArguments

from trl_cuma import CuMADPOConfig, CuMADPOTrainer, CuMASFTConfig, CuMASFTTrainer, FieldEncoder, TextEncoder
from trl_cuma.scripts import CuMAModelConfig, load_data, parse_strictly, resume_point, run
from trl_cuma.testing import chat_tokenizer, tiny_model


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe; returns its path."""

    def write(**fields):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "out"), "use_cpu": True} | fields))
        return str(path)

    return write


def parse(*args: str):
    return parse_strictly(CuMASFTConfig, list(args))


# ---------------------------------------------------------------------- parsing
@pytest.mark.parametrize(
    "key, nearest",
    [
        ("learning_rat", "learning_rate"),
        ("lora_alfa", "lora_alpha"),
        ("cuma_num_expert", "cuma_num_experts"),
        ("torch_dtype", "dtype"),  # its former name in transformers
        ("max_seq_length", "max_length"),  # and in TRL
        ("dataset_mixture", "datasets"),
        ("warmup_ratio", "warmup_steps"),
        ("num_experts", "cuma_num_experts"),  # CuMAConfig's name
        ("num_train", "num_train_epochs"),  # argparse would take it for an abbreviation
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest(key, nearest, recipe):
    message = rf"Unknown arguments: '{key}' \(did you mean '{nearest}'\?\)"
    with pytest.raises(ValueError, match=message):
        parse("--config", recipe(**{key: 1}))
    for args in ([f"--{key}", "1"], [f"--{key}=1"]):
        with pytest.raises(ValueError, match=message):
            parse("--config", recipe(), *args)


def test_all_unknown_keys_are_named(recipe):
    with pytest.raises(ValueError, match=r"'qqqqq', 'lora_alfa' \(did you mean 'lora_alpha'\?\)"):
        parse("--config", recipe(qqqqq=[1, 2]), "--lora_alfa", "3")


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


# ---------------------------------------------------------------------- data and resuming
def test_data_is_named_once(tmp_path):
    with pytest.raises(ValueError, match="either `dataset_name` or `datasets`, got None and"):
        load_data(ScriptArguments(), DatasetMixtureConfig())
    mixture = DatasetMixtureConfig(datasets=[{"path": "json"}])
    with pytest.raises(ValueError, match="either `dataset_name` or `datasets`, got 'mine'"):
        load_data(ScriptArguments(dataset_name="mine"), mixture)


def test_data_from_files_and_folders(tmp_path):
    rows = Dataset.from_list([{"text": "a", "demographic": {"age": "old"}}])
    DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "saved"))
    saved = load_data(ScriptArguments(dataset_name=str(tmp_path / "saved")), DatasetMixtureConfig())
    assert saved["test"].to_list() == rows.to_list()
    (tmp_path / "files").mkdir()
    rows.to_json(str(tmp_path / "files" / "train.jsonl"))
    files = load_data(ScriptArguments(dataset_name=str(tmp_path / "files")), DatasetMixtureConfig())
    assert files["train"].to_list() == rows.to_list()


def test_resume_point(tmp_path):
    def resume(value, folder=tmp_path / "out"):
        return resume_point(SimpleNamespace(resume_from_checkpoint=value, output_dir=str(folder)))

    assert [resume(value) for value in (None, False, "false", "False")] == [None] * 4
    assert [resume(value) for value in (True, "True", "true", "latest")] == [None] * 4  # a fresh start
    for step in (2, 10):
        (tmp_path / "out" / f"checkpoint-{step}").mkdir(parents=True)
    newest = str(tmp_path / "out" / "checkpoint-10")
    assert [resume(value) for value in (True, "True", "true", "latest")] == [newest] * 4
    assert resume("elsewhere/checkpoint-2") == "elsewhere/checkpoint-2" and resume(None) is None


# ---------------------------------------------------------------------- the whole of a script
@pytest.fixture
def workspace(tmp_path):
    """A model, a tokenizer and data on disk, as a recipe names them."""
    tokenizer = chat_tokenizer(["Question 0? yes no"])
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model("qwen3", vocab_size=len(tokenizer), hidden_size=32, num_attention_heads=2).save_pretrained(
        tmp_path / "model"
    )
    people = [{"age": "old" if row % 2 else "young", "country": "JP"} for row in range(8)]
    questions = [[{"role": "user", "content": f"Question {row}?"}] for row in range(8)]
    yes, no = ([[{"role": "assistant", "content": text}]] * 8 for text in ("yes", "no"))
    sft = Dataset.from_dict({"prompt": questions, "completion": yes, "demographic": people})
    dpo = Dataset.from_dict({"prompt": questions, "chosen": yes, "rejected": no, "demographic": people})
    for name, data in (("sft", sft), ("dpo", dpo)):
        DatasetDict(train=data, test=data.select(range(4))).save_to_disk(str(tmp_path / "data" / name))
    return tmp_path


def script_arguments(workspace: Path, method: str, **fields) -> list[str]:
    settings = {
        "model_name_or_path": str(workspace / "model"),
        "dataset_name": str(workspace / "data" / method),
        "output_dir": str(workspace / method),
        "dtype": "float32",
        "lora_r": 2,
        "lora_target_modules": ["q_proj", "v_proj"],
        "cuma_num_experts": 4,
        "cuma_router_hidden": 8,
        "cuma_encoder": "field",
        "cuma_encoder_min_count": 2,
        "use_cpu": True,
        "bf16": False,
        "max_steps": 2,
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 1,
        "learning_rate": 0.05,
        "report_to": "none",
        "disable_tqdm": True,
    } | fields
    path = workspace / f"{method}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["--config", str(path)]


def test_sft_then_dpo_then_resume(workspace):
    sft = run(CuMASFTTrainer, CuMASFTConfig, script_arguments(workspace, "sft"))
    assert any("eval_loss" in record for record in sft.state.log_history)
    saved = json.loads((workspace / "sft" / "adapter_config.json").read_text())
    assert saved["r"] == 2 and saved["lora_alpha"] == 16 and saved["num_experts"] == 4
    assert saved["demographic_encoder"]["min_count"] == 2
    sft_weights = load_file(workspace / "sft" / "adapter_model.safetensors")

    fields = {"cuma_adapter_path": str(workspace / "sft"), "cuma_aux_loss_coef": 0.0, "resume_from_checkpoint": True}
    dpo = run(CuMADPOTrainer, CuMADPOConfig, script_arguments(workspace, "dpo", **fields))
    assert dpo.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    weights = load_file(workspace / "dpo" / "adapter_model.safetensors")
    assert weights.keys() == sft_weights.keys()
    assert any(not torch.equal(weights[name], sft_weights[name]) for name in weights)

    longer = script_arguments(workspace, "dpo", **fields | {"max_steps": 4})
    resumed = run(CuMADPOTrainer, CuMADPOConfig, longer)
    assert [r["step"] for r in resumed.state.log_history if "loss" in r] == [1, 2, 3, 4]
    assert resumed.state.log_history[0] == dpo.state.log_history[0]  # went on, not began again
    reference = resumed.model.get_parameter
    for name, weight in sft_weights.items():
        name = name.replace("cuma_experts.", "cuma_experts.ref.").replace("cuma_router.", "cuma_router.ref.")
        assert torch.equal(reference(name), weight)


def test_a_typo_stops_a_script_before_it_loads_anything(workspace):
    args = script_arguments(workspace, "sft", model_name_or_path="nowhere", learning_rat=1.0)
    with pytest.raises(ValueError, match="did you mean 'learning_rate'"):
        run(CuMASFTTrainer, CuMASFTConfig, args)
