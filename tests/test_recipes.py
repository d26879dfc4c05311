# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import math
import re
import shlex
from collections import Counter
from pathlib import Path

import accelerate.commands.launch
import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from datasets import Dataset, DatasetDict
from peft import get_peft_model
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerState
from trl import get_quantization_config

from trl_cuma import CuMADPOConfig, CuMAGRPOConfig, CuMAKTOConfig, CuMARewardConfig, CuMASFTConfig
from trl_cuma.cli import main
from trl_cuma.scripts import main as run_script
from trl_cuma.scripts import parse_strictly
from trl_cuma.testing import chat_tokenizer, tiny_model

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if "accelerate_configs" not in path.parts)
METHODS = {
    "sft": CuMASFTConfig,
    "dpo": CuMADPOConfig,
    "kto": CuMAKTOConfig,
    "reward": CuMARewardConfig,
    "grpo": CuMAGRPOConfig,
}
LARGE_MODELS = ["bloomz-7b1", "llama-3.1-8b", "qwen3-8b"]
ROWS_PER_STEP = {"sft": 16, "dpo": 32}  # the paper's
QLORA = {"load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"}


def method_of(path: Path) -> str:
    return path.stem.split("_")[0]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "recipes"))


def parse(path: Path, *args: str):
    # A CPU has no bfloat16 autocast of its own: `--use_cpu` lets the recipes of GPUs parse here.
    return parse_strictly(METHODS[method_of(path)], ["--config", str(path), *args, "--use_cpu", "true"])


def recipes_of(model: str) -> list[Path]:
    return [path for path in RECIPES if path.relative_to(ROOT / "recipes").parts[0] == model]


def joined_lines(text: str) -> str:
    return re.sub(r"\s*\\\n#?\s*", " ", text)


def test_there_are_recipes():
    kinds = Counter(path.relative_to(ROOT / "recipes").parts[0] for path in RECIPES)
    assert set(kinds) == {"quickstart", "global-opinions", *LARGE_MODELS}
    for model in LARGE_MODELS:  # each in full and in 4 bit, but for the paper's second rank
        paths = recipes_of(model)
        full = [path for path in paths if not path.stem.endswith(("_qlora", "_r64"))]
        assert {path.with_stem(f"{path.stem}_qlora") for path in full} < set(paths)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe(path):
    assert method_of(path) in METHODS
    script, training, model, _ = parse(path)
    assert script.dataset_name and model.model_name_or_path and training.output_dir
    model.adapter_config()
    # The command in its head runs this recipe, with a script that exists.
    pattern = r"accelerate launch (?:--config_file (\S+) )?(\S+) --config (\S+)"
    command = re.search(pattern, joined_lines(path.read_text()))
    assert command, "no command"
    assert command[1] is None or (ROOT / command[1]).is_file()
    assert (ROOT / command[2]).is_file() and Path(command[2]).name.startswith(method_of(path))
    assert ROOT / command[3] == path
    if training.cuma_adapter_path is not None:  # DPO goes on from what a recipe beside it writes
        before = [parse(p)[1].output_dir for p in path.parent.glob("sft*.yaml")]
        assert training.cuma_adapter_path in before


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*_cuma.py")), ids=lambda path: path.name)
def test_commands_of_the_examples(path):
    commands = re.findall(r"accelerate launch (\S+) --config (\S+)(.*)", path.read_text())
    assert commands
    for script, recipe, rest in commands:
        assert ROOT / script == path
        parse_strictly(METHODS[method_of(Path(recipe))], ["--config", str(ROOT / recipe), *rest.split()])


# ---------------------------------------------------------------------- recipes of large models
@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem.endswith("_qlora")], ids=name_of)
def test_a_qlora_recipe_differs_in_the_base_only(path):
    full = yaml.safe_load(path.with_stem(path.stem.removesuffix("_qlora")).read_text())
    qlora = yaml.safe_load(path.read_text())
    assert {key for key in {*full, *qlora} if full.get(key) != qlora.get(key)} - {"cuma_adapter_path"} == {
        *QLORA,
        "output_dir",
    }
    quantization = get_quantization_config(parse(path)[2])
    assert quantization.load_in_4bit and quantization.bnb_4bit_quant_type == "nf4"
    assert quantization.bnb_4bit_use_double_quant
    # FSDP2 shards a layer only if all its parameters have one dtype, and DeepSpeed's bf16 crashes on fp32 storage.
    assert quantization.bnb_4bit_quant_storage == quantization.bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [pytest.param("", marks=pytest.mark.slow), "_qlora"])
def test_the_settings_go_together(kind, tmp_path):
    """One SFT and one DPO recipe, on a base that a CPU holds."""
    tokenizer = chat_tokenizer(["Who am I? old young"])
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": "Who am I?", "demographic": {"age": age}} for age in ("old", "young") * 32]
    data = {
        "sft": [row | {"completion": f" {row['demographic']['age']}"} for row in rows],
        "dpo": [row | {"chosen": " old", "rejected": " young"} for row in rows],
    }
    for method, adapter in (("sft", []), ("dpo", ["--cuma_adapter_path", str(tmp_path / "sft")])):
        DatasetDict(train=Dataset.from_list(data[method])).save_to_disk(tmp_path / f"{method}-data")
        args = ["--config", str(ROOT / f"recipes/llama-3.1-8b/prism/{method}{kind}.yaml")]
        args += ["--model_name_or_path", str(tmp_path / "base"), "--dataset_name", str(tmp_path / f"{method}-data")]
        args += ["--output_dir", str(tmp_path / method), "--cuma_encoder", "field", "--cuma_encoder_min_count", "1"]
        assert run_script([method, *args, *adapter, "--use_cpu", "true", "--logging_steps", "1"]) == 0
    state = TrainerState.load_from_json(tmp_path / "dpo" / "checkpoint-2" / "trainer_state.json")
    first = state.log_history[0]
    # 64 rows in steps of 32; at first the reference is the policy, so that DPO's loss is ln 2, in bf16 to 3 digits.
    assert state.max_steps == 2
    assert first["loss"] - 0.01 * first["aux_loss"] == pytest.approx(math.log(2), abs=1e-3)


def commands_of(readme: Path) -> list[str]:
    """The lines of a page that launch something, with several processes or one."""
    blocks = re.findall(r"```bash\n(.*?)```", readme.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in joined_lines(block).splitlines()]
    launchers = ("accelerate launch ", "trl-cuma sft ", "trl-cuma dpo ", "sbatch ")
    return [line for line in lines if line.startswith(launchers)]


COMMANDS = [
    pytest.param(line, id=f"{folder}-{index}")
    for folder in [*LARGE_MODELS, "slurm"]
    for index, line in enumerate(commands_of(ROOT / "recipes" / folder / "README.md"))
]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_readmes_commands_keep_the_rows_of_a_step(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    if words[0] == "sbatch":  # two nodes of eight GPUs; what the script does with them: test_accelerate_configs.py
        script, method, recipe, *rest = words[1:]
        assert Path(script).is_file()
        processes, rest = 16, ["--config", recipe, *rest]
    elif words[0] == "trl-cuma":
        launched = []
        monkeypatch.setattr(accelerate.commands.launch, "launch_command", launched.append)
        assert main(words[1:]) == 0
        args, _, _ = _validate_launch_command(launched[0])
        method, *rest = args.training_script_args
        processes = args.num_processes
    else:
        args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
        assert Path(args.training_script).is_file()
        method, rest, processes = method_of(Path(args.training_script)), args.training_script_args, args.num_processes
    assert method_of(Path(rest[rest.index("--config") + 1])) == method
    training = parse_strictly(METHODS[method], [*rest, "--use_cpu", "true"], launched=True)[1]
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
    assert rows == ROWS_PER_STEP[method]


@pytest.mark.parametrize("model", LARGE_MODELS)
def test_each_recipe_is_in_its_readme(model):
    readme = (ROOT / "recipes" / model / "README.md").read_text()
    for path in recipes_of(model):
        assert re.search(rf"\b{path.parent.name}/{path.name}`", readme), path.name


# Embeddings and layers by the sizes of each model's config.json, on the meta device: no weights.
def llama_8b():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128_256,
            hidden_size=4096,
            intermediate_size=14_336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
        )
    )


def bloomz_7b1():
    return BloomForCausalLM(BloomConfig(vocab_size=250_880, hidden_size=4096, n_layer=30, n_head=32))


ROUTER = (4096 + 1024 + 1) * 256 + (256 + 1) * 8  # hidden state and profile -> 256 -> 8 experts


@pytest.mark.parametrize(
    ("model", "rank", "base_parameters", "trainable"),
    [
        # For each layer: 8 experts on q_proj 4096 -> 4096 and v_proj 4096 -> 1024, and a router for each of the two.
        ("qwen3-8b", 8, 8_190_735_360, 36 * (8 * 8 * (4096 + 4096 + 4096 + 1024) + 2 * ROUTER)),
        ("qwen3-8b", 64, 8_190_735_360, 36 * (8 * 64 * (4096 + 4096 + 4096 + 1024) + 2 * ROUTER)),
        ("llama-3.1-8b", 8, 8_030_261_248, 32 * (8 * 8 * (4096 + 4096 + 4096 + 1024) + 2 * ROUTER)),
        # On query_key_value, 4096 -> 3 * 4096.
        ("bloomz-7b1", 8, 7_069_016_064, 30 * (8 * 8 * (4096 + 12_288) + ROUTER)),
    ],
)
def test_parameters(model, rank, base_parameters, trainable, request):
    adapters = [parse(path)[2].adapter_config() for path in recipes_of(model)]
    adapters = [adapter for adapter in adapters if adapter.r == rank]
    assert all(adapter == adapters[0] for adapter in adapters)
    with torch.device("meta"):
        build = {"llama-3.1-8b": llama_8b, "bloomz-7b1": bloomz_7b1}.get(model)
        base = build() if build else request.getfixturevalue("qwen3_8b")
        assert sum(parameter.numel() for parameter in base.parameters()) == base_parameters
        counted, total = get_peft_model(base, adapters[0]).get_nb_trainable_parameters()
    assert (counted, total) == (trainable, base_parameters + trainable)
    readme = (ROOT / "recipes" / model / "README.md").read_text()
    assert f"{trainable:,}" in readme and f"{100 * trainable / base_parameters:.2f} %" in readme


def test_published_parameters_of_qwen3_8b():
    counts = {rank: 36 * (8 * rank * (4096 + 4096 + 4096 + 1024) + 2 * ROUTER) for rank in (8, 64)}
    assert counts == {8: 125_209_152, 64: 339_905_088}
