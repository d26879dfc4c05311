# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
TRL's own command lines through our scripts. They are read from the installed TRL: the docstrings of its scripts and
its README. Reward models and GRPO have no example there and get DPO's, with the keys that they share.
"""

import importlib
import json
import re
import shlex
from dataclasses import dataclass, fields
from importlib.metadata import metadata

import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoModelForSequenceClassification
from trl import ModelConfig, TrlParser

import trl_cuma
from trl_cuma.arguments import METHODS, CuMAModelConfig, TrainingParser, parse_strictly
from trl_cuma.scripts import run
from trl_cuma.testing import chat_tokenizer, tiny_model


@dataclass
class Example:
    method: str
    source: str
    args: list[str]

    def __str__(self) -> str:
        return f"{self.method}-{self.source}"


def trls_parser(method: str) -> TrlParser:
    return importlib.import_module(f"trl.scripts.{method}").make_parser()


def examples_of(text: str, source: str) -> list[Example]:
    """The commands in a text's bash blocks that start one of the methods, as TRL's script or by `trl`."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.match(rf"\s*(?:python trl/scripts/|trl )({'|'.join(METHODS)})(?:\.py)? (.*)", line)
            if command:
                found.append(Example(command[1], f"{source}{len(found)}", shlex.split(command[2])))
    return found


def all_examples() -> list[Example]:
    found = examples_of(metadata("trl").get_payload() or metadata("trl")["Description"], "readme")
    for method in METHODS:
        found += examples_of(importlib.import_module(f"trl.scripts.{method}").__doc__ or "", "docstring")
    of_dpo = [example for example in found if example.method == "dpo"]
    for method in METHODS.keys() - {example.method for example in found}:
        known = trls_parser(method)._option_string_actions
        for example in of_dpo:
            args = [arg for arg in example.args if not arg.startswith("--") or arg in known]
            found.append(Example(method, f"like-dpo-{example.source}", args))
    return sorted(found, key=str)


EXAMPLES = all_examples()
# A CPU has no bfloat16 autocast of its own.
ON_CPU = ["--use_cpu"]


def test_there_are_examples():
    assert {example.method for example in EXAMPLES} == set(METHODS)
    for method in ("sft", "dpo", "kto"):  # full training and PEFT
        own = [example.args for example in EXAMPLES if example.method == method and "docstring" in example.source]
        assert len(own) >= 2 and {"--use_peft" in args for args in own} == {True, False}
    assert any("--load_in_4bit" in example.args for example in EXAMPLES)


# ---------------------------------------------------------------------- arguments
@pytest.mark.parametrize("method", METHODS)
def test_every_option_of_trls_script_is_one_of_ours(method):
    ours = TrainingParser(getattr(trl_cuma, f"CuMA{METHODS[method]}Config"))
    for action in trls_parser(method)._actions:
        for option in action.option_strings:
            own = ours._option_string_actions[option]
            assert (own.dest, own.nargs, own.choices) == (action.dest, action.nargs, action.choices)


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_arguments_mean_what_they_mean_to_trl(example):
    theirs = trls_parser(example.method).parse_args_and_config([*example.args, *ON_CPU])
    ours = parse_strictly(getattr(trl_cuma, f"CuMA{METHODS[example.method]}Config"), [*example.args, *ON_CPU])
    given = {arg.removeprefix("--").split("=")[0] for arg in example.args if arg.startswith("--")}
    implied = {field.name for field in fields(ModelConfig)} - given
    for their, our in zip(theirs, ours, strict=True):
        assert isinstance(our, type(their))
        for field in fields(their):
            if isinstance(their, ModelConfig) and field.name in implied:
                # What the command line leaves open: the paper's rank, alpha and dropout, and what is implied.
                default = "SEQ_CLS" if example.method == "reward" else "CAUSAL_LM"
                expected = default if field.name == "lora_task_type" else getattr(CuMAModelConfig(), field.name)
                assert getattr(our, field.name) == expected
            else:
                assert getattr(our, field.name) == getattr(their, field.name), field.name


def test_the_implied_model_arguments_are_few():
    ours, theirs = CuMAModelConfig(), ModelConfig()
    differ = {field.name for field in fields(ModelConfig) if getattr(ours, field.name) != getattr(theirs, field.name)}
    assert differ == {"use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_task_type"}


# ---------------------------------------------------------------------- runs
def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A tiny model, and for each method data in the form that TRL's example reads, with a demographic column."""
    folder = tmp_path_factory.mktemp("drop-in")
    tokenizer = chat_tokenizer(["Question 0? yes no"])
    tokenizer.save_pretrained(folder / "model")
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "num_attention_heads": 2}
    tiny_model("qwen3", **sizes).save_pretrained(folder / "model")
    AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1).save_pretrained(
        folder / "judge"
    )
    tokenizer.save_pretrained(folder / "judge")
    questions = [f"Question {row}?" for row in range(16)]
    columns = {
        "sft": {"messages": [turns(question, "yes") for question in questions]},
        "dpo": {
            "chosen": [turns(question, "yes") for question in questions],
            "rejected": [turns(question, "no") for question in questions],
        },
        "kto": {
            "prompt": [turns(question) for question in questions],
            "completion": [[{"role": "assistant", "content": "yes"}]] * 16,
            "label": [True, False] * 8,
        },
        "grpo": {"prompt": [turns(question) for question in questions]},
    }
    columns["reward"] = columns["dpo"]
    people = [{"age": "old" if row % 2 else "young", "country": "JP"} for row in range(16)]
    for method, data in columns.items():
        rows = Dataset.from_dict({**data, "demographic": people})
        DatasetDict(train=rows, test=rows.select(range(4))).save_to_disk(str(folder / "data" / method))
    return folder


def appended(workspace, method: str, output_dir) -> list[str]:
    """What replaces the model, the data and the size of a run; the rest stays as TRL's example has it."""
    args = {
        "model_name_or_path": workspace / "model",
        "dataset_name": workspace / "data" / method,
        "output_dir": output_dir,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "bf16": "false",
        "report_to": "none",
        "cuma_encoder": "field",
        "cuma_encoder_min_count": 2,
        "cuma_num_experts": 4,
        "cuma_router_hidden": 8,
    }
    if method == "grpo":
        rewards = {"reward_model_name_or_path": workspace / "judge", "reward_funcs": "think_format_reward"}
        args |= rewards | {"max_completion_length": 4, "gradient_accumulation_steps": 4}
    return ON_CPU + [text for name, value in args.items() for text in (f"--{name}", str(value))]


@pytest.fixture
def pushed(monkeypatch):
    """What a run would have pushed to the Hub, which is out of reach."""
    seen = []
    for name in METHODS.values():
        trainer = getattr(trl_cuma, f"CuMA{name}Trainer")
        monkeypatch.setattr(trainer, "init_hf_repo", lambda self, **_: setattr(self, "hub_model_id", "me/mine"))
        monkeypatch.setattr(trainer, "push_to_hub", lambda self, **kwargs: seen.append(kwargs))
        monkeypatch.setattr(trainer, "_push_from_checkpoint", lambda self, folder: None)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_an_example_of_trl_runs(example, workspace, tmp_path, pushed):
    if "--load_in_4bit" in example.args:
        pytest.importorskip("bitsandbytes")
    name = METHODS[example.method]
    args = [*example.args, *appended(workspace, example.method, tmp_path / "out")]
    trainer = run(getattr(trl_cuma, f"CuMA{name}Trainer"), getattr(trl_cuma, f"CuMA{name}Config"), args)
    assert trainer.state.global_step == 1
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["peft_type"] == "CUMA" and saved["num_experts"] == 4
    asked = TrainingParser(type(trainer.args)).parse_known_args(example.args)[0]
    assert (saved["r"], saved["lora_alpha"]) == (asked.lora_r, asked.lora_alpha)
    assert saved["task_type"] == ("SEQ_CLS" if example.method == "reward" else "CAUSAL_LM")
    quantized = getattr(trainer.model.get_base_model(), "is_loaded_in_4bit", False)
    assert quantized == ("--load_in_4bit" in example.args)
    assert pushed[-1:] == (
        [{"dataset_name": str(workspace / "data" / "sft")}] if "--push_to_hub" in example.args else []
    )
    if example.method == "grpo":
        assert len(trainer.reward_funcs) == 2
