# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import pytest

from trl_cuma.data.prompts import TEMPLATES, PromptFormat
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
