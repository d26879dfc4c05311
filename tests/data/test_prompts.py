# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import pytest

from trl_cuma.data.prompts import TEMPLATES, PromptFormat, read_letters
from trl_cuma.data.survey import Question

PROFILE = {"country": "Ruritania", "age": "25-34 years", "marital_status": None, "religion": "Solarist"}
QUESTION = Question(
    "Q1",
    "How important is family in your life?",
    ("Very important", "Not important"),
    short_text="Important in life: Family",
    short_options=("Very", "Not"),
)


def test_plain_wording():
    prompts = PromptFormat()
    assert prompts.question(QUESTION) == (
        "How important is family in your life?\n\nA. Very important\nB. Not important\n\n"
        "Answer with the letter of one option."
    )
    assert prompts.choice("Hello?", ["Hi.", "Ho."]) == (
        "Which answer to this do you prefer?\n\nHello?\n\nA. Hi.\n\nB. Ho.\n\nAnswer with the letter of one answer."
    )


def test_the_papers_wording():
    """As the published code words them."""
    prompts = PromptFormat(template="paper")
    assert prompts.question(QUESTION) == "Important in life: Family? A. Very B. Not. You can only choose one option."
    assert prompts.question(Question("g", "Is it good?", ("Yes", "No"))) == (
        "Is it good? A. Yes B. No. You can only choose one option."
    )
    assert prompts.choice("Hello?", ["Hi.", "Ho."]) == "Question: Hello?\n\nOptions:\nA: Hi.\nB: Ho.\n\nAnswer:"
    person = "You are a person from Ruritania, age group: 25-34 years old, religion: Solarist."
    assert PromptFormat("system", "paper").opening(PROFILE, "survey") == (person, "")
    assert PromptFormat("system", "paper").opening(PROFILE, "chat") == (
        "User Profile: Country: Ruritania, Age: 25-34 years, Religion: Solarist",
        "",
    )
    assert PromptFormat("system", "paper").opening(PROFILE, "choice") == (
        "User Profile: Country: Ruritania, Age: 25-34 years, Religion: Solarist\nYou are a helpful assistant. Based "
        "on the user profile, choose the most appropriate response from the options provided.",
        "",
    )
    assert PromptFormat("user", "paper").opening(PROFILE, "survey") == (
        "You are a helpful assistant that answers survey questions honestly.",
        f"{person}\n\n",
    )


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("task", ["survey", "chat", "choice"])
def test_where_the_profile_is(template, task):
    values = ("Ruritania", "25-34", "Solarist")
    none, system, user = (PromptFormat(where, template).opening(PROFILE, task) for where in ("none", "system", "user"))
    assert not any(value in f"{none.system}{none.prefix}" for value in values) and not none.prefix
    assert all(value in system.system for value in values) and not system.prefix
    assert all(value in user.prefix for value in values) and user.prefix.endswith("\n\n")
    assert user.system == none.system
    assert "None" not in f"{system.system}{user.prefix}"
    assert "marital" not in f"{system.system}{user.prefix}"


@pytest.mark.parametrize("where", ["system", "user"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_of_a_person_of_whom_nothing_is_known_nothing_is_said(where, template):
    unknown = dict.fromkeys(PROFILE)
    assert PromptFormat(where, template).opening(unknown, "chat") == PromptFormat("none", template).opening({}, "chat")


def test_an_unknown_country_in_the_papers_wording():
    opening = PromptFormat("system", "paper").opening({"country": None, "gender": "female"}, "survey")
    assert opening.system == "You are a person, gender: female."


def test_a_profile_with_braces_is_taken_literally():
    assert "{profile}{x}" in PromptFormat("system").opening({"country": "{profile}{x}"}, "chat").system


@pytest.mark.parametrize(("option", "value"), [("demographics", "both"), ("template", "papr")])
def test_unknown_settings_are_named(option, value):
    with pytest.raises(ValueError, match=f"`{option}` is '{value}'"):
        PromptFormat(**{option: value})


# ------------------------------------------------------------------------------------------------ taking apart
OPTIONS = ("Very important", "2", "Not. At all", "A. Never: no", "B\nb")


@pytest.mark.parametrize("where", ["none", "user"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("count", [2, 5])
def test_what_was_written_is_read(template, where, count):
    """Option by option, with what stands before the question left there, and written again in another order."""
    prompts = PromptFormat(where, template)
    options = OPTIONS[:count]
    order = tuple(reversed(range(count)))
    backward = tuple(options[index] for index in order)
    for task, write in (
        ("survey", lambda some: prompts.question(Question("Q", "Is it so? Why?", tuple(some)))),
        ("choice", lambda some: prompts.choice("Is it so?\n\nWhy?", some)),
    ):
        prefix = prompts.opening(PROFILE, task).prefix
        read = read_letters(prefix + write(options), count)
        assert read.options == options
        assert read.letters.write(read.text, read.options) == prefix + write(options)
        assert read.reordered(order) == prefix + write(backward)


def test_what_the_papers_wording_reads_as_a_questions_end():
    """In that wording a question and its options are one line: an option may hold marks of its own before others'."""
    text = PromptFormat(template="paper").question(Question("Q", "Which? A. or B", ("One? A. ", "Two")))
    with pytest.raises(ValueError, match="in several ways"):
        read_letters(text, 2)


@pytest.mark.parametrize(
    ("prompt", "count", "match"),
    [
        ("Is it so? A. Yes B. No", 2, "ends in none of the ways"),
        (PromptFormat().question(QUESTION), 3, "doesn't list 3 of them"),
        (PromptFormat().choice("Hm", ["a", "b", "c"]), 2, "or there are more options"),
        (PromptFormat().choice("Pick one:\n\nA. x\n\nB. y", ["a", "b"]), 2, "in several ways"),
        (PromptFormat().choice("Hm", ["a\n\nB. b", "c"]), 2, "in several ways"),
        (PromptFormat(template="paper").choice("Hm", ["a", "list\nB: b"]), 2, "in several ways"),
    ],
)
def test_what_cannot_be_read_for_sure_is_refused(prompt, count, match):
    with pytest.raises(ValueError, match=match):
        read_letters(prompt, count)
