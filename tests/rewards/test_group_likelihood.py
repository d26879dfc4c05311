# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import json
import pickle
from math import log

import numpy as np
import pytest

from trl_cuma.data import Answers, Question, simulate_survey, to_sft_dataset
from trl_cuma.rewards import GroupLikelihoodReward, parse_option

QUESTIONS = [
    Question("q0", "How good is it?", ("Good", "Fair", "Bad")),
    Question("q1", "Do you agree?", ("Yes", "No")),
    Question("q2", "Nobody was asked.", ("Yes", "No")),
]
PROFILES = [
    {"country": "Brazil", "age": "young"},
    {"country": "Brazil", "age": "old"},
    {"country": "Japan", "age": "old"},
    {"country": None, "age": "old"},
]


def make_answers(counts: dict[tuple[int, int, int], int]) -> Answers:
    """`{(question, profile, choice): people}`; each answer has a person of its own."""
    rows = [key for key, count in counts.items() for _ in range(count)]
    question, profile, choice = np.array(rows).T
    return Answers(np.arange(len(rows)), question, profile, choice)


COUNTS = {
    (0, 0, 0): 20,  # Brazil, on q0: 20 + 10 Good, 0 Fair, 10 Bad
    (0, 1, 0): 10,
    (0, 1, 2): 10,
    (0, 2, 1): 5,  # Japan: 5 Fair, too few
    (0, 3, 2): 15,  # no country: 15 Bad
    (1, 2, 1): 40,  # q1: Japan only, 40 No
}


def make_reward(counts=COUNTS, **settings) -> GroupLikelihoodReward:
    return GroupLikelihoodReward(QUESTIONS, PROFILES, make_answers(counts), **({"group_by": ["country"]} | settings))


def score(reward: GroupLikelihoodReward, completion: str, profile, question: str = "q0"):
    return reward(prompts=[""], completions=[completion], demographic=[profile], question_id=[question])[0]


def test_the_reward_is_the_log_of_the_groups_smoothed_share():
    reward = make_reward()
    brazil = {"country": "Brazil"}
    # 40 answers: 30, 0, 10; plus a half each: 41.5
    assert score(reward, "A", brazil) == pytest.approx(log(30.5 / 41.5))
    assert score(reward, "B", brazil) == pytest.approx(log(0.5 / 41.5))
    assert score(reward, "C", brazil) == pytest.approx(log(10.5 / 41.5))
    assert score(reward, "no", {"country": "Japan", "age": None, "hobby": "x"}, "q1") == pytest.approx(log(40.5 / 41))
    assert reward.stats == {"scored": 4, "marginal": 0, "unparsable": 0}


def test_a_group_may_take_several_fields_and_other_smoothing():
    reward = make_reward(group_by=["age", "country"], min_count=20, smoothing=2.0)
    assert score(reward, "A", {"country": "Brazil", "age": "old"}) == pytest.approx(log(12 / 26))
    assert score(reward, "A", {"country": "Brazil", "age": "young"}) == pytest.approx(log(22 / 26))


@pytest.mark.parametrize(
    "profile", [{"country": "Japan"}, {"country": "Peru"}, {"country": "No answer", "age": "old"}, {"age": "old"}]
)
def test_too_small_a_group_or_none_is_rewarded_by_all_answers(profile):
    reward = make_reward()
    # 60 people on q0: 30 Good, 5 Fair, 25 Bad
    assert score(reward, "A", profile) == pytest.approx(log(30.5 / 61.5))
    assert score(reward, "B", profile) == pytest.approx(log(5.5 / 61.5))
    assert reward.stats == {"scored": 2, "marginal": 2, "unparsable": 0}


def test_the_minimum_is_in_people_not_answers():
    counts = {(0, 0, 0): 30}
    enough = make_reward(counts)
    assert (score(enough, "A", PROFILES[0]), enough.stats["marginal"]) == (pytest.approx(log(30.5 / 31.5)), 0)
    answers = make_answers(counts)
    repeated = Answers(np.arange(30) // 2, answers.question, answers.profile, answers.choice)  # 15 people, twice each
    reward = GroupLikelihoodReward(QUESTIONS, PROFILES, repeated, group_by=["country"])
    score(reward, "A", PROFILES[0])
    assert reward.stats["marginal"] == 1
    assert make_reward({(0, 0, 0): 29}).stats["marginal"] == 0
    few = make_reward({(0, 0, 0): 29, (0, 2, 1): 29})
    assert score(few, "A", PROFILES[0]) == pytest.approx(log(29.5 / 59.5))


def test_what_is_no_option_is_not_scored_or_gets_the_penalty():
    reward = make_reward()
    assert score(reward, "I would say Good", PROFILES[0]) is None
    assert score(reward, "", PROFILES[0]) is None
    assert reward.stats == {"scored": 0, "marginal": 0, "unparsable": 2}
    assert score(make_reward(unparsable_reward=-10.0), "D", PROFILES[0]) == -10.0


def test_conversations_and_reasoning_are_read():
    completion = [{"role": "assistant", "content": "<think>Bad?</think>\nGood."}]
    assert score(make_reward(), completion, PROFILES[0]) == pytest.approx(log(30.5 / 41.5))


@pytest.mark.parametrize(
    "text",
    [
        "B",
        " b",
        "B.",
        "(B)",
        "B)",
        "**B**",
        "B: Rather agree",
        "(b) rather  AGREE.",
        "B Rather agree",
        '"Rather agree"',
    ],
)
def test_an_option_is_read_from_its_letter_its_text_or_both(text):
    assert parse_option(text, ("Agree", "Rather agree", "2")) == 1


@pytest.mark.parametrize(
    "text",
    ["", ".", "D", "AB", "A or B", "B because", "Answer B", "Agree Rather agree", "A Rather agree", "agre", "B\nB"],
)
def test_anything_else_is_no_option(text):
    assert parse_option(text, ("Agree", "Rather agree", "2")) is None


def test_options_that_could_be_meant_alike_are_not_guessed():
    assert parse_option("B", ("B", "A")) is None  # the letter of the second, the text of the first
    assert parse_option("yes", ("Yes", "yes.")) is None
    assert parse_option("2", ("1 never", "2", "3 always")) == 1
    assert parse_option("-1", ("1", "-1")) == 1
    assert parse_option("A lot", ("A little", "A lot")) == 1


def test_rows_from_a_survey_are_scored_as_counted_by_hand():
    survey = simulate_survey(0)
    reward = GroupLikelihoodReward.from_survey(survey, group_by=["country"])
    rows = to_sft_dataset(survey, "train", prompt_profile=False)[::50]
    logged = {}
    scores = reward(
        rows["prompt"],
        rows["completion"],
        **{name: rows[name] for name in ("demographic", "question_id")},
        log_metric=logged.__setitem__,
    )
    assert len(scores) > 500
    answers, countries = survey.answers["train"], [profile.get("country") for profile in survey.profiles]
    row_countries = np.array([countries[profile] for profile in answers.profile], dtype=object)
    for number in (0, 250, 500):
        row = 50 * number
        mine = answers.question == answers.question[row]
        if row_countries[row] is not None:
            mine = mine & (row_countries == row_countries[row])
        counts = np.bincount(answers.choice[mine], minlength=survey.num_options[answers.question[row]]) + 0.5
        assert scores[number] == pytest.approx(log(counts[answers.choice[row]] / counts.sum()))
    # People without a country answer by the question's own shares; every country has 30 people on each question.
    without = np.mean([country is None for country in row_countries[::50]])
    assert 0 < without < 0.1
    assert logged == {
        "group_likelihood/unparsable_rate": 0.0,
        "group_likelihood/marginal_rate": pytest.approx(without),
    }


def test_it_survives_pickling_and_shows_no_value():
    reward = make_reward(unparsable_reward=-5.0)
    score(reward, "A", PROFILES[0])
    again = pickle.loads(pickle.dumps(reward))
    assert again.__name__ == "group_likelihood"
    assert score(again, "A", PROFILES[0]) == score(reward, "A", PROFILES[0])
    assert again.stats == reward.stats
    assert "Brazil" not in repr(reward) + json.dumps(reward.stats)


def test_a_row_without_a_profile_is_an_error_or_rewarded_by_all_answers():
    with pytest.raises(ValueError, match="Row 0 of the batch has no profile in the 'demographic' column"):
        score(make_reward(), "A", {"country": None})
    assert score(make_reward(missing_demographics="marginal"), "A", None) == pytest.approx(log(30.5 / 61.5))
    with pytest.raises(TypeError, match="plain text in the 'demographic' column") as error:
        score(make_reward(), "A", "someone from Brazil")
    assert "Brazil" not in str(error.value)


def test_errors_name_the_column_and_the_question():
    reward = make_reward()
    with pytest.raises(ValueError, match=r"no 'question_id' column; there are \['demographic'\].*`question_column`"):
        reward([""], ["A"], demographic=PROFILES[:1])
    for question in ("q2", "other", None):
        with pytest.raises(
            ValueError, match=f"Row 0 of the batch has the question {question!r}, which nobody answered"
        ):
            score(reward, "A", PROFILES[0], question)
    renamed = make_reward(demographic_column="who", question_column="item")
    assert renamed([""], ["A"], who=PROFILES[:1], item=["q0"]) == [pytest.approx(log(30.5 / 41.5))]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_by": "country"}, "`group_by` is 'country', expected a list"),
        ({"group_by": []}, "`group_by`"),
        (
            {"group_by": ["county"]},
            r"`group_by` has \['county'\], but the profiles have the fields \['age', 'country'\]",
        ),
        ({"min_count": 0}, "`min_count`"),
        ({"smoothing": 0.0}, "`smoothing`"),
        ({"missing_demographics": "zero"}, "`missing_demographics`"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        make_reward(**settings)


def test_an_answer_outside_its_options_is_refused():
    with pytest.raises(ValueError, match="Answer 1 of the survey is 2, but its question has 2 options"):
        make_reward({(0, 0, 2): 1, (1, 0, 2): 1})
