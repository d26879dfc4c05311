# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import re
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from trl_cuma import CuMADPOConfig, CuMAGRPOConfig, CuMAKTOConfig, CuMARewardConfig, CuMASFTConfig
from trl_cuma.scripts import parse_strictly

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if "accelerate_configs" not in path.parts)
METHODS = {
    "sft": CuMASFTConfig,
    "dpo": CuMADPOConfig,
    "kto": CuMAKTOConfig,
    "reward": CuMARewardConfig,
    "grpo": CuMAGRPOConfig,
}


def method_of(path: Path) -> str:
    return path.stem.split("_")[0]


def parse(path: Path):
    # A CPU has no bfloat16 autocast of its own: `--use_cpu` lets the recipes of GPUs parse here.
    return parse_strictly(METHODS[method_of(path)], ["--config", str(path), "--use_cpu", "true"])


def test_there_are_recipes():
    assert {path.relative_to(ROOT / "recipes").parts[0] for path in RECIPES} >= {
        "quickstart",
        "global-opinions",
        "qwen3-8b",
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_recipe(path):
    assert method_of(path) in METHODS
    script, training, model, _ = parse(path)
    assert script.dataset_name and model.model_name_or_path and training.output_dir
    model.adapter_config()
    # The command in its head runs this recipe, with a script that exists.
    command = re.search(r"accelerate launch (\S+) --config (\S+)", path.read_text())
    assert command, "no command"
    assert (ROOT / command[1]).is_file() and Path(command[1]).name.startswith(method_of(path))
    assert ROOT / command[2] == path
    if training.cuma_adapter_path is not None:  # DPO goes on from what a recipe beside it writes
        before = [parse(p)[1].output_dir for p in path.parent.glob("sft*.yaml")]
        assert training.cuma_adapter_path in before


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_commands_of_the_examples(path):
    commands = re.findall(r"accelerate launch (\S+) --config (\S+)(.*)", path.read_text())
    assert commands
    for script, recipe, rest in commands:
        assert ROOT / script == path
        parse_strictly(METHODS[method_of(Path(recipe))], ["--config", str(ROOT / recipe), *rest.split()])


@pytest.mark.parametrize(
    "path",
    [path for path in RECIPES if "qwen3-8b" in path.parts and method_of(path) == "sft"],
    ids=lambda path: str(path.relative_to(ROOT / "recipes")),
)
def test_parameters_on_qwen3_8b(path, qwen3_8b):
    _, _, model_args, _ = parse(path)
    with torch.device("meta"):
        model = get_peft_model(qwen3_8b, model_args.adapter_config())
    trainable, _ = model.get_nb_trainable_parameters()
    # a layer's q_proj 4096 -> 4096 and v_proj 4096 -> 1024; for each a router (4096 + 1024 + 1) * 256 + (256 + 1) * 8
    r = model_args.lora_r
    assert trainable == 36 * (8 * r * (4096 + 4096 + 4096 + 1024) + 2 * (5121 * 256 + 257 * 8))
    assert trainable == {8: 125_209_152, 64: 339_905_088}[r]  # the published numbers
