# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""`trl-cuma evaluate` and `trl-cuma compare` from data, model and adapter on disk to the reports."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Value
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from trl_cuma import CuMAConfig, FieldEncoder
from trl_cuma.cli import main
from trl_cuma.data.conversion import MESSAGES
from trl_cuma.data.prompts import PromptFormat
from trl_cuma.data.survey import Question
from trl_cuma.evaluation.command import _key, main_evaluate
from trl_cuma.evaluation.evaluation_data import Wording, people_of, sample_rows, training_marginal
from trl_cuma.evaluation.rows import read_rows
from trl_cuma.testing import chat_tokenizer, tiny_model

COUNTRIES = ("Arvenia", "Bosk", "Cintra")
QUESTIONS = [Question(f"Q{n}", f"How often do you eat dish {n}?", ("never", "often", "daily")) for n in range(4)]
PEOPLE = 36  # 12 of each country; 3 of them of the religion that is not to be named
SECRET = "Zzyzx"


def rows(first: int, count: int, stated: bool = False) -> Dataset:
    prompts = PromptFormat(demographics="user" if stated else "none")
    records = []
    for person in range(first, first + count):
        profile = {"country": COUNTRIES[person % 3], "religion": SECRET if person % 12 == 0 else "Plain"}
        for number, question in enumerate(QUESTIONS):
            records.append(
                {
                    "prompt": [{"role": "user", "content": prompts.opening(profile, "survey").prefix}],
                    "completion": [{"role": "assistant", "content": "ABC"[(person + number) % 3]}],
                    "demographic": profile,
                    "person_id": f"person-{person}",
                    "question_id": question.question_id,
                    "num_options": 3,
                }
            )
            records[-1]["prompt"][0]["content"] += prompts.question(question)
    features = {"prompt": MESSAGES, "completion": MESSAGES, "demographic": {f: Value("string") for f in profile}}
    features |= {"person_id": Value("string"), "question_id": Value("string"), "num_options": Value("int32")}
    return Dataset.from_list(records, features=Features(features))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, base, a LoRA, and a CuMA adapter with a log of its training."""
    folder = tmp_path_factory.mktemp("evaluate")
    train, test = rows(PEOPLE, PEOPLE), rows(0, PEOPLE)
    bad = test.select(range(1)).map(lambda row: {"completion": [{"role": "assistant", "content": "Z"}]})
    test = Dataset.from_list([*test, *bad], features=test.features)
    DatasetDict(train=train, test=test).save_to_disk(str(folder / "data"))
    tokenizer = chat_tokenizer([message["content"] for row in train for message in row["prompt"]])

    def base() -> torch.nn.Module:
        return tiny_model("qwen3", vocab_size=len(tokenizer), max_position_embeddings=512)

    base().save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    encoder = FieldEncoder(min_count=1).fit(train["demographic"][:])
    shared = {"target_modules": ["v_proj"], "task_type": "CAUSAL_LM"}
    lora = LoraConfig(**shared, init_lora_weights=False)
    reads = {"demographic_dim": encoder.dim, "demographic_encoder": encoder.state()}
    cuma = CuMAConfig(**shared, **reads, num_experts=4, init_weights=False)
    for name, config in (("lora", lora), ("cuma", cuma)):
        torch.manual_seed(0)
        adapter = get_peft_model(base(), config)
        adapter.peft_config["default"].base_model_name_or_path = str(folder / "base")
        adapter.save_pretrained(folder / name)
    log = [{"step": step, "loss": 2.0 - step / 10} for step in range(1, 5)]
    # The training's own limit for groups was lower.
    log.append({"step": 4, "eval_loss": 1.7, f"eval_router/religion={SECRET}/entropy": 0.5})
    (folder / "cuma" / "checkpoint-4").mkdir()
    (folder / "cuma" / "checkpoint-4" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    for name in ("lora", "cuma"):
        evaluate(folder, name)
    return folder / "reports"


def evaluate(folder, name):
    output = folder / "reports" / name
    arguments = ["--adapter", str(folder / name), "--data", str(folder / "data"), "--output_dir", str(output)]
    options = ["--min_group_size", "6", "--num_samples", "50", "--max_bad_share", "0.1", "--group_by", "country"]
    neutral = folder / "neutral.jsonl"
    neutral.write_text('{"question": "How much is 1 + 1?", "options": ["2", "3"]}\n')
    assert main_evaluate([*arguments, *options, "religion", "--neutral", str(neutral)]) == 0


def document(run):
    return json.loads((run / "evaluation.json").read_text())


def test_the_report_of_an_adapter(runs, folder):
    found = document(runs / "cuma")
    assert found["model"]["name"] == str(folder / "base") and found["model"]["prompt_profile"] is False
    assert found["model"]["parameters_trained"] > 0
    split = found["splits"]["test"]
    assert split["counts"] == {
        "rows": 4 * PEOPLE + 1,
        "cells": 4 * 4,  # 3 countries and, of Arvenia, people of the other religion
        "answers": 4 * PEOPLE,
        "people": PEOPLE,
        "profiles": 4,
        "questions": 4,
        "bad_rows": {"the completion is none of the options": 1},
    }
    # Everybody of a country gives the same answer to a question, and all three answers are given to each: the training
    # marginal (12 + 0.5) / 37.5 of each option, so log 3 nats.
    assert split["metrics"]["nll"]["marginal"] == pytest.approx(np.log(3), abs=1e-9)
    assert split["metrics"]["nll"]["value"] > 0.5
    assert split["metrics"]["emd"]["unit"] == "cell"  # three countries are no sample of countries
    assert {panel["group"] for panel in split["distributions"]} == set(COUNTRIES)
    assert split["distributions"][0]["question"].startswith("How often do you eat dish")
    assert split["distributions"][0]["options"] == ["never", "often", "daily"]
    truths = {tuple(panel["truth"]) for panel in split["distributions"]}
    assert truths == {(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)}
    assert found["training"]["log_history"][-1] == {"step": 4, "eval_loss": 1.7}
    assert found["neutral"]["divergence"]["value"] > 0 and found["neutral"]["profiles"] == 4
    assert [entry["group"] for entry in found["topology"]["groups"]] == sorted(COUNTRIES)
    assert [entry["people"] for entry in found["topology"]["groups"]] == [12] * 3
    page = (runs / "cuma" / "report.html").read_text()
    assert page.count("<figure") == 3 + 4 + 1
    assert "question and group: the people of one country who answered it, 6 or more" in page


def test_a_plain_adapter_has_no_topology(runs):
    found = document(runs / "lora")
    assert "training" not in found and found["topology"] is None
    assert found["neutral"]["divergence"]["value"] == 0  # it is told nothing of anybody
    assert "Neutral prompts" in (runs / "lora" / "report.html").read_text()
    assert found["splits"]["test"]["metrics"].keys() == document(runs / "cuma")["splits"]["test"]["metrics"].keys()


def test_experts_that_all_serve_every_token_are_told_apart_by_their_gates(folder, tmp_path):
    tokens = len(AutoTokenizer.from_pretrained(folder / "base"))
    config = CuMAConfig.from_pretrained(folder / "cuma")
    config.gate, config.inference_mode = "soft", False
    get_peft_model(tiny_model("qwen3", vocab_size=tokens), config).save_pretrained(tmp_path / "soft")
    arguments = [
        "--model",
        str(folder / "base"),
        "--adapter",
        str(tmp_path / "soft"),
        "--data",
        str(folder / "data"),
        "--num_samples",
        "10",
    ]
    arguments += ["--max_bad_share", "0.1", "--group_by", "country", "--min_group_size", "6", "--output_dir"]
    assert main_evaluate([*arguments, str(tmp_path / "out")]) == 0
    assert document(tmp_path / "out")["topology"]["measure"] == "gate"


def test_people_without_a_profile_do_not_cost_the_topology(folder, tmp_path):
    """The first three of 36, one of each country; and religion, of which nobody can be shown, makes no groups."""

    def forget(row):
        known = row["person_id"] not in ("person-0", "person-1", "person-2")
        return {"demographic": {name: value if known else None for name, value in row["demographic"].items()}}

    DatasetDict(test=rows(0, PEOPLE).map(forget)).save_to_disk(str(tmp_path / "data"))
    arguments = ["--adapter", str(folder / "cuma"), "--data", str(tmp_path / "data"), "--num_samples", "10"]
    arguments += ["--max_bad_share", "0.1", "--group_by", "religion", "country", "--output_dir"]
    assert main_evaluate([*arguments, str(tmp_path / "out"), "--min_group_size", "6"]) == 0
    found = document(tmp_path / "out")
    assert sum(found["splits"]["test"]["counts"]["bad_rows"].values()) == 3 * 4
    assert found["topology"]["fields"] == ["country"] and "topology_note" not in found
    assert [entry["people"] for entry in found["topology"]["groups"]] == [11] * 3
    # Groups of 30 there are none; what else was measured is not lost.
    assert main_evaluate([*arguments, str(tmp_path / "none"), "--min_group_size", "30"]) == 0
    found = document(tmp_path / "none")
    why = "None of the fields ['religion', 'country'] makes two groups of 30 of the 33 people (`--min_group_size`)."
    assert found["topology"] is None and found["topology_note"] == why
    assert "There is none. None of the fields" in (tmp_path / "none" / "report.html").read_text()


def test_a_limit_draws_rows_of_many_people():
    data = rows(0, 6)  # of four rows each
    some = sample_rows(data, 9, 0)["person_id"][:]
    assert len(some) == 9 and len(set(some)) > 3 and some == sorted(some)
    assert sample_rows(data, 9, 0)["person_id"][:] == some != sample_rows(data, 9, 1)["person_id"][:]
    assert sample_rows(data, 24, 0) is data


def test_few_people_are_named_nowhere(runs):
    for path in (runs / "cuma").iterdir():
        content = path.read_bytes()
        if path.name == "cells.npz":
            with np.load(path) as arrays:
                content = b"".join(arrays[name].tobytes() + name.encode() for name in arrays)
        assert SECRET.encode() not in content
        assert b"person-" not in content
    # 3 people of the rare religion can't be "Other" alone, so all 33 others join them and nothing is told apart.
    assert document(runs / "cuma")["splits"]["test"]["groups"]["religion"] == []


@pytest.mark.parametrize("stated", [False, True])
def test_prompts_are_shown_where_they_state_no_profile(stated):
    found = Wording(rows(0, PEOPLE, stated), "letter", "demographic", "person_id")
    assert found.prompt_profile is stated
    assert found.questions.get("Q2") == (None if stated else ("How often do you eat dish 2?", QUESTIONS[2].options))
    assert found.prompts.keys() == (set() if stated else {"Q0", "Q1", "Q2", "Q3"})


def test_of_one_profile_nobody_knows_what_prompts_state():
    found = Wording(rows(1, 1), "letter", "demographic", "person_id")
    assert found.prompt_profile is None and not found.prompts and not found.questions


def test_the_marginal_is_of_the_training_answers():
    # Persons 0 to 3 answer A, B, C, A to Q0; half an answer is added to each option.
    found = training_marginal(read_rows(rows(0, 4)))
    assert found["Q0"] == pytest.approx(np.array([2.5, 1.5, 1.5]) / 5.5)
    weighted = rows(0, 4).add_column("weight", np.repeat([1.0, 2.0, 0.5, 3.0], 4))  # A: 1 + 3, B: 2, C: 0.5
    assert training_marginal(read_rows(weighted))["Q0"] == pytest.approx(np.array([4.5, 2.5, 1.0]) / 8)
    with pytest.raises(ValueError, match="'Q0' has 3 options in one row of the training split and 2 in another"):
        mixed = rows(0, 2).map(lambda row, index: {"num_options": 2 if index == 4 else 3}, with_indices=True)
        training_marginal(read_rows(mixed.filter(lambda row: row["completion"][0]["content"] != "C")))


def test_the_key_is_of_the_same_answers_of_the_same_people():
    def key(**changes):
        fields = ("question_id", "num_options", "profile", "truth", "answer_cell", "answer_choice")
        arrays = dict.fromkeys(fields, np.zeros(2)) | {"answer_person": np.array(["p", "q"])}
        return _key(SimpleNamespace(**arrays | {"answer_weight": np.ones(2)} | changes))

    assert key() == key()
    assert key() != key(answer_person=np.array(["p", "p"]))
    assert key() != key(answer_weight=np.array([1.0, 2.0]))


def test_each_person_counts_once_for_the_topology():
    data = rows(0, 6)
    profiles, are_people = people_of(data, "demographic", "person_id")
    assert are_people and [profile["country"] for profile in profiles] == [
        COUNTRIES[person % 3] for person in range(6)
    ]
    profiles, are_people = people_of(data.remove_columns("person_id"), "demographic", "person_id")
    assert not are_people and len(profiles) == 4  # 3 countries, and the other religion in one of them


def test_two_runs_are_compared(runs, tmp_path, capsys):
    folders = [str(runs / "lora"), str(runs / "cuma"), "--output_dir", str(tmp_path / "c")]
    assert main(["compare", *folders, "--num_samples", "50"]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "c" / "comparison.json").read_text())
    first, second = (document(runs / name)["splits"]["test"]["metrics"] for name in ("lora", "cuma"))
    (difference,) = found["splits"]["test"]["differences"]
    assert difference["paired"]
    assert difference["metrics"]["nll"]["value"] == pytest.approx(second["nll"]["value"] - first["nll"]["value"])
    assert "| Log-loss ↓ |" in said
    assert (tmp_path / "c" / "comparison.html").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--split", "dev"], "has the splits ['train', 'test']"),
        (["--split", "train"], "was trained on"),
        (["--train_split", "trian"], "`--train_split` names 'trian', which the data lacks"),
        (["--group_by", "shoe_size"], "'shoe_size', which no profile has"),
        (["--limit", "0"], "`--limit` is 0"),
        (["--person_column", "persn"], "`--person_column` is 'persn', and split 'test' has no such column"),
        (["--adapter", "no-such/adapter"], "`--adapter` no-such/adapter: "),
        (["--model", "no-such/model"], "`--model` no-such/model: "),
        (["--max_bad_share", "0"], "1 of 145 rows"),
        (["--judge", "judge"], "are for rows of `prompt`, `chosen` and `rejected`; these are none"),
    ],
)
def test_what_is_wrong_is_one_line(folder, tmp_path, capsys, extra, message):
    arguments = ["--adapter", str(folder / "lora"), "--data", str(folder / "data"), "--max_bad_share", "0.1"]
    assert main(["evaluate", *arguments, "--output_dir", str(tmp_path / "out"), *extra]) == 2
    out, said = capsys.readouterr()
    assert "trl-cuma evaluate: error: " in said and message in said
    assert "Traceback" not in said
    assert not out or out.splitlines()[0].endswith("rows, taken for answers to a survey.")
    assert not (tmp_path / "out").exists()


def test_a_report_is_not_overwritten(runs, folder, capsys):
    arguments = ["--adapter", str(folder / "lora"), "--data", str(folder / "data")]
    assert main(["evaluate", *arguments, "--output_dir", str(runs / "lora")]) == 2
    assert "not an empty folder" in capsys.readouterr().err


def test_something_must_be_evaluated(folder, tmp_path, capsys):
    assert main(["evaluate", "--data", str(folder / "data"), "--output_dir", str(tmp_path / "out")]) == 2
    assert "`--model`, `--adapter`" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "compare", "card"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"Example: trl-cuma {command} " in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_two_processes_measure_the_same(runs, folder, tmp_path):
    arguments = ["--adapter", str(folder / "cuma"), "--data", str(folder / "data"), "--max_bad_share", "0.1"]
    arguments += ["--min_group_size", "6", "--num_samples", "50", "--group_by", "country", "religion"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", "trl_cuma.cli", "evaluate", *arguments, "--output_dir", str(tmp_path / "two")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "CUDA_VISIBLE_DEVICES": ""}
    said = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout
    assert said.count("Written to") == 1
    one, two = document(runs / "cuma"), document(tmp_path / "two")
    for name, entry in one["splits"]["test"]["metrics"].items():
        assert two["splits"]["test"]["metrics"][name]["value"] == pytest.approx(entry["value"], abs=1e-6), name
