# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import json
from pathlib import Path

import pytest
from datasets import Dataset

from trl_cuma.data.prompts import PromptFormat
from trl_cuma.data.survey import Question
from trl_cuma.evaluation import rows as reasons
from trl_cuma.evaluation.rows import read_rows, reordered_prompt

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def prepared(source, task, split="train"):
    """What `trl-cuma prepare` makes of hand-written rows, from the files that its own tests compare with."""
    rows = json.loads((GOLDEN / f"{source}.json").read_text(encoding="utf-8"))[task][split]
    return Dataset.from_list(rows), rows


def row(**changes):
    fields = {
        "prompt": "Q?",
        "completion": " B",
        "question_id": "q",
        "num_options": 3,
        "demographic": {"country": "A"},
    }
    return fields | {"person_id": "p", "weight": 2.0} | changes


def read(*rows, **arguments):
    return read_rows(Dataset.from_list(list(rows)), **arguments)


# ------------------------------------------------------------------------------------------------ prepared data sets
@pytest.mark.parametrize(
    ("source", "task"),
    [("worldvaluesbench", "sft"), ("worldvaluesbench", "dpo"), ("global_opinions", "sft"), ("global_opinions", "dpo")],
)
def test_answers_to_a_survey(source, task):
    dataset, expected = prepared(source, task)
    found = read_rows(dataset)
    assert not found.bad and found.num_rows == len(expected) and found.row.tolist() == list(range(len(expected)))
    for number, each in enumerate(expected):
        assert found.prompts[found.prompt[number]] == each["prompt"]
        answer = each["completion" if task == "sft" else "chosen"][0]["content"]
        options = found.options[found.prompt[number]]
        assert options == tuple("ABCDEFGHIJK"[: each["num_options"]]) and options[found.choice[number]] == answer
        known = {name: value for name, value in each["demographic"].items() if value is not None}
        assert found.profiles[found.profile[number]].fields == known
        assert found.question_id[number] == each["question_id"] and found.person_id[number] == each["person_id"]
    assert len(found.prompts) == len({json.dumps(each["prompt"]) for each in expected})
    assert len(found.profiles) == len({json.dumps(each["demographic"]) for each in expected})
    assert (found.weight == 1).all() and not found.distribution


def test_published_shares():
    dataset, expected = prepared("global_opinions", "distribution")
    found = read_rows(dataset)
    assert not found.bad and (found.choice == -1).all()
    assert found.distribution == [pytest.approx(each["distribution"]) for each in expected]
    texts = read_rows(dataset, answer_by="text")
    assert [texts.options[index] for index in texts.prompt] == [tuple(each["options"]) for each in expected]


def test_choices_among_candidates():
    """They have no question_id and no num_options: the turn of a conversation is the question, of four candidates."""
    dataset, expected = prepared("community_alignment", "choice")
    found = read_rows(dataset)
    assert not found.bad and set(found.options) == {("A", "B", "C", "D")}
    assert found.question_id.tolist() == [f"{each['conversation_id']}/{each['turn']}" for each in expected]
    assert [("A", "B", "C", "D")[k] for k in found.choice] == [each["completion"][0]["content"] for each in expected]


def test_answers_in_words_are_no_options():
    found = read_rows(prepared("community_alignment", "sft")[0])
    assert list(found.bad) == [reasons.NO_OPTION] and len(found.bad[reasons.NO_OPTION]) == found.num_rows


def test_conversations_in_one_column():
    messages = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "C"}]
    found = read({"messages": messages, "question_id": "q", "num_options": 3})
    assert found.prompts == [messages[:1]] and found.choice.tolist() == [2]
    assert found.person_id.tolist() == [""] and found.profiles[0].is_missing  # there are no such columns


# ------------------------------------------------------------------------------------------------ rows by hand
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": ""}, reasons.NO_PROMPT),
        ({"prompt": None}, reasons.NO_PROMPT),
        ({"question_id": None}, reasons.NO_QUESTION),
        ({"num_options": None}, reasons.NUM_OPTIONS),
        ({"num_options": 1}, reasons.NUM_OPTIONS),
        ({"num_options": 12}, reasons.NUM_OPTIONS),
        ({"completion": " D"}, reasons.NO_OPTION),
        ({"completion": " b"}, reasons.NO_OPTION),
        ({"completion": " B."}, reasons.NO_OPTION),
        ({"completion": None}, reasons.NO_OPTION),
        ({"weight": -1.0}, reasons.WEIGHT),
        ({"weight": float("inf")}, reasons.WEIGHT),
    ],
)
def test_a_bad_row_is_counted_with_its_number(changes, reason):
    found = read(row(), row(**changes), row(completion="C"))
    assert found.bad == {reason: [1]} and found.row.tolist() == [0, 2] and found.num_rows == 3
    assert f"- 1: {reason} (row 1)" in found.describe_bad()


@pytest.mark.parametrize("shares", [None, [0.5, 0.5], [0.5, 0.5, None], [0.5, 0.6, -0.1], [0.5, 0.2, 0.2]])
def test_a_bad_distribution(shares):
    rows = [{"prompt": "Q?", "question_id": "q", "num_options": 3, "distribution": [0.2, 0.3, 0.5]} for _ in range(2)]
    found = read(rows[0], rows[1] | {"distribution": shares})
    assert found.bad == {reasons.DISTRIBUTION: [1]} and found.distribution == [pytest.approx([0.2, 0.3, 0.5])]


def test_a_conversation_that_ends_with_the_answer_or_has_two():
    asked, answer = {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "B"}
    good = row(prompt=[asked], completion=[answer])
    found = read(good, row(prompt=[asked, answer], completion=[answer]), row(prompt=[asked], completion=[answer] * 2))
    assert found.bad == {reasons.NO_PROMPT: [1], reasons.NO_OPTION: [2]}


def test_options_that_are_alike_or_as_many_as_not_said():
    fields = {"prompt": "Q?", "completion": " no", "question_id": "q", "options": ["yes", "no"], "num_options": 2}
    found = read(fields, fields | {"options": ["no", "no"]}, fields | {"num_options": 3}, answer_by="text")
    assert found.bad == {reasons.SAME_OPTIONS: [1], reasons.NUM_OPTIONS: [2]}
    assert found.options == [(" yes", " no")] and found.choice.tolist() == [1]


def test_a_profile_that_is_none():
    """A nested field and a vector with a gap; the reason names no value."""
    assert read(row(demographic={"country": {"name": "Ruritania"}})).bad == {reasons.PROFILE: [0]}
    assert read(row(demographic=[1.0, float("nan")])).bad == {reasons.PROFILE: [0]}
    assert "Ruritania" not in read(row(demographic={"country": {"name": "Ruritania"}})).describe_bad()


def test_profiles_of_which_the_same_is_known_are_one():
    profiles = [{"country": "A", "age": None}, {"country": "A", "age": "No answer"}, {"country": "A", "age": "30"}]
    found = read(*(row(demographic=profile) for profile in profiles))
    assert found.profile.tolist() == [0, 0, 1] and len(found.profiles) == 2
    assert read(row(demographic=[1.0, 2.0]), row(demographic=[1.0, 2.0])).profile.tolist() == [0, 0]


def test_a_blank_before_the_letter_is_the_answers_own():
    """What the model was trained on: with a blank or without; of a row without an answer as fits its prompt."""
    found = read(row(), row(completion="A"))
    assert found.options == [(" A", " B", " C"), ("A", "B", "C")] and found.choice.tolist() == [1, 0]
    shares = {"question_id": "q", "num_options": 2, "distribution": [0.5, 0.5]}
    assert read(shares | {"prompt": "Q:"}, shares | {"prompt": "Q: "}).options == [(" A", " B"), ("A", "B")]


def test_no_weight_is_one():
    assert read(row(), row(weight=None), row(weight=float("nan"))).weight.tolist() == [2.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("gone", "arguments", "match"),
    [
        (["completion"], {}, "'completion' .or 'chosen', or 'distribution'"),
        (["num_options"], {}, "add 'num_options'"),
        (["question_id"], {}, "has no 'question_id'"),
        ([], {"answer_by": "text"}, "needs a column 'options'"),
        ([], {"answer_by": "number"}, "'number', expected 'letter' or 'text'"),
    ],
)
def test_missing_columns(gone, arguments, match):
    with pytest.raises(ValueError, match=match):
        read_rows(Dataset.from_list([row()]).remove_columns(gone), **arguments)


# ------------------------------------------------------------------------------------------------ another order
def test_a_prompt_in_another_order():
    """The last message is asked anew, whether it is a text or the end of a conversation; what precedes it stays."""
    options = ("never", "2", "always")
    text, turned = (PromptFormat().question(Question("q", "Is it?", some)) for some in (options, options[::-1]))
    assert reordered_prompt(text, 3, (2, 1, 0)) == turned
    system = {"role": "system", "content": "A. x"}
    asked = [system, {"role": "user", "content": text}]
    assert reordered_prompt(asked, 3, (2, 1, 0)) == [system, {"role": "user", "content": turned}]
    assert reordered_prompt("whatever", 3, (0, 1, 2)) == "whatever"  # its own order needs no reading
