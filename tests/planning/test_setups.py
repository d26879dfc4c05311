# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The command: what it reads, what it refuses, and which setup it finds."""

import json
import shlex
from pathlib import Path

import pytest
import yaml

from trl_cuma import CuMADPOConfig, CuMASFTConfig
from trl_cuma.arguments import TrainingParser, parse_strictly
from trl_cuma.cli import main
from trl_cuma.planning import Planner, as_json, read_request, render
from trl_cuma.planning.memory import ENGINES
from trl_cuma.planning.report import launch_lines, recipe_lines
from trl_cuma.planning.setups import CONTEXT, GIB, SLACK, counts

ROOT = Path(__file__).parents[2]
SMALL = ["--max_length", "32", "--per_device_train_batch_size", "2", "--lora_r", "4", "--cuma_router_hidden", "8"]


@pytest.fixture
def plan(config_file, capsys):
    """Run `trl-cuma plan` on a tiny model; its exit code, output and error."""

    def run(*args: str, architecture: str = "qwen3") -> tuple[int, str, str]:
        code = main(["plan", "--model_name_or_path", config_file(architecture), *SMALL, *args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def planner(config_file):
    """A planner whose steps are not run: activations of 30 GiB, 10 with checkpointing."""

    def make(*args: str) -> Planner:
        request, _ = read_request(["--model_name_or_path", config_file(), *SMALL, *args])
        planner = Planner(request)
        planner.step = lambda engine, checkpointing: (10 * GIB if checkpointing else 30 * GIB, 10**12)
        return planner

    return make


# ---------------------------------------------------------------------- what is found
def test_a_small_model_fits_on_one_gpu(plan) -> None:
    code, out, _ = plan("--engine", "single", "--gpu_memory", "24")
    assert code == 0
    assert "It fits: single on 1 GPU, without gradient checkpointing" in out
    assert "examples/sft_cuma.py --config RECIPE.yaml" in out


@pytest.mark.parametrize(
    "gpu_memory, found",
    [  # what is held is small beside 1.5 GiB and 5 % of the activations, but for ZeRO's bucket
        ("34", ("single", 1, False)),
        ("13", ("single", 1, True)),
        ("5", None),
    ],
)
def test_checkpointing_comes_before_more_gpus(planner, gpu_memory: str, found) -> None:
    smallest = planner("--gpu_memory", gpu_memory).plan().smallest
    assert (smallest and (smallest[0].engine, smallest[0].gpus, smallest[1])) == found


def test_more_gpus_where_the_weights_need_them(planner) -> None:
    """Llama 70B in bf16: of 131 GiB of weights a quarter, 33, fits on a GPU of 79 beside 30 GiB of activations."""
    made = planner("--model_name_or_path", "meta-llama/Llama-3.1-70B", "--num_gpus", "16")
    smallest, checkpointing = made.plan().smallest
    assert (smallest.engine, smallest.gpus, checkpointing) == ("fsdp2", 4, False)
    made = planner("--model_name_or_path", "meta-llama/Llama-3.1-70B", "--num_gpus", "1", "--gpu_memory", "40")
    assert made.plan().smallest[0].engine == "zero3-offload"  # where nothing else is left


def test_a_requested_engine_is_launched_on_the_requested_gpus(planner) -> None:
    found = planner("--engine", "zero3", "--num_gpus", "8").plan()
    assert [setup.engine for setup in found.setups] == ["zero3"]
    assert (found.chosen[0].gpus, found.smallest[0].gpus) == (8, 1)


def test_numbers_of_gpus() -> None:
    assert [list(counts(most)) for most in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_the_total_is_the_sum_of_its_columns(plan, planner) -> None:
    _, out, _ = plan("--json", "--engine", "ddp")
    rows = json.loads(out)["setups"] + as_json(planner().plan())["setups"]
    assert len(rows) == 1 + len(ENGINES)
    for row in rows:
        held = sum(row[name] for name in ("weights", "adapter", "optimizer", "gradients", "buffers"))
        for key in ("without_checkpointing", "with_checkpointing"):
            needed = held + row["activations"][key]
            assert row["total"][key] == pytest.approx(needed + CONTEXT + SLACK * needed, abs=2)


def test_hours(planner) -> None:
    """1000 rows, 2 epochs, 1e12 operations for 2 rows; one GPU at half of 100 TFLOP/s."""
    args = ["--num_rows", "1000", "--num_train_epochs", "2", "--peak_tflops", "100", "--utilization", "0.5"]
    assert planner(*args).plan().hours() == pytest.approx(1000 * 2 * 0.5e12 / 50e12 / 3600)
    assert planner().plan().hours() is None


# ---------------------------------------------------------------------- what is printed
def test_the_recipe_and_the_command_it_prints_work(plan, tmp_path) -> None:
    code, out, _ = plan("--precision", "nf4", "--engine", "zero3", "--num_gpus", "16")
    assert code == 0
    recipe = out.split("Recipe:\n\n")[1].split("\n\nLaunch:")[0]
    lines = yaml.safe_load(recipe)
    assert (lines["load_in_4bit"], lines["bnb_4bit_quant_storage"]) == (True, "bfloat16")
    parser = TrainingParser(CuMASFTConfig)
    parser.read(lines, ["--use_cpu", "true"])
    _, training, model, _ = parser.parse_args_into_dataclasses(["--use_cpu", "true"])
    assert (training.max_length, model.lora_r) == (32, 4)
    launch = out.split("Launch:\n\n")[1].replace("\\\n", " ").split()
    assert launch[:2] == ["accelerate", "launch"]
    # 16 GPUs are two machines of 8, for which there is an example
    assert launch[launch.index("--config_file") + 1] == "recipes/accelerate_configs/two-nodes-zero3.yaml"
    assert launch[launch.index("--num_machines") + 1] == "2"
    assert (ROOT / "examples" / "sft_cuma.py").is_file()


# Every key that the plan reads and prints only where it says something, with a value that isn't its default.
UNCOMMON = {
    "model_revision": "v2",
    "trust_remote_code": True,
    "load_in_4bit": True,
    "use_bnb_nested_quant": True,
    "bnb_4bit_quant_storage": "bfloat16",
    "lora_dropout": 0.1,
    "use_rslora": True,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj"],
    "lora_modules_to_save": ["lm_head"],
    "cuma_gate": "softmax_topk",
    "cuma_demographic_projection": 8,
    "cuma_router_layers": 3,
    "cuma_share_a": True,
    "cuma_router_groups": ["q_proj,k_proj"],
    "cuma_missing_demographics": "zero",
    "cuma_adapter_path": "runs/sft",
    "precompute_ref_log_probs": True,
    "num_train_epochs": 2.0,
    "gradient_checkpointing_kwargs": {"use_reentrant": True},
}


@pytest.fixture
def recipe_file(config_file, tmp_path):
    """The path of a recipe of a tiny model, with these keys too."""

    def write(name: str, **keys) -> str:
        keys = {"model_name_or_path": config_file(), "dtype": "bfloat16", "max_length": 32} | keys
        (tmp_path / name).write_text(yaml.safe_dump(keys))
        return str(tmp_path / name)

    return write


def test_a_recipe_that_is_printed_plans_the_same(planner, recipe_file) -> None:
    """Nothing that the numbers depend on is left out, and nothing is said that goes without saying."""
    made = planner("--config", recipe_file("dpo.yaml", **UNCOMMON), "--gpu_memory", "14").plan()
    lines = recipe_lines(made)
    assert {key: lines.get(key) for key in UNCOMMON} == UNCOMMON
    again, _ = read_request(["--config", recipe_file("dpo_again.yaml", **lines)])
    assert (again.base, again.adapter, again.rows) == (made.request.base, made.request.adapter, made.request.rows)
    assert not UNCOMMON.keys() & recipe_lines(planner("--gpu_memory", "14").plan()).keys()
    routing = planner("--cuma_routing", "semantic").plan()
    assert recipe_lines(routing)["cuma_routing"] == "semantic"


def test_the_command_sets_what_differs_from_the_recipe(planner, recipe_file) -> None:
    """What is launched is what was planned, and not what the file says."""
    keys = {"load_in_4bit": True, "gradient_checkpointing": True, "per_device_train_batch_size": 2, "lora_r": 4}
    path = recipe_file("dpo.yaml", cuma_router_hidden=8, **keys)
    targets = ["--lora_target_modules", "q_proj", "k_proj"]
    made = planner("--config", path, "--precision", "bf16", *targets, "--engine", "ddp", "--num_gpus", "2").plan()
    assert recipe_lines(made)["load_in_4bit"] is False
    words = shlex.split("\n".join(launch_lines(made)).replace("\\\n", " "))
    arguments = words[words.index("examples/dpo_cuma.py") + 1 :]
    assert [word for word in arguments if word.startswith("--")] == [
        *("--config", "--load_in_4bit", "--lora_target_modules"),
        *("--gradient_checkpointing", "--ddp_find_unused_parameters"),
    ]
    _, training, model, _ = parse_strictly(CuMADPOConfig, [*arguments, "--dataset_name", "data", "--use_cpu", "true"])
    assert (model.load_in_4bit, model.lora_target_modules) == (False, ["q_proj", "k_proj"])
    assert (training.gradient_checkpointing, training.ddp_find_unused_parameters) == (False, False)


def test_int8_is_told_to_checkpoint_reentrantly(planner) -> None:
    """bitsandbytes keeps its layers' inputs where only the reentrant kind doesn't."""
    hint = "unless you set `gradient_checkpointing_kwargs: {use_reentrant: true}`"
    reentrant = ["--gradient_checkpointing_kwargs", '{"use_reentrant": true}']
    assert hint in render(planner("--precision", "int8").plan())
    assert hint not in render(planner("--precision", "nf4").plan())
    made = planner("--precision", "int8", "--gpu_memory", "20", *reentrant).plan()  # fits with checkpointing only
    assert hint not in render(made)
    assert recipe_lines(made)["gradient_checkpointing_kwargs"] == {"use_reentrant": True}


def test_a_recipe_is_read_and_its_method_is_its_name() -> None:
    request, _ = read_request(["--config", str(ROOT / "recipes/qwen3-8b/community_alignment/dpo.yaml")])
    assert (request.method, request.rows) == ("dpo", 2 * request.training_args.per_device_train_batch_size)
    assert request.adapter.target_modules == {"q_proj", "v_proj"}
    assert request.base.quantization is None and request.training_args.max_length == 2048
    args = ["--config", str(ROOT / "recipes/qwen3-8b/community_alignment/dpo.yaml"), "--max_length=64"]
    assert read_request([*args, "--precision", "int8"])[0].base.quantization == "int8"
    assert read_request(args)[0].training_args.max_length == 64


def test_what_a_command_line_says_of_precision_is_planned(config_file) -> None:
    def base(*args: str) -> tuple:
        request, _ = read_request(["--model_name_or_path", config_file(), *args])
        return str(request.base.dtype), request.training_args.bf16

    assert base() == ("torch.bfloat16", True)
    assert base("--bf16", "false") == ("torch.float32", False)  # `dtype` has the recipes' default


def test_a_gpu_of_80_gb_has_79_gib(config_file) -> None:
    """As `recipes/plans/README.md` says."""
    assert read_request(["--model_name_or_path", config_file()])[0].gpu_memory == 79


def test_help(capsys) -> None:
    assert main(["plan", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("--engine", "--gpu_memory", "Qwen/Qwen3-8B", "per_device_train_batch_size"))


# ---------------------------------------------------------------------- what goes wrong
@pytest.mark.parametrize(
    "args, message",
    [
        (["--num_gpus", "0"], "`num_gpus` must be 1 or more, got 0."),
        (["--gpu_memory", "0"], "`gpu_memory` must be more than 0, got 0.0."),
        (["--utilization", "40"], "`utilization` must be in (0, 1], got 40.0."),
        (["--num_rows", "-1"], "`num_rows` must be 1 or more, got -1."),
        (["--per_device_train_batch_size", "0"], "`per_device_train_batch_size` must be 1 or more, got 0."),
        (["--engine", "zero4"], "argument --engine: invalid choice: 'zero4'"),
        (["--lora_rank", "4"], "Unknown arguments: 'lora_rank'"),
        (["--optim", "adafactor"], "`optim` must be one of 'adamw_torch', "),
        (["--packing", "true"], "`packing` and `padding_free` lay a batch out as one long row"),
        (["--precision", "int8", "--engine", "zero3"], "`precision` int8 saves nothing under zero3: every GPU keeps"),
        (["--precision", "int8", "--engine", "fsdp2"], "`precision` int8 crashes under fsdp2"),
        (
            ["--precision", "nf4", "--bnb_4bit_quant_storage", "float32", "--engine", "zero2"],
            "`bnb_4bit_quant_storage` is float32, which DeepSpeed casts",
        ),
        (
            ["--precision", "nf4", "--bnb_4bit_quant_storage", "uint8", "--engine", "fsdp2"],
            "`bnb_4bit_quant_storage` is uint8, and fsdp2 shards packed weights only in the dtype it computes in: set "
            "it to bfloat16",
        ),
        (
            ["--optim", "adamw_8bit", "--engine", "zero3-offload"],
            "`optim` adamw_8bit with its state in host memory was",
        ),
        (["--precision", "bf16", "--load_in_4bit", "true"], "`--precision bf16` and `--load_in_4bit` were both given"),
        (["--precision", "nf4", "--load-in-8bit=true"], "`--precision nf4` and `--load_in_8bit` were both given"),
        (["--dtype", "bfloat16", "--bf16", "false", "--engine", "zero1"], "`bf16` is false with `dtype` bfloat16"),
        (["--lora_target_modules", "c_attn"], "c_attn"),
    ],
)
def test_errors_are_one_line(plan, args: list[str], message: str) -> None:
    code, out, error = plan(*args)
    assert (code, out) == (2, "")
    assert error.startswith("trl-cuma plan: error: ") and message in error


def test_an_encoder_decoder_is_no_causal_language_model(tmp_path, capsys) -> None:
    path = tmp_path / "t5.json"
    path.write_text(json.dumps({"model_type": "t5"}))
    assert main(["plan", "--model_name_or_path", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"`model_name_or_path` is '{path}', a T5Config, which is no causal language model." in error
    assert len(error) < 300 + len(str(path))  # transformers lists all of its classes


@pytest.mark.parametrize("engine, parts", [("single", 1), ("zero2", 4)])
def test_8_bit_optimizers(planner, engine: str, parts: int) -> None:
    """
    Two bytes for each trained number, and a float32 for 256 of each; DeepSpeed has a float32 copy too, which
    transformers allows with every optimizer.
    """
    made = planner("--optim", "adamw_bnb_8bit")
    setup, trained = made.setup(engine, parts), sum(p.numel for p in made.model.trained)
    copy = 4 if engine == "zero2" else 0
    assert setup.refusal is None
    assert setup.memory.optimizer == pytest.approx(trained / parts * (copy + 2 + 8 / 256), abs=8)


def test_without_a_model(capsys) -> None:
    assert main(["plan"]) == 2
    assert "Name the base model with `--model_name_or_path`" in capsys.readouterr().err


def test_engines_that_do_not_work_are_named_in_the_table(planner) -> None:
    refusals = {s.engine: s.refusal for s in planner("--precision", "int8").plan().setups if s.refusal}
    assert set(refusals) == {"fsdp2", "zero3", "zero3-offload"}


def test_a_base_that_does_not_load_does_not_fit(planner) -> None:
    """BLOOM-176B in 4 bit: 1/8 of it is little, but each GPU holds all of it before it is sharded."""
    made = planner("--model_name_or_path", "bigscience/bloom", "--precision", "nf4")
    zero3 = made.setup("zero3", 8)
    assert zero3.total(True) < 60 * GIB and zero3.memory.loading > 90 * GIB
    assert not zero3.fits(True, 80) and zero3.fits(True, 140)
