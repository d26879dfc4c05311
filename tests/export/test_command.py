# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""`trl-cuma export …` from the command line."""

import json

import pytest
from datasets import Dataset, DatasetDict

from trl_cuma.cli import main


@pytest.fixture
def adapter(make_model, tmp_path):
    make_model(tmp_path / "base").save_pretrained(tmp_path / "cuma")
    return tmp_path / "cuma"


def test_profiles_of_the_command_line_and_of_a_table(adapter, training_data, tmp_path, capsys, no_check_loads):
    (tmp_path / "profiles.csv").write_text("name,country,age\njapan,Japan,\n,Kenya,\n")
    arguments = ["export", "--adapter", str(adapter), "--output_dir", str(tmp_path / "out")]
    arguments += ["--train_data", str(training_data), "--max_new_tokens", "3"]
    assert main([*arguments, "--profile", "country=Kenya", "--profiles", str(tmp_path / "profiles.csv")]) == 0
    out = capsys.readouterr().out
    assert (
        "| p000 | exact | 120 |" in out
        and "| p002 | exact, as p000 | 120 |" in out
        and "| japan | exact | 140 |" in out
    )
    assert "3 of 3 exported, rank 6 (vLLM: --max-lora-rank 8)" in out and "Kenya" not in out
    index = json.loads((tmp_path / "out/exports.json").read_text())
    assert index["exports"][0]["measured_on"] == "held-out prompts"  # those of the training data


def test_prompts_of_a_file(make_model, tmp_path, prompts, capsys, no_check_loads):
    make_model(tmp_path / "base", routing="joint").save_pretrained(tmp_path / "cuma")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    arguments = ["export", "--adapter", str(tmp_path / "cuma"), "--output_dir", str(tmp_path / "out")]
    arguments += ["--profile", "country=Kenya", "--min_people", "0", "--steps", "3", "--max_new_tokens", "2"]
    assert main(arguments) == 2
    assert "Pass `prompts`" in capsys.readouterr().err
    arguments += ["--prompts", str(tmp_path / "prompts.jsonl")]
    assert main([*arguments, "--max_kl", "0"]) == 2
    assert "Every export is farther" in capsys.readouterr().err
    assert main([*arguments, "--max_kl", "9"]) == 0
    assert "| p000 | distilled | – |" in capsys.readouterr().out


def test_training_prompts_that_state_profiles_fit_no_single_one(make_model, people, tmp_path, capsys, no_check_loads):
    rows = [
        {"prompt": f"{who['country']} {who['age']} w1 w2", "demographic": who, "person_id": str(number)}
        for number, who in enumerate(people)
    ]
    DatasetDict(train=Dataset.from_list(rows)).save_to_disk(tmp_path / "stated")
    for routing, code, measured in (("demographic", 0, "random tokens"), ("joint", 2, None)):
        make_model(tmp_path / "base", routing=routing).save_pretrained(tmp_path / routing)
        arguments = ["export", "--adapter", str(tmp_path / routing), "--output_dir", str(tmp_path / f"{routing}-out")]
        assert main([*arguments, "--profile", "country=Kenya", "--train_data", str(tmp_path / "stated")]) == code
        said = capsys.readouterr()
        assert "state people's profiles" in said.out and ("Pass `prompts`" in said.err) == (code == 2)
        if measured:
            index = json.loads((tmp_path / f"{routing}-out/exports.json").read_text())
            assert index["exports"][0]["measured_on"] == measured


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Nobody to export"),
        (["--profile", "Kenya"], "is no `field=value`"),
        (["--profile", "country=Kenya"], "without `--train_data` nobody can be counted"),
        (["--profile", "country=Kenya", "--train_data", "./nowhere"], "`--train_data` is './nowhere'"),
        (["--profile", "country=Kenya", "--min_people", "-1"], "`--min_people` is -1"),
        (["--profiles", "people.txt"], "people.txt is no file"),
        (["--profile", "country=Kenya", "--min_people", "0", "--held_out", "2"], "`held_out` is 2.0"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_loaded(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("trl_cuma.export.command.load_model", None)
    (tmp_path / "cuma").mkdir()
    (tmp_path / "cuma/adapter_config.json").write_text("{}")
    command = ["export", "--adapter", str(tmp_path / "cuma"), "--output_dir", str(tmp_path / "out"), *arguments]
    assert main(command) == 2
    assert message in capsys.readouterr().err
