# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""`trl-cuma prepare`, from the command line to a trained step."""

import json
import shlex
from pathlib import Path

import pytest
import yaml
from datasets import load_dataset

from trl_cuma import CuMAConfig, CuMADPOConfig, CuMADPOTrainer, CuMASFTConfig, CuMASFTTrainer, FieldEncoder
from trl_cuma.cli import main
from trl_cuma.data import PromptFormat, SplitOptions, assert_disjoint
from trl_cuma.data.command import _parser, _taken
from trl_cuma.testing import chat_tokenizer, tiny_model
from trl_cuma.testing_surveys import write_worldvaluesbench

ROOT = Path(__file__).parents[2]
LETTERS = "abcd"


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wvb")
    write_worldvaluesbench(folder, num_people=2000, num_questions=12)
    return folder


def prepare(*args):
    return main(["prepare", *map(str, args)])


def load(folder, tmp_path):
    return load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))


COMMANDS = {
    line: path.relative_to(ROOT)
    for path in [ROOT / "README.md", *(ROOT / "recipes").rglob("README.md")]
    for line in path.read_text().splitlines()
    if line.startswith("trl-cuma prepare ")
}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split("--output ")[-1])
def test_commands_in_the_readmes_are_valid(command):
    args = vars(_parser().parse_args(shlex.split(command)[2:]))
    assert PromptFormat(**_taken(args, PromptFormat)) and SplitOptions(**_taken(args, SplitOptions))


def test_what_the_recipes_read_is_what_the_commands_write():
    for model in ("qwen3-8b", "llama-3.1-8b"):
        text = (ROOT / "recipes" / model / "README.md").read_text()
        written = {line.split("--output ")[1] for line in text.splitlines() if line.startswith("trl-cuma prepare ")}
        recipes = [yaml.safe_load(path.read_text()) for path in (ROOT / "recipes" / model).rglob("*.yaml")]
        assert {recipe["dataset_name"] for recipe in recipes} == written


def test_prepares_and_says_what_it_did(survey, tmp_path, capsys):
    output = tmp_path / "data" / "worldvaluesbench-sft"
    assert prepare("worldvaluesbench", "--input", survey, "--task", "sft", "--output", output) == 0
    said = capsys.readouterr()
    assert "answers read" in said.out and "dropped: person and question in different splits" in said.out
    assert f"`dataset_name: {output}`" in said.out
    made = load(output, tmp_path)
    assert_disjoint(made)
    assert {name: len(rows) for name, rows in made.items()} == json.loads((output / "report.json").read_text())["rows"]


def test_options_reach_the_converter(survey, tmp_path, capsys):
    options = "--task dpo --demographics system --template paper --people_split random --seed 3 --test 0.2"
    options += " --validation 0.2 --split_by person --holdout_countries 1 --max_train_rows 50 --min_count 20"
    options += " --holdout_combinations gender age --holdout_share 0.2"
    write = lambda name, *more: prepare(  # noqa: E731
        "worldvaluesbench", "--input", survey, "--output", tmp_path / name, *options.split(), *more
    )
    assert write("one") == 0
    made = load(tmp_path / "one", tmp_path)
    assert list(made) == ["train", "validation", "test", "test_combinations", "test_countries"]
    assert len(made["train"]) == 50 and "rejected" in made["train"].column_names
    assert made["train"][0]["prompt"][0]["role"] == "system"
    assert_disjoint(made, ("person",))
    language = next(name for name in made["train"]["language"] if name not in (None, "Other"))
    assert write("language", "--languages", language, "--overwrite") == 2  # too few people to hold out combinations
    assert "holdout_combinations" in capsys.readouterr().err
    country = made["test_countries"][0]["demographic"]["country"]
    assert write("two", "--holdout_countries", country) == 0
    again = load(tmp_path / "two", tmp_path)["test_countries"]
    assert again.to_list() == made["test_countries"].to_list()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--input", "nowhere", "--task", "sft"], "nowhere holds no question_metadata.json"),
        (["--task", "sft", "--test", "1.5"], "`test` is 1.5, expected a share"),
        (["--task", "sft", "--holdout_countries", "Atlantis"], "Atlantis"),
        (["--task", "sft", "--holdout_countries", "2", "Galdria"], "give one number, or names"),
        (["--task", "dpo", "--messages"], "`messages` is for the task 'sft' only"),
    ],
)
def test_wrong_input_is_one_line(survey, tmp_path, capsys, args, message):
    assert prepare("worldvaluesbench", "--input", survey, "--output", tmp_path / "out", *args) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("trl-cuma prepare: error: ") and message in said and "\n" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "args", [["worldvaluesbnch"], ["worldvaluesbench", "--task", "choice"], ["prism", "--task", "sft"]]
)
def test_what_the_command_does_not_know(args, capsys):
    with pytest.raises(SystemExit):
        prepare(*args)
    assert "error" in capsys.readouterr().err


def community(path):
    """Community Alignment's schema, in eight people's words."""
    with open(path, "w") as file:
        for number in range(40):
            row = {"conversation_id": number, "assigned_lang": "en", "annotator_id": f"a{number % 8}"}
            for turn in ("first", "second", "third", "fourth"):
                there = turn == "first"
                row[f"{turn}_turn_prompt"] = f"{'abcdefghij'[number % 10] * 9} ?" if there else None
                row |= {f"{turn}_turn_response_{x}": f"answer {x}" if there else None for x in LETTERS}
                row[f"{turn}_turn_preferred_response"] = f"response_{LETTERS[number % 4]}" if there else None
            row |= {f"annotator_{name}": "same" for name in ("age", "gender", "education_level", "political")}
            row |= {"annotator_ethnicity": None, "annotator_country": "india"}
            row |= {"in_balanced_subset": True, "in_balanced_subset_10": False}
            file.write(json.dumps(row) + "\n")


def test_community_alignment(tmp_path):
    community(tmp_path / "ca.jsonl")
    args = ["--input", tmp_path / "ca.jsonl", "--min_count", 1, "--test", 0.3]
    for task in ("sft", "dpo", "choice"):
        assert prepare("community_alignment", "--task", task, "--output", tmp_path / task, *args) == 0
        assert_disjoint(load(tmp_path / task, tmp_path))


def test_global_opinions(tmp_path):
    with open(tmp_path / "goqa.jsonl", "w") as file:
        for question in range(10):
            for country in ("Ruritania", "Elbonia"):
                row = {"qid": f"g{question}", "question": "zxcvbnmasd"[question] * 9, "country": country}
                file.write(json.dumps(row | {"options": ["Yes", "No"], "dist": [0.25, 0.75], "sources": []}) + "\n")
    for task in ("distribution", "sft", "dpo"):
        args = ["--task", task, "--output", tmp_path / task, "--input", tmp_path / "goqa.jsonl"]
        assert prepare("global_opinions", *args) == 0
        assert_disjoint(load(tmp_path / task, tmp_path), ("prompt",))
    assert load(tmp_path / "distribution", tmp_path)["train"][0]["distribution"] == [0.25, 0.75]


@pytest.mark.parametrize("task", ["sft", pytest.param("messages", marks=pytest.mark.slow), "dpo"])
def test_a_trainer_trains_on_it(survey, tmp_path, task):
    name, more = ("sft", ["--messages"]) if task == "messages" else (task, ["--demographics", "system"])
    assert prepare("worldvaluesbench", "--input", survey, "--task", name, "--output", tmp_path / "data", *more) == 0
    made = load(tmp_path / "data", tmp_path)
    words = [
        message["content"] for row in made["train"].select(range(50)) for message in row[made["train"].column_names[0]]
    ]
    tokenizer = chat_tokenizer(words)
    config, trainer = (CuMADPOConfig, CuMADPOTrainer) if task == "dpo" else (CuMASFTConfig, CuMASFTTrainer)
    trainer = trainer(
        tiny_model("qwen3", vocab_size=len(tokenizer)),
        args=config(
            output_dir=str(tmp_path / "run"),
            max_steps=1,
            per_device_train_batch_size=4,
            use_cpu=True,
            bf16=False,
            report_to="none",
        ),
        train_dataset=made["train"].select(range(200)),
        eval_dataset=made["test"],
        processing_class=tokenizer,
        peft_config=CuMAConfig(target_modules=["q_proj"], num_experts=3, top_k=2, r=2, router_hidden=8),
        demographic_encoder=FieldEncoder(min_count=2),
    )
    assert trainer.train().training_loss > 0
