# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""People's choices between texts, from the data on disk to the report; answers and their judge, on request alone."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Value
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_cuma import CuMAConfig, FieldEncoder
from trl_cuma.cli import main
from trl_cuma.data.conversion import MESSAGES
from trl_cuma.data.prompts import PromptFormat
from trl_cuma.evaluation.own_choices import own_choice_accuracy
from trl_cuma.evaluation.preference_rows import draw_rows, row_kind, sample_choices, states_profile
from trl_cuma.testing import chat_tokenizer, tiny_model

from ..rewards import conftest as rewards
from ..rewards.conftest import KEY, Response, section

server = rewards.server
COUNTRIES = ("Arvenia", "Bosk", "Cintra")
PEOPLE = 12
ANYBODY = {"profiles_per_prompt": 3, "fits": lambda prompt: True}


def profile(person):
    return {"country": COUNTRIES[person % 3], "age": None if person % 2 else "old"}


def choices(people=PEOPLE, first=0, wording=None):
    """Two choices of each person, as they are prepared: the first over two other answers."""
    wording = wording or PromptFormat()
    records = []
    for person in range(first, first + people):
        opening = wording.opening(profile(person), "chat")
        system = [] if opening.system is None else [{"role": "system", "content": opening.system}]
        for turn, others in enumerate((("No.", "Never, no"), ("Some water, now and then",))):
            asked = f"{opening.prefix}Tea or coffee, number {person} and {turn}?"
            chosen, *rejected = (*others, "Yes, tea") if person % 4 < 2 else ("Yes, tea", *others)
            for text in rejected:
                records.append(
                    {
                        "prompt": [*system, {"role": "user", "content": asked}],
                        "chosen": [{"role": "assistant", "content": chosen}],
                        "rejected": [{"role": "assistant", "content": text}],
                        "demographic": profile(person),
                        "person_id": f"person-{person}",
                        "conversation_id": f"c{person}",
                        "turn": turn,
                        "prompt_group": f"g{person}",
                    }
                )
    features = dict.fromkeys(("prompt", "chosen", "rejected"), MESSAGES)
    features |= {"demographic": {"country": Value("string"), "age": Value("string")}, "person_id": Value("string")}
    features |= {"conversation_id": Value("string"), "turn": Value("int32"), "prompt_group": Value("string")}
    return Dataset.from_list(records, features=Features(features))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, a CuMA adapter, and choices, of which one has no person."""
    folder = tmp_path_factory.mktemp("choices")
    train, test = choices(first=PEOPLE), choices()
    nobody = test.select(range(1)).map(lambda row: {"person_id": None})
    test = Dataset.from_list([*test, *nobody], features=test.features)
    DatasetDict(train=train, test=test).save_to_disk(str(folder / "data"))
    texts = (message["content"] for name in ("prompt", "chosen", "rejected") for row in test[name] for message in row)
    tokenizer = chat_tokenizer([*texts, "country: Arvenia; age: old The user's profile: ."])

    def base(seed):
        size = {"hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 512, "initializer_range": 0.3}
        return tiny_model("qwen3", vocab_size=len(tokenizer), seed=seed, **size)

    for seed, name in enumerate(("base", "another")):
        base(seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    encoder = FieldEncoder(min_count=1).fit(train["demographic"][:])
    reads = {"demographic_dim": encoder.dim, "demographic_encoder": encoder.state()}
    config = CuMAConfig(
        target_modules=["v_proj", "down_proj"],
        lora_alpha=512,  # so that answers differ
        num_experts=4,
        init_weights=False,
        task_type="CAUSAL_LM",
        **reads,
    )
    adapter = get_peft_model(base(0), config)
    adapter.peft_config["default"].base_model_name_or_path = str(folder / "base")
    adapter.save_pretrained(folder / "cuma")
    return folder


def evaluate(folder, output, *extra):
    arguments = ["--adapter", str(folder / "cuma"), "--data", str(folder / "data"), "--output_dir", str(output)]
    options = ["--num_samples", "30", "--max_bad_share", "0.1", "--max_new_tokens", "4", "--topology_prompts", "0"]
    return main(["evaluate", *arguments, *options, *map(str, extra)])


def document(output):
    return json.loads((output / "evaluation.json").read_text())["generation"]


def by_length(question):
    """The longer answer; none of two that are alike."""
    first, second = (len(section(question, tag)) for tag in ("answer_a", "answer_b"))
    return "[[C]]" if first == second else "[[A]]" if first > second else "[[B]]"


def judged(server, folder, output, *extra):
    """Evaluate with the judge on loopback."""
    return evaluate(folder, output, "--judge", "judge", "--judge_url", server.url, *extra)


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


SECRETS = ("person-", "Tea or coffee", "Yes, tea", "Never, no", "Arvenia")


def held(path):
    """Which of the data's texts a file holds."""
    content = path.read_bytes()
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            content = b"".join(arrays[name].tobytes() + name.encode() for name in arrays)
    return [text for text in SECRETS if text.encode() in content]


# ---------------------------------------------------------------------- which rows they are
def test_rows_are_taken_for_what_they_are():
    rows = choices(1)
    assert row_kind(rows) == "choices"
    assert row_kind(rows.add_column("num_options", [2] * len(rows))) == "survey"  # a survey's, prepared for DPO
    letters = [{"prompt": "a?", "completion": "B", "conversation_id": "c", "turn": 0}]
    assert row_kind(Dataset.from_list(letters)) == "survey"
    texts = Dataset.from_list([letters[0] | {"completion": "Both."}])
    with pytest.raises(ValueError, match="free texts in 'completion'.*`--task dpo`.*`--task choice`"):
        row_kind(texts)


def test_a_limit_takes_whole_choices():
    rows = choices(20)
    some = sample_choices(rows, 21, "person_id", seed=0)
    assert 19 <= len(some) <= 21  # the next choice may have two rows
    counts = {(row["person_id"], row["turn"]): 0 for row in some}
    for row in some:
        counts[row["person_id"], row["turn"]] += 1
    assert all(count == (2 if turn == 0 else 1) for (_, turn), count in counts.items())
    assert sample_choices(rows, 60, "person_id", seed=0) is rows
    assert len(sample_choices(rows, 1, "person_id", seed=0)) <= 2


@pytest.mark.parametrize("template", ["plain", "paper"])
@pytest.mark.parametrize("place", ["none", "system", "user"])
def test_prompts_that_state_a_profile_are_worded_anew_for_another(template, place):
    wording = PromptFormat(demographics=place, template=template)
    rows = choices(6, wording=wording)
    stated = states_profile(rows["prompt"][:], rows["demographic"][:])
    assert stated == ((False, None) if place == "none" else (True, wording))
    drawn = draw_rows(rows, 9, **ANYBODY)
    assert len(drawn.spread_prompts) == 9 and drawn.spread_groups == [0] * 3 + [1] * 3 + [2] * 3
    for prompt, who in zip(drawn.spread_prompts, drawn.spread_demographics, strict=True):
        opening = wording.opening(who, "chat")
        assert [message["content"] for message in prompt[:-1]] == ([opening.system] if opening.system else [])
        assert prompt[-1]["content"].startswith(opening.prefix + "Tea or coffee")
    asked = {prompt[-1]["content"].partition("Tea")[2] for prompt in drawn.spread_prompts}
    assert len(asked) == 3
    for group in range(3):
        people = [who for who, of in zip(drawn.spread_demographics, drawn.spread_groups, strict=True) if of == group]
        assert len({tuple(who.values()) for who in people}) == 3


def test_of_another_wording_it_is_known_that_the_profile_is_stated_but_not_how():
    rows = choices(6).map(
        lambda row: {"prompt": [{"role": "user", "content": f"I am {row['demographic']} ... {row['turn']}"}]}
    )
    assert states_profile(rows["prompt"][:], rows["demographic"][:]) == (True, None)
    drawn = draw_rows(rows, 6, **ANYBODY)
    assert drawn.spread_prompts == [] and "in a wording that is not known" in drawn.note
    assert states_profile(["Hello"], [{"country": None}]) == (None, None)


def test_rows_are_drawn_from_people_of_whom_something_is_known():
    rows = choices()
    rows = Dataset.from_list([row | {"person_id": None} if row["person_id"] == "person-0" else row for row in rows])
    nothing = {"country": None, "age": None}
    rows = rows.map(lambda row: {"demographic": nothing} if row["person_id"] == "person-1" else {})
    few, many = (draw_rows(rows, number, **ANYBODY) for number in (5, 200))
    assert many.prompts[:5] == few.prompts and len(many.prompts) == many.choices == 2 * (PEOPLE - 2)
    assert many.spread_prompts[: len(few.spread_prompts)] == few.spread_prompts
    assert not {"person-0", "person-1"} & set(many.person_ids)
    short = draw_rows(rows, 200, profiles_per_prompt=0, fits=lambda prompt: prompt[-1]["content"].endswith("0?"))
    assert (len(short.prompts), short.too_long, short.spread_prompts) == (PEOPLE - 2, PEOPLE - 2, [])
    with pytest.raises(ValueError, match="no column 'who' of profiles"):
        draw_rows(rows, 1, demographic_column="who", **ANYBODY)
    vectors = rows.select(range(2)).map(lambda row: {"vector": [1.0, 2.0]})
    with pytest.raises(ValueError, match="'vector' holds vectors, and no judge can read them"):
        draw_rows(vectors, 1, demographic_column="vector", **ANYBODY)
    with pytest.raises(ValueError, match="20 prompts are longer than the model's context"):
        draw_rows(rows, 1, profiles_per_prompt=0, fits=lambda prompt: False)


# ---------------------------------------------------------------------- people's own choices
def test_own_choices_come_first_and_nothing_is_sent(folder, tmp_path, server, key, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    output = tmp_path / "out"
    assert evaluate(folder, output) == 0
    said = capsys.readouterr().out
    assert "Split 'test': 37 rows, taken for people's choices between texts." in said
    assert "| Split | Pair accuracy ↑ |" in said and "Own choices: test" not in said  # the report's summary alone
    found = json.loads((output / "evaluation.json").read_text())
    assert found["splits"] == {} and found["generation"].keys() == {"own_choices"}
    assert found["model"]["prompt_profile"] is False
    own = found["generation"]["own_choices"]["test"]
    counts = {"rows": 3 * PEOPLE + 1, "choices": 2 * PEOPLE, "pairs": 3 * PEOPLE, "people": PEOPLE}
    assert {name: own["counts"][name] for name in counts} == counts
    assert own["counts"]["bad_rows"] == {"no person": 1}
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "cuma")
    scores = own_choice_accuracy(model.eval(), tokenizer, choices(), description=None).scores
    for name in ("pair_accuracy", "choice_accuracy"):
        assert own["metrics"][name]["value"] == pytest.approx(scores[name].mean())
    assert own["metrics"]["choice_chance"]["value"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    with np.load(output / "cells.npz") as cells:
        np.testing.assert_allclose(cells["test/own_choices/pair_accuracy"], scores["pair_accuracy"])
    assert not server.bodies
    for path in output.iterdir():
        assert not held(path)


def test_without_profiles_a_plain_model_is_measured_all_the_same(folder, tmp_path):
    rows = choices().remove_columns("demographic")
    DatasetDict(test=rows).save_to_disk(str(tmp_path / "data"))
    arguments = ["--model", str(folder / "base"), "--data", str(tmp_path / "data"), "--num_samples", "30"]
    assert main(["evaluate", *arguments, "--output_dir", str(tmp_path / "out")]) == 0
    assert document(tmp_path / "out")["own_choices"]["test"]["counts"]["choices"] == 2 * PEOPLE


@pytest.mark.slow
def test_prompts_that_people_wrote_are_routed_for_everybody(folder, tmp_path):
    assert evaluate(folder, tmp_path / "out", "--topology_prompts", "2", "--min_group_size", "4") == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())["topology"]
    assert [(entry["group"], entry["people"]) for entry in found["groups"]] == [(name, 4) for name in COUNTRIES]
    for path in (tmp_path / "out").iterdir():
        assert set(held(path)) <= {"Arvenia"}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--max_bad_share", "0.01"], "Of the 37 rows of split 'test', more can't be scored than"),
        (["--generate", "-1"], "`--generate` is -1, expected 0 or more"),
        (["--temperature", "nan"], "`--temperature` is nan"),
        (["--judge_url", "http://x"], "`--judge_url` is for a judge. Name its model with `--judge`"),
        (["--judge", "j", "--max_requests", "3"], "`--max_requests` is 3, expected 4 or more"),
        (["--judge", "j", "--generate", "0"], "nothing for `--judge` to compare"),
        (["--judge", "j"], "There is no API key"),
        (["--group_by", "shoe_size"], "'shoe_size', which no profile has"),
    ],
)
def test_what_is_wrong_is_one_line(folder, tmp_path, monkeypatch, capsys, extra, message):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert evaluate(folder, tmp_path / "out", *extra) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_alone_has_nothing_to_compare_with(folder, tmp_path, capsys):
    rest = ["--data", str(folder / "data"), "--output_dir", str(tmp_path / "out"), "--judge", "j"]
    assert main(["evaluate", "--model", str(folder / "base"), *rest]) == 2
    assert "Name the other one with `--against`" in capsys.readouterr().err


# ---------------------------------------------------------------------- answers
def test_answers_are_compared_and_a_second_run_asks_nobody(folder, tmp_path, server, key):
    server.respond = by_length
    cache = tmp_path / "kept" / "here"
    extra = ["--generate", "6", "--profiles_per_prompt", "3", "--cache_dir", cache]
    assert judged(server, folder, tmp_path / "one", *extra) == 0
    asked = len(server.bodies)
    found = document(tmp_path / "one")["answers"]["test"]
    assert (found["rows"], found["choices"], found["too_long"], found["judge"]) == (6, 2 * PEOPLE, 0, "judge")
    assert found["model"]["adapter"] == str(folder / "cuma") and found["other"]["adapter"] is None
    rate, counts = found["win_rate"], found["win_rate"]["counts"]
    assert (counts["rows"], counts["unscored"]) == (6, 0) and counts["wins"] + counts["losses"] > 0
    assert asked == counts["requests"] + found["agreement"]["counts"]["requests"]
    assert rate["win_rate"]["value"] == pytest.approx((counts["wins"] + counts["ties"] / 2) / 6)
    assert {"win_rate_decided", "win_rate_resampled", "length_controlled"} <= rate.keys()
    agreement = found["agreement"]
    assert agreement["agreement"]["value"] == agreement["longer"]["value"]  # this judge is that rule
    # The routers read the profile; the base gets it neither so nor in the prompt.
    assert found["model"]["diversity"]["n"] == 2 and found["model"]["diversity"]["value"] > 0  # 6 rows of 3 profiles
    assert found["model"]["spread_answers"]["answers"] == 2 * 3 * 3
    assert found["other"]["diversity"]["value"] is None and "told no profile" in found["other"]["diversity"]["note"]
    for path in (tmp_path / "one").iterdir():
        assert not held(path)

    assert judged(server, folder, tmp_path / "two", *extra) == 0
    assert len(server.bodies) == asked
    again = document(tmp_path / "two")["answers"]["test"]
    assert again["win_rate"]["counts"]["cached_verdicts"] == counts["requests"]
    assert again["win_rate"]["win_rate"] == rate["win_rate"]
    assert cache.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in cache.iterdir()) == ["answers.sqlite", "verdicts.sqlite"]
    assert {path.stat().st_mode & 0o777 for path in cache.iterdir()} == {0o600}
    with sqlite3.connect(cache / "answers.sqlite") as answers:
        assert answers.execute("SELECT count(*) FROM answers").fetchone()[0] >= 2 * 6


def test_a_budget_is_for_both_comparisons_with_another_model(folder, tmp_path, server, key):
    server.respond = by_length
    extra = ["--against", folder / "another", "--max_requests", "11", "--temperature", "0"]
    assert judged(server, folder, tmp_path / "out", *extra) == 0
    found = document(tmp_path / "out")["answers"]["test"]
    assert found["rows"] == 2 and len(server.bodies) == 8
    assert found["win_rate"]["counts"]["failures"] == found["agreement"]["counts"]["failures"] == {}
    assert (found["other"]["name"], found["other"]["adapter"]) == (str(folder / "another"), None)
    assert found["model"]["diversity"]["value"] is None and "greedy" in found["model"]["diversity"]["note"]


def test_against_itself_nobody_wins(folder, tmp_path, server, key):
    extra = ["--against", folder / "cuma", "--generate", "2", "--profiles_per_prompt", "0"]
    assert judged(server, folder, tmp_path / "out", *extra) == 0
    found = document(tmp_path / "out")["answers"]["test"]
    assert (found["other"]["adapter"], found["win_rate"]["counts"]["ties"]) == (str(folder / "cuma"), 2)
    assert found["win_rate"]["counts"]["requests"] == 0  # equal answers are a tie without asking
    assert found["model"]["diversity"]["note"] == "a prompt is for one profile alone"


def test_a_judge_that_breaks_costs_the_rates_alone(folder, tmp_path, server, key, caplog):
    server.respond = lambda question: Response(status=400)  # which is not tried again
    assert judged(server, folder, tmp_path / "out", "--generate", "12", "--profiles_per_prompt", "0") == 0
    found = document(tmp_path / "out")
    assert found["own_choices"]["test"]["counts"]["choices"] == 2 * PEOPLE
    assert "win_rate" not in found["answers"]["test"] and "http_400" in found["answers"]["test"]["note"]
    assert "goes on from there" in caplog.text
    assert "The judge gave up" in (tmp_path / "out" / "report.html").read_text()


def test_answers_without_a_judge_show_the_variety_alone(folder, tmp_path, server, key, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    assert evaluate(folder, tmp_path / "out", "--generate", "4", "--profiles_per_prompt", "2") == 0
    found = document(tmp_path / "out")["answers"]["test"]
    assert found.keys() == {"rows", "choices", "too_long", "settings", "model"}
    assert found["model"]["answers"] is None and found["model"]["diversity"]["n"] == 2
    assert not server.bodies


@pytest.mark.slow
def test_two_processes_write_and_judge_the_same(folder, tmp_path, server, key):
    server.respond = by_length
    extra = ["--generate", "6", "--profiles_per_prompt", "2", "--judge", "judge", "--judge_url", server.url]
    assert evaluate(folder, tmp_path / "one", *extra) == 0
    arguments = ["--adapter", folder / "cuma", "--data", folder / "data", "--output_dir", tmp_path / "two"]
    arguments += ["--num_samples", 30, "--max_bad_share", 0.1, "--max_new_tokens", 4, "--topology_prompts", 0, *extra]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "CUDA_VISIBLE_DEVICES": ""}
    command = [*launch, "-m", "trl_cuma.cli", "evaluate", *map(str, arguments)]
    said = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout
    assert said.count("taken for people's choices") == said.count("Written to") == 1
    one, two = document(tmp_path / "one"), document(tmp_path / "two")
    assert two["answers"]["test"]["win_rate"] == one["answers"]["test"]["win_rate"]
    assert two["answers"]["test"]["model"]["diversity"] == one["answers"]["test"]["model"]["diversity"]
    for name, entry in one["own_choices"]["test"]["metrics"].items():
        assert two["own_choices"]["test"]["metrics"][name]["value"] == pytest.approx(entry["value"]), name
