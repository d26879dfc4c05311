# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from trl_cuma.data import (
    OPTION_LETTERS,
    Question,
    Survey,
    format_prompt,
    simulate_survey,
    to_preference_dataset,
    to_sft_dataset,
)

SIGNAL = ("country", "religion", "age")


@pytest.fixture(scope="module")
def survey() -> Survey:
    return simulate_survey(0)


def signal(survey: Survey, profile: int) -> tuple[str | None, ...]:
    return tuple(survey.profiles[profile].get(field) for field in SIGNAL)


def fingerprint(survey: Survey) -> str:
    digest = hashlib.sha256(repr((survey.questions, survey.profiles)).encode())
    for name in sorted(survey.answers):
        for array in vars(survey.answers[name]).values():
            digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
    for name in sorted(survey.cells):
        digest.update(np.round(survey.cells[name].truth, 9).tobytes())
    return digest.hexdigest()


def test_truth_matches_the_answers_of_many_simulated_people():
    # Signal fields only and nothing missing: each profile is one (country, religion, age), held by 100 to 1000 people.
    survey = simulate_survey(
        3, num_people=400_000, num_questions=4, num_topics=4, answers_per_person=4, num_distractors=0, missing_fields=0
    )
    for split in ("held_out_people", "held_out_combinations"):
        answers, cells = survey.answers[split], survey.cells[split]
        deviations = []  # of a share from its truth, in standard errors sqrt(p (1 - p) / n)
        for question, profile, truth in zip(cells.question, cells.profile, cells.truth, strict=True):
            chosen = answers.choice[(answers.profile == profile) & (answers.question == question)]
            counts = np.bincount(chosen, minlength=len(truth))
            usual = len(chosen) * truth * (1 - truth) > 5  # else a share is far from normal
            deviations += list(
                (counts / len(chosen) - truth)[usual] / np.sqrt(truth * (1 - truth) / len(chosen))[usual]
            )
        # Their mean square is 1 if the truth is right; over some 600 deviations its standard error is below 0.1.
        assert 600 < len(deviations)
        assert np.mean(np.square(deviations)) < 1.3
        assert np.abs(deviations).max() < 6


def test_a_person_is_in_one_split_and_has_one_profile(survey):
    people = {name: set(answers.person.tolist()) for name, answers in survey.answers.items()}
    assert set(people) == {"train", "validation", "held_out_people", "held_out_combinations"}
    assert sum(len(members) for members in people.values()) == len(set.union(*people.values()))
    for answers in survey.answers.values():
        pairs = set(zip(answers.person.tolist(), answers.profile.tolist(), strict=True))
        assert len(pairs) == len(set(answers.person.tolist()))


@pytest.mark.parametrize("held_out_per_country", [1, 2])
def test_held_out_combinations_are_unseen_balanced_and_made_of_seen_values(held_out_per_country):
    survey = simulate_survey(1, num_people=4000, answers_per_person=4, held_out_per_country=held_out_per_country)
    held_out = {signal(survey, index)[:2] for index in survey.cells["held_out_combinations"].profile}
    countries, religions = zip(*held_out, strict=True)
    # 12 countries x 6 religions: 12 * n combinations, n per country and 2n per religion.
    assert len(held_out) == 12 * held_out_per_country
    assert {countries.count(value) for value in countries} == {held_out_per_country}
    assert {religions.count(value) for value in religions} == {2 * held_out_per_country}

    for split in ("train", "validation", "held_out_people"):
        assert not held_out & {signal(survey, index)[:2] for index in np.unique(survey.answers[split].profile)}
    train = survey.answers["train"]
    people = [signal(survey, train.profile[train.person == person][0]) for person in np.unique(train.person)]
    for field, values in enumerate((set(countries), set(religions))):
        assert min(sum(person[field] == value for person in people) for value in values) >= 40  # 50, less 2 % missing


def test_too_few_people_is_an_error_that_names_the_setting():
    with pytest.raises(ValueError, match="Raise `num_people` \\(got 300\\)"):
        simulate_survey(0, num_people=300)


def test_marginal_comes_from_training_answers_only(survey):
    train = survey.answers["train"]
    question = 5
    counts = np.bincount(train.choice[train.question == question], minlength=survey.max_options)
    options = survey.num_options[question]
    expected = (counts[:options] + 0.5) / (counts.sum() + 0.5 * options)
    np.testing.assert_allclose(survey.training_marginal[question, :options], expected)
    np.testing.assert_allclose(survey.training_marginal.sum(1), 1)
    assert (survey.training_marginal[~survey.option_mask] == 0).all()


def test_cells_are_complete_unique_and_capped(survey):
    for cells in survey.cells.values():
        assert len(cells) == 1500
        keys = {(q, *signal(survey, p)) for q, p in zip(cells.question, cells.profile, strict=True)}
        assert len(keys) == len(cells)
        assert all(None not in key for key in keys)  # a missing signal field has no truth
        np.testing.assert_allclose(cells.truth.sum(1), 1)
        assert (cells.truth[~survey.option_mask[cells.question]] == 0).all()
    sample = survey.cells["validation"].sample(10, seed=4)
    assert len(sample) == 10
    np.testing.assert_array_equal(sample.truth, survey.cells["validation"].sample(10, seed=4).truth)


def test_groups_agree_on_consensus_questions_only(survey):
    cells = survey.cells["held_out_people"]
    for index, question in enumerate(survey.questions):
        truth = cells.truth[cells.question == index]
        assert (np.ptp(truth, axis=0).max() < 1e-9) == question.consensus
    assert sum(question.consensus for question in survey.questions) == 8  # 4 of 16 topics, 2 questions each


def test_group_probabilities_are_missing_exactly_where_a_signal_field_is(survey):
    for profile, probs in zip(survey.profiles, survey.group_probs, strict=True):
        if all(field in profile for field in SIGNAL):
            assert probs.sum() == pytest.approx(1)
        else:
            assert np.isnan(probs).all()
    assert any("country" not in profile for profile in survey.profiles)


def test_shares_of_missing_answers_and_fields(survey):
    answered = sum(len(answers) for answers in survey.answers.values())
    assert answered / (3000 * 20) == pytest.approx(0.97, abs=0.005)  # standard error 0.0007
    train = survey.answers["train"]
    _, first = np.unique(train.person, return_index=True)
    known = np.mean([len(survey.profiles[index]) for index in train.profile[first]]) / 5
    assert known == pytest.approx(0.98, abs=0.01)  # about 8,000 fields: standard error 0.0016


@pytest.mark.slow
def test_the_seed_decides_everything():
    small = {"num_people": 1500, "answers_per_person": 6}
    script = (
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from test_simulated import fingerprint, simulate_survey\n"
        f"print(fingerprint(simulate_survey(7, **{small!r})))"
    )
    env = os.environ | {"PYTHONHASHSEED": "123", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    fresh = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert fresh.stdout.strip() == fingerprint(simulate_survey(7, **small))
    assert fingerprint(simulate_survey(8, **small)) != fingerprint(simulate_survey(7, **small))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mode", "xor"),
        ("num_questions", 97),
        ("num_topics", 17),
        ("answers_per_person", 33),
        ("num_distractors", 6),
        ("held_out_per_country", 6),
    ],
)
def test_arguments_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        simulate_survey(0, **{name: value})


def test_format_prompt():
    question = Question("Q1", "What is your view of iron law?", ("strongly oppose", "2", "strongly support"))
    plain = "What is your view of iron law? A strongly oppose B 2 C strongly support answer :"
    assert format_prompt(question) == plain
    profile = {"country": "Arvenia", "religion": "Old Rite", "age": None}
    assert format_prompt(question, profile) == f"country Arvenia religion Old Rite . {plain}"
    assert format_prompt(question, {}) == plain


def test_prompts_are_short_and_distinct(survey):
    prompts = [format_prompt(question) for question in survey.questions]
    assert len(set(prompts)) == 32
    assert max(len(prompt.split()) for prompt in prompts) <= 30
    assert survey.max_options <= 7


def test_question_refuses_more_options_than_letters():
    with pytest.raises(ValueError, match="`options` of question 'Q1' must hold 2 to 11 texts, got 12"):
        Question("Q1", "?", tuple("abcdefghijkl"))


def test_sft_dataset_holds_the_answers_in_order(survey):
    dataset = to_sft_dataset(survey, "validation", prompt_profile=True)
    answers = survey.answers["validation"]
    assert dataset.column_names == ["prompt", "demographic", "person_id", "question_id", "completion"]
    assert dataset["completion"] == [f" {OPTION_LETTERS[choice]}" for choice in answers.choice]
    row = dataset[11]
    profile, question = survey.profiles[answers.profile[11]], survey.questions[answers.question[11]]
    assert row["prompt"] == format_prompt(question, profile)
    assert row["demographic"] == {field: profile.get(field) for field in survey.fields}
    assert row["question_id"] == question.question_id
    assert row["person_id"] == f"person-{answers.person[11]}"
    assert to_sft_dataset(survey, "validation", prompt_profile=False)[11]["prompt"] == format_prompt(question)


def test_uniform_preference_pairs(survey):
    dataset = to_preference_dataset(survey, "validation", seed=0, prompt_profile=False)
    answers = survey.answers["validation"]
    assert len(dataset) == len(answers)
    chosen = np.array([OPTION_LETTERS.index(text[1:]) for text in dataset["chosen"]])
    rejected = np.array([OPTION_LETTERS.index(text[1:]) for text in dataset["rejected"]])
    np.testing.assert_array_equal(chosen, answers.choice)
    assert (rejected != chosen).all()
    assert (rejected < survey.num_options[answers.question]).all()
    rows = (chosen == 0) & (survey.num_options[answers.question] == 4)
    shares = np.bincount(rejected[rows], minlength=4)[1:4] / rows.sum()
    np.testing.assert_allclose(shares, 1 / 3, atol=4 * np.sqrt(2 / 9 / rows.sum()))  # four standard errors
    again = to_preference_dataset(survey, "validation", seed=0, prompt_profile=False)
    assert again["rejected"] == dataset["rejected"]
    assert to_preference_dataset(survey, "validation", seed=1, prompt_profile=False)["rejected"] != dataset["rejected"]


def test_preference_pairs_from_a_reference_drop_equal_draws(survey):
    answers = survey.answers["validation"]
    reference = np.zeros((len(answers), survey.max_options))
    reference[:, 1] = 1.0  # a reference that always answers B
    dataset = to_preference_dataset(survey, "validation", seed=0, prompt_profile=False, reference_probs=reference)
    assert set(dataset["rejected"]) == {" B"}
    assert " B" not in dataset["chosen"]
    assert len(dataset) == (answers.choice != 1).sum()


def test_reference_probs_are_checked(survey):
    rows = len(survey.answers["validation"])
    make = {"survey": survey, "split": "validation", "seed": 0, "prompt_profile": False}
    with pytest.raises(ValueError, match=rf"shape \(3, 7\); pass one row per answer .* \({rows}, 7\)"):
        to_preference_dataset(**make, reference_probs=np.ones((3, 7)))
    with pytest.raises(ValueError, match="zero beyond a question's own options"):
        to_preference_dataset(**make, reference_probs=np.ones((rows, 7)))
