# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import accelerate.commands.launch
import pytest
import yaml
from datasets import Dataset, DatasetDict
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from trl_cuma.arguments import METHODS
from trl_cuma.cli import main
from trl_cuma.testing import chat_tokenizer, tiny_model

ROOT = Path(__file__).parents[1]
# What TRL ships, of which `trl-cuma` speaks in its help.
ACCELERATE_CONFIGS = [path.name.removesuffix(".yaml") for path in resources.files("trl.accelerate_configs").iterdir()]
ACCELERATE_CONFIGS = sorted(name for name in ACCELERATE_CONFIGS if not name.startswith("_"))


@pytest.fixture
def launched(monkeypatch):
    """What `accelerate launch` would have been asked to do."""
    seen = []
    monkeypatch.setattr(accelerate.commands.launch, "launch_command", seen.append)
    return seen


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe; returns its path."""

    def write(**fields):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(fields))
        return str(path)

    return write


# ---------------------------------------------------------------------- help
def test_help_lists_the_methods(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"\n    {command} " in shown for command in ("quickstart", *METHODS))


@pytest.mark.parametrize("method", METHODS)
def test_help_of_a_method(method, capsys, launched):
    with pytest.raises(SystemExit, match="0"):
        main([method, "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: trl-cuma {method} ")
    for name in ("--learning_rate", "--lora_r", "--cuma_num_experts", "--demographic_column", "--num_processes"):
        assert name in shown
    assert ("--reward_funcs" in shown) == (method == "grpo")
    assert ACCELERATE_CONFIGS and all(name in shown for name in ACCELERATE_CONFIGS)
    assert not launched


def test_a_command_that_is_none():
    with pytest.raises(SystemExit, match="2"):
        main(["ppo"])


# ---------------------------------------------------------------------- what is launched
def test_the_script_gets_its_arguments_and_accelerate_its_own(recipe, launched):
    path = recipe(learning_rate=0.5)
    args = ["--num_processes", "2", "--config", path, "--main-process-port=123", "--multi_gpu", "--packing"]
    assert main(["sft", *args, "--lora_target_modules", "q_proj", "v_proj", "--num_machines", "1"]) == 0
    (args,) = launched
    assert (args.num_processes, args.main_process_port, args.multi_gpu, args.num_machines) == (2, 123, True, 1)
    assert args.module and args.training_script == "trl_cuma.scripts"
    expected = ["sft", "--config", path, "--packing", "--lora_target_modules", "q_proj", "v_proj"]
    assert args.training_script_args == expected


def test_accelerates_keys_in_a_recipe(recipe, launched):
    path = recipe(num_processes=4, main_process_port=5, accelerate_config="zero2", tpu=False, use_fsdp=True)
    assert main(["dpo", f"--config={path}", "--num_processes=2", "--accelerate_config", "fsdp2"]) == 0
    (args,) = launched
    assert (args.num_processes, args.main_process_port, args.tpu, args.use_fsdp) == (2, 5, False, True)
    assert Path(args.config_file).name == "fsdp2.yaml"  # the command line wins
    assert args.training_script_args == ["dpo", f"--config={path}"]


@pytest.mark.parametrize("name", ACCELERATE_CONFIGS)
def test_accelerate_configs_of_trl(name, launched):
    assert main(["kto", "--accelerate_config", name, "--learning_rate", "1e-3"]) == 0
    (args,) = launched
    settings = yaml.safe_load(Path(args.config_file).read_text())
    assert Path(args.config_file).name == f"{name}.yaml" and "distributed_type" in settings


def test_accelerate_config_by_path(launched, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("distributed_type: 'NO'\n")
    assert main(["grpo", "--accelerate_config", str(path)]) == 0
    assert launched[0].config_file == str(path)


def test_environment_of_a_recipe_is_set_before_the_launch(recipe, launched, monkeypatch):
    monkeypatch.setenv("CUMA_TEST", "before")
    assert main(["sft", "--config", recipe(env={"CUMA_TEST": "now"})]) == 0
    assert os.environ["CUMA_TEST"] == "now" and launched


def test_what_trl_and_accelerate_both_read_is_trls(launched):
    assert main(["sft", "--use_cpu", "--gradient_accumulation_steps", "2", "--debug", "underflow_overflow"]) == 0
    assert launched[0].training_script_args[1:] == [
        *("--use_cpu", "--gradient_accumulation_steps", "2", "--debug", "underflow_overflow")
    ]


# ---------------------------------------------------------------------- what goes wrong
@pytest.mark.parametrize(
    "args, message",
    [
        (["--torch_dtype", "bfloat16"], "Unknown arguments: 'torch_dtype' is now `dtype`. "),
        (["--learning_rat", "1"], "Unknown arguments: 'learning_rat' (did you mean 'learning_rate'?). "),
        (["--lora_r", "four"], "argument --lora_r/--lora-r: invalid int value: 'four'"),
        (["--config", "nowhere.yaml"], "[Errno 2] No such file or directory: 'nowhere.yaml'"),
        (["--accelerate_config", "zero9"], "Accelerate config zero9 is neither a file nor a valid config"),
    ],
)
def test_an_error_is_one_line_and_nothing_is_launched(args, message, capsys, launched):
    assert main(["sft", *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"trl-cuma sft: error: {message}") and error.count("\n") == 1
    assert not launched


@pytest.mark.parametrize("code, returned", [(3, 3), (-9, 1)])  # -9: killed
@pytest.mark.parametrize("processes", [1, 2])
def test_a_failed_run_gives_its_exit_code(processes, code, returned, monkeypatch, capsys):
    def launch(args):
        if processes == 1:
            raise subprocess.CalledProcessError(code, "python")
        failures = {1: ProcessFailure(local_rank=1, pid=1, exitcode=code, error_file="none")}
        raise ChildFailedError("trl_cuma.scripts", failures)

    monkeypatch.setattr(accelerate.commands.launch, "launch_command", launch)
    assert main(["reward", "--learning_rate", "1"]) == returned
    assert capsys.readouterr().err == f"trl-cuma reward: the training process failed (exit code {code}).\n"


def test_nothing_touches_a_device_before_the_launch(recipe, launched):
    import torch

    assert main(["sft", "--config", recipe(bf16=True, fsdp="full_shard", learning_rate=1e-3)]) == 0
    assert launched and not torch.cuda.is_initialized()


# ---------------------------------------------------------------------- a real launch
@pytest.fixture
def workspace(tmp_path):
    tokenizer = chat_tokenizer(["Question 0? yes no"])
    tokenizer.save_pretrained(tmp_path / "model")
    model = tiny_model("qwen3", vocab_size=len(tokenizer), hidden_size=32, num_attention_heads=2)
    model.save_pretrained(tmp_path / "model")
    rows = {
        "text": [f"Question {row}? yes" for row in range(8)],
        "demographic": [{"age": "old"}, {"age": "young"}] * 4,
    }
    DatasetDict(train=Dataset.from_dict(rows)).save_to_disk(str(tmp_path / "data"))
    settings = {
        "model_name_or_path": "model",
        "dataset_name": "data",
        "output_dir": "out",
        "lora_r": 2,
        "cuma_num_experts": 2,
        "cuma_encoder": "field",
        "cuma_encoder_min_count": 2,
        "max_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "num_processes": 1,  # accelerate's
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


@pytest.mark.slow
def test_a_real_launch(workspace):
    def launch(*args):
        command = [sys.executable, "-m", "trl_cuma.cli", "sft", "--config", "sft.yaml", *args]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True)

    done = launch()
    assert done.returncode == 0, done.stderr
    assert (workspace / "out" / "adapter_model.safetensors").exists()
    # A value that only the script can check: its exit code, its line, and no traceback of the launcher.
    wrong = launch("--cuma_encoder", "qwen")
    assert wrong.returncode == 2
    assert "trl-cuma sft: error: `cuma_encoder` must be 'text', 'field' or 'none', got 'qwen'." in wrong.stderr
    assert "trl-cuma sft: the training process failed (exit code 2)." in wrong.stderr
    assert "Traceback" not in wrong.stderr
