# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""That accelerate and DeepSpeed read our configurations, and the Slurm example, as their comments say."""

import json
import os
import re
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    is_deepspeed_available,
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from torch.distributed.fsdp import StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from trl_cuma import CuMADPOConfig, CuMASFTConfig
from trl_cuma.scripts import parse_strictly

ROOT = Path(__file__).parents[1]
CONFIGS = {path.stem: path for path in (ROOT / "recipes" / "accelerate_configs").glob("*.yaml")}
ZERO_STAGES = {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3, "zero3-offload": 3, "two-nodes-zero3": 3}
PLAIN = {"single": DistributedType.NO, "ddp": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP}
PREPARE = {"single": prepare_simple_launcher_cmd_env, "ddp": prepare_multi_gpu_env, "fsdp2": prepare_multi_gpu_env}
FREE_PORT = ["--main_process_port", "0"]
needs_deepspeed = pytest.mark.skipif(not is_deepspeed_available(), reason="DeepSpeed is not installed")


def launch(name, *options):
    """What `accelerate launch` makes of a configuration: its arguments, and the environment of the processes."""
    if name == "two-nodes-zero3":
        # The machine of rank 0 checks that its port is free, so this is the other one.
        options = ["--main_process_ip", "10.0.0.1", "--main_process_port", "29500", "--machine_rank", "1", *options]
    args = ["--config_file", str(CONFIGS[name]), *FREE_PORT, *options, "train.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(args))
    if name in ZERO_STAGES:
        args.deepspeed_fields_from_accelerate_config = ",".join([*defaults.deepspeed_config, "mixed_precision"])
    prepared = PREPARE.get(name, prepare_deepspeed_cmd_env)(args)
    return args, prepared[1] if isinstance(prepared, tuple) else prepared


@pytest.fixture
def launched():
    """As `launch`, with the environment set in this process until the test ends."""
    with patch.dict(os.environ):  # restores what the plugins write into it, too
        yield lambda name: os.environ.update(launch(name)[1])


def test_each_engine_has_a_configuration():
    assert set(CONFIGS) == {*ZERO_STAGES, *PLAIN}
    table = re.findall(r"^\| `(\S+)\.yaml` \|", (CONFIGS["ddp"].parent / "README.md").read_text(), re.MULTILINE)
    assert sorted(table) == sorted(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration(name):
    text = CONFIGS[name].read_text()
    comment = text[: text.index("compute_environment:")]
    assert all(re.search(rf"^# .*\b{word}:", comment, re.MULTILINE) for word in ("Shards", "Costs", "Processes"))
    config = load_config_from_file(str(CONFIGS[name]))  # raises for unknown keys, but only outermost ones
    known = {action.dest for action in launch_command_parser()._actions}
    assert {*config.deepspeed_config, *config.fsdp_config} <= known
    assert config.distributed_type == PLAIN.get(name, DistributedType.DEEPSPEED)
    assert (config.num_machines, config.num_processes) == {"single": (1, 1), "two-nodes-zero3": (2, 16)}.get(
        name, (1, 8)
    )
    # What `accelerate launch` never takes from a file would mislead here: its parser has defaults for them.
    assert not {"same_network", "rdzv_backend", "debug"} & set(yaml.safe_load(text))


@pytest.mark.parametrize("name", CONFIGS)
def test_launch(name):
    args, environment = launch(name)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert (args.use_deepspeed, args.use_fsdp, args.multi_gpu) == (name in ZERO_STAGES, name == "fsdp2", name == "ddp")
    assert (environment.get("ACCELERATE_USE_DEEPSPEED") == "true") == (name in ZERO_STAGES)
    assert (environment.get("ACCELERATE_USE_FSDP") == "true") == (name == "fsdp2")
    if name != "single":
        assert args.nproc_per_node == "8"


def test_the_command_line_has_the_last_word_on_processes():
    for name in ("ddp", "fsdp2", "zero3"):
        assert launch(name, "--num_processes", "4")[0].nproc_per_node == "4"
    args, _ = launch("two-nodes-zero3", "--num_machines", "4", "--num_processes", "32")
    assert (args.nnodes, args.nproc_per_node) == ("4", "8")


def test_two_nodes():
    args, _ = launch("two-nodes-zero3")
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "8", 1)
    # torchrun's own rendezvous with machine 0, rather than DeepSpeed's launchers over ssh
    assert args.deepspeed_multinode_launcher == "standard"
    assert (args.rdzv_backend, args.rdzv_endpoint) == ("static", "10.0.0.1:29500")


def test_fsdp2(launched):
    launched("fsdp2")
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    assert plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing


@needs_deepspeed
@pytest.mark.parametrize("name", ZERO_STAGES)
def test_zero(name, launched, tmp_path):
    from accelerate.utils import DeepSpeedPlugin
    from transformers.integrations import unset_hf_deepspeed_config
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    recipe = ["--output_dir", str(tmp_path), "--dataset_name", "x", "--use_cpu", "true", "--max_grad_norm", "0.5"]
    recipe += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "3"]
    training = parse_strictly(CuMASFTConfig, recipe)[1]
    launched(name)
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision("bf16")
    settings = plugin.deepspeed_config["zero_optimization"]
    assert plugin.zero_stage == settings["stage"] == ZERO_STAGES[name]
    assert plugin.zero3_init_flag == settings["stage3_gather_16bit_weights_on_model_save"] == (plugin.zero_stage == 3)
    where = "cpu" if name == "zero3-offload" else "none"
    assert settings["offload_optimizer"]["device"] == settings["offload_param"]["device"] == where
    # What the recipe says is not said again here, so that nothing contradicts it.
    config = HfTrainerDeepSpeedConfig(plugin.deepspeed_config)
    config.trainer_config_process(training)
    config.trainer_config_finalize(training, None, 10)
    of_recipe = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert [config.config[key] for key in of_recipe] == [2, 3, 0.5]
    assert config.config["bf16"]["enabled"] is True
    unset_hf_deepspeed_config()


# ---------------------------------------------------------------------- Slurm
SLURM = ROOT / "recipes" / "slurm"
STUBS = {
    # Runs the command once for each node, as `srun` does at the same time.
    "srun": """#!/bin/bash
echo "cpus $SRUN_CPUS_PER_TASK" >>"$LOG"
while [[ $1 == --* ]]; do shift; done
if [ -n "$SLEEP" ]; then sleep "$SLEEP"; fi
for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || exit 3; done
""",
    "scontrol": """#!/bin/bash
echo "scontrol $*" >>"$LOG"
if [ "$1 $2" = "show hostnames" ]; then printf '%s\\n' node-1 node-2; fi
""",
    "accelerate": """#!/usr/bin/env python3
import json, os, sys
with open(os.environ["LAUNCHED"], "a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
sys.exit(int(os.environ.get("FAIL", "0")))
""",
}


@pytest.fixture
def slurm(tmp_path):
    """Start the script as Slurm does on its first node; also what was launched, and what the log says."""
    for name, text in STUBS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    log, launched = tmp_path / "log", tmp_path / "launched"
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "LOG": str(log),
        "LAUNCHED": str(launched),
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NODELIST": "node-[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_CPUS_PER_TASK": "32",
    }

    jobs = []

    def start(*args, without=(), **more):
        given = {key: value for key, value in (environment | more).items() if key not in without}
        command = [shutil.which("bash"), str(SLURM / "train.sbatch"), *args]
        with open(log, "a") as stderr:
            jobs.append(subprocess.Popen(command, cwd=ROOT, env=given, stderr=stderr, start_new_session=True))
        return jobs[-1]

    def launches():
        return [json.loads(line) for line in launched.read_text().splitlines()] if launched.exists() else []

    yield start, launches, lambda: log.read_text() if log.exists() else ""
    for job in jobs:  # and what it started
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def test_slurm_starts_each_node_and_resumes(slurm, monkeypatch):
    monkeypatch.chdir(ROOT)
    start, launches, log = slurm
    recipe = "recipes/llama-3.1-8b/community_alignment/dpo.yaml"
    assert start("dpo", recipe, "--save_steps", "50", "--run_name", "two words").wait() == 0
    assert len(launches()) == 2 and "cpus 32" in log()
    for rank, argv in enumerate(launches()):
        assert argv.pop(0) == "launch"
        args = launch_command_parser().parse_args(argv)
        assert (ROOT / args.config_file).samefile(CONFIGS["two-nodes-zero3"])
        assert (args.machine_rank, args.num_machines, args.num_processes) == (rank, 2, 8)
        assert (args.main_process_ip, args.main_process_port) == ("node-1", 20000 + 4567)
        assert args.training_script == "examples/dpo_cuma.py" and (ROOT / args.training_script).is_file()
        script_args = [*args.training_script_args, "--use_cpu", "true"]
        _, training, model, _ = parse_strictly(CuMADPOConfig, script_args)
        assert model.model_name_or_path == "meta-llama/Llama-3.1-8B-Instruct"
        assert (training.save_strategy, training.save_steps, training.run_name) == ("steps", 50, "two words")
        assert training.resume_from_checkpoint == "true"


def test_slurm_queues_the_job_again_when_its_time_is_up(slurm):
    start, launches, log = slurm
    job = start("sft", "recipe.yaml", SLEEP="30")
    while "cpus 32" not in log():  # the trap is set before
        assert job.poll() is None
    job.send_signal(signal.SIGUSR1)
    job.wait(timeout=20)
    assert "queued again" in log() and "scontrol requeue 1234567" in log() and not launches()


def test_slurm_does_not_queue_a_failed_training_again(slurm):
    start, launches, log = slurm
    assert start("sft", "recipe.yaml", FAIL="1").wait() == 3
    assert len(launches()) == 1 and "requeue" not in log()


def test_slurm_says_what_is_missing(slurm):
    start, launches, log = slurm
    assert start("sft").wait() == 2
    assert "usage: sbatch" in log()
    assert start("sft", "recipe.yaml", without=("SLURM_GPUS_ON_NODE",)).wait() != 0
    assert "ask for them, with --gpus-per-node" in log()
    assert not launches()


def test_slurm_script_passes_shellcheck():
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        subprocess.run(["bash", "-n", str(SLURM / "train.sbatch")], check=True)
    else:
        subprocess.run([shellcheck, str(SLURM / "train.sbatch")], check=True)
