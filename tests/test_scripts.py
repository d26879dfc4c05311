# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import json
import math
import re
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict, IterableDataset
from safetensors.torch import load_file
from trl import DatasetMixtureConfig, ScriptArguments
from trl.scripts.grpo import GRPOScriptArguments

import trl_cuma
from trl_cuma import CuMADPOConfig, CuMADPOTrainer, CuMASFTConfig, CuMASFTTrainer
from trl_cuma.arguments import METHODS
from trl_cuma.scripts import REWARD_FUNCS, load_data, load_reward_funcs, main, resume_point, run, split_of
from trl_cuma.testing import chat_tokenizer, tiny_model


def fields_of(dataclass: type) -> dict:
    return {field.name: field for field in fields(dataclass)}


# ---------------------------------------------------------------------- data and resuming
def test_data_from_files_and_folders(tmp_path):
    rows = Dataset.from_list([{"text": "a", "demographic": {"age": "old"}}])
    DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "saved"))
    saved = load_data(ScriptArguments(dataset_name=str(tmp_path / "saved")), DatasetMixtureConfig())
    assert saved["test"].to_list() == rows.to_list()
    (tmp_path / "files").mkdir()
    rows.to_json(str(tmp_path / "files" / "train.jsonl"))
    files = load_data(ScriptArguments(dataset_name=str(tmp_path / "files")), DatasetMixtureConfig())
    assert files["train"].to_list() == rows.to_list()


def test_a_saved_folder_streams_and_has_no_configurations(tmp_path):
    rows = Dataset.from_list([{"text": "a", "demographic": {"age": "old"}}])
    DatasetDict(train=rows).save_to_disk(str(tmp_path))
    streamed = load_data(ScriptArguments(dataset_name=str(tmp_path), dataset_streaming=True), DatasetMixtureConfig())
    assert isinstance(streamed["train"], IterableDataset) and list(streamed["train"]) == rows.to_list()
    with pytest.raises(ValueError, match="`dataset_config` is 'en', but .* holds one configuration"):
        load_data(ScriptArguments(dataset_name=str(tmp_path), dataset_config="en"), DatasetMixtureConfig())


def test_a_split_that_is_not_there():
    with pytest.raises(ValueError, match=r"`dataset_test_split` is 'test', but the data has the splits \['train'\]"):
        split_of(DatasetDict(train=Dataset.from_dict({})), "dataset_test_split", "test")


# ---------------------------------------------------------------------- rewards
def test_the_rewards_of_trl_are_all_known():
    names = re.findall(r"`(\w+)`", fields_of(GRPOScriptArguments)["reward_funcs"].metadata["help"])
    assert set(names) == set(REWARD_FUNCS)
    for name in names:
        assert callable(load_reward_funcs(GRPOScriptArguments(reward_funcs=[name]))[0])


def test_rewards_by_import_path_and_model(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def length(completions, **kwargs):\n    return [1.0]\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    arguments = GRPOScriptArguments(reward_model_name_or_path="some/model", reward_funcs="my_rewards.length")
    model, function = load_reward_funcs(arguments)
    assert model == "some/model" and function(["a"]) == [1.0]
    assert sys.path == path
    for name in ("my_rewards.breadth", "no_rewards.length", "length"):
        with pytest.raises(ValueError, match=f"`reward_funcs` names '{name}', which can't be loaded"):
            load_reward_funcs(GRPOScriptArguments(reward_funcs=[name]))


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


@pytest.mark.parametrize(
    "method, fields, message",
    [
        ("sft", {"model_name_or_path": None}, "Name the base model with `model_name_or_path`"),
        ("grpo", {}, "GRPO needs a reward. Name it with `reward_funcs`"),
    ],
)
def test_what_a_run_cannot_do_without(workspace, method, fields, message):
    name = METHODS[method]
    args = script_arguments(workspace, method, **fields)
    with pytest.raises(ValueError, match=message):
        run(getattr(trl_cuma, f"CuMA{name}Trainer"), getattr(trl_cuma, f"CuMA{name}Config"), args)


def test_the_terms_of_prepared_data_reach_the_adapter(workspace):
    (workspace / "data" / "sft" / "report.json").write_text('{"license": "cc-by-nc-4.0"}')
    trainer = run(CuMASFTTrainer, CuMASFTConfig, script_arguments(workspace, "sft", max_steps=1, eval_strategy="no"))
    (record,) = trainer.model.active_peft_config.training
    assert record["dataset_license"] == "cc-by-nc-4.0"
    assert "sft: cc-by-nc-4.0" in (workspace / "sft" / "README.md").read_text(encoding="utf-8")


def test_ignore_bias_buffers(workspace):
    args = script_arguments(workspace, "dpo", ignore_bias_buffers=True, max_steps=1, eval_strategy="no")
    trainer = run(CuMADPOTrainer, CuMADPOConfig, args)
    ignored = [name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool]
    assert trainer.model._ddp_params_and_buffers_to_ignore == ignored


def test_streaming(workspace):
    """The encoder is fitted on the first `cuma_encoder_rows` rows; both ages and the country are in the first four."""
    fields = {"dataset_streaming": True, "max_steps": 1, "eval_strategy": "no", "cuma_encoder_min_count": 2}
    trainer = run(CuMASFTTrainer, CuMASFTConfig, script_arguments(workspace, "sft", **fields, cuma_encoder_rows=4))
    assert isinstance(trainer.train_dataset, IterableDataset) and trainer.state.global_step == 1
    whole = run(
        CuMASFTTrainer, CuMASFTConfig, script_arguments(workspace, "sft", **fields | {"dataset_streaming": False})
    )
    first, all_rows = (t.demographic_table.encoder for t in (trainer, whole))
    assert first.dim == all_rows.dim
    with pytest.raises(ValueError, match="shared by min_count=2 people"):
        run(CuMASFTTrainer, CuMASFTConfig, script_arguments(workspace, "sft", **fields, cuma_encoder_rows=1))


def test_what_trl_cuma_launches(workspace, capsys):
    args = script_arguments(workspace, "sft", max_steps=1, eval_strategy="no", num_processes=1)
    assert main(["sft", *args]) == 0  # accelerate's keys were read by the launcher
    assert (workspace / "sft" / "adapter_model.safetensors").exists()
    capsys.readouterr()
    assert main(["sft", *args, "--cuma_encoder", "qwen"]) == 2
    error = capsys.readouterr().err
    assert error == "trl-cuma sft: error: `cuma_encoder` must be 'text', 'field' or 'none', got 'qwen'.\n"


@pytest.mark.parametrize(
    "method, fields, message",
    [
        ("sft", {"demographic_column": "who"}, "training data set has no 'who' column"),
        ("sft", {"dataset_train_split": "dev"}, "`dataset_train_split` is 'dev', but the data has the splits"),
        ("sft", {"cuma_top_k": 9}, "top_k"),
        ("grpo", {"use_vllm": True, "dataset_name": "no/such-data", "reward_funcs": ["os.getcwd"]}, "`use_vllm=True`"),
        (
            "grpo",
            {"reward_funcs": ["trl_cuma.rewards.ProfileJudge"]},
            "it is no function; of a class, name an instance",
        ),
        ("grpo", {"reward_funcs": ["os.no_such"]}, "`reward_funcs` names 'os.no_such', which can't be loaded"),
    ],
)
def test_what_a_launched_script_refuses_is_one_line(workspace, capsys, method, fields, message):
    """Also what is found after the arguments were parsed: in the data, the rewards, by the trainer."""
    if method == "grpo":
        fields = {"dataset_name": str(workspace / "data" / "sft"), "eval_strategy": "no"} | fields
    assert main([method, *script_arguments(workspace, method, **fields)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"trl-cuma {method}: error: ") and message in error


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mixture_keeps_each_rows_profile(workspace, streaming):
    entries = []
    for age in ("old", "young"):
        path = workspace / f"{age}.jsonl"
        rows = [
            {"prompt": f"{age} {n}?", "completion": " yes", "demographic": {"age": age}, "id": n} for n in range(4)
        ]
        path.write_text("\n".join(map(json.dumps, rows)))
        columns = ["prompt", "completion", "demographic"]
        entries.append({"path": "json", "data_files": str(path), "split": "train", "columns": columns})
    args = script_arguments(
        workspace, "sft", dataset_name=None, datasets=entries, streaming=streaming, max_steps=1, eval_strategy="no"
    )
    trainer = run(CuMASFTTrainer, CuMASFTConfig, args)
    table, seen = trainer.demographic_table, 0
    for batch in trainer.get_train_dataloader():
        for text, vector in zip(
            trainer.processing_class.batch_decode(batch["input_ids"]), batch["demographic_embeds"], strict=True
        ):
            assert torch.equal(vector, table([{"age": text.split()[0]}])[0])
            seen += 1
    assert seen == 8
    with pytest.raises(ValueError, match=r"`datasets\[1\]` keeps only the columns .* Add the demographic column"):
        entries[1]["columns"] = ["prompt", "completion"]
        run(CuMASFTTrainer, CuMASFTConfig, script_arguments(workspace, "sft", dataset_name=None, datasets=entries))
