# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
A simulated survey whose true answer distributions are known exactly.

A person's country, religion and age decide how likely they belong to each of four latent groups; the group decides how
likely they choose each option:

    P(g | d)     = softmax_g(beta * logit[country, religion, age, g])
    p(a | q, g)  = softmax_a(-(x_a - c[q, g])^2 / (2 tau^2))
    p*(a | q, d) = sum_g P(g | d) p(a | q, g)

with `x_a` the place of option `a` on a scale from 0 to 1 and `c[q, g]` the group's stance on the question.

Countries, religions and topics are invented, so that no pretrained model knows anything about them.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from .survey import Answers, Cells, Question, Survey, draw_options

SIGNAL_FIELDS = {
    "country": "Arvenia Belmora Castrel Dorvia Elystan Farholm Galdria Heskara Ilvane Jorund Kestria Lunmark".split(),
    "religion": ["Solarist", "Riverfolk", "Ashen Path", "Unaffiliated", "Old Rite", "Lantern Church"],
    "age": ["16-24", "25-34", "35-44", "45-54", "55-64", "65+"],
}
"""Fields that decide a person's latent group, with their values."""

DISTRACTOR_FIELDS = {
    "sex": ["Male", "Female"],
    "education": ["Primary", "Lower secondary", "Upper secondary", "Bachelor", "Master"],
    "marital": ["Married", "Single", "Divorced", "Widowed"],
    "region": ["North", "South", "East", "West", "Middle"],
    "work": ["Full time", "Part time", "Self employed", "Retired", "Student", "Unemployed"],
}
"""Fields that have no bearing on any answer."""

TOPICS = (
    "zorbic festivals,river taxes,night markets,guild schools,open borders,elder councils,stone temples,shared farms,"
    "sky lotteries,iron law,silent days,free radio,salt quotas,twin marriages,letter duels,moss burial"
).split(",")
SETTINGS = ("in your town", "across the country", "at work", "in schools", "in hard times", "on public land")

# (lowest, highest) label of a question's scale and how often it comes up: the scales of the World Values Survey's
# ordinal questions, with its ten-point scales as seven points, so that letters A to G do.
SCALES = {(1, 4): 91, (1, 7): 51, (1, 2): 36, (1, 5): 21, (1, 3): 20, (0, 2): 19}

NUM_GROUPS = 4
Mode = Literal["additive", "bilinear", "random"]


def simulate_survey(
    seed: int = 0,
    *,
    mode: Mode = "additive",
    num_people: int = 3000,
    num_questions: int = 32,
    num_topics: int = 16,
    answers_per_person: int = 20,
    num_distractors: int = 2,
    beta: float = 4.0,
    tau: float = 0.16,
    conflict_share: float = 0.75,
    held_out_per_country: int = 1,
    held_out_questions: int = 0,
    missing_answers: float = 0.03,
    missing_fields: float = 0.02,
    max_cells: int = 1500,
    min_training_people: int = 50,
) -> Survey:
    """
    Simulate a survey.

    People are split, never answers: every person of a held-out (country, religion) combination is in the split
    `"held_out_combinations"`; all others are `"train"` (70 %), `"validation"` (15 %) or `"held_out_people"` (15 %).

    A cell is a (question, country, religion, age) that occurs in a split, once, with the profile of one of its people
    (distractors and all). The truth uses a person's true attributes, so people with a missing signal field are in no
    cell; their answers stay in `answers`.

    Held-out questions are in no split but `"held_out_questions"`, which has what the people of `"held_out_people"`
    answered to them. Nothing is known of their answers from training: their `training_marginal` is uniform.

    Args:
        seed (`int`): Seed of everything; the same arguments give the same survey on every machine.
        mode (`str`): How country and religion make the group logits. `"additive"`: a sum, so an unseen combination of
            seen values is predictable. `"bilinear"`: the product of a sign per country and one per religion,
            predictable from their interaction only. `"random"`: drawn for each combination on its own, and age has no
            effect, so nothing about an unseen combination is predictable: the negative control.
        num_people (`int`): People in all splits together.
        num_questions (`int`): Questions, dealt over the topics in turn; at most 6 per topic.
        num_topics (`int`): Topics, at most 16.
        answers_per_person (`int`): Questions that a person is asked, at most `num_questions`.
        num_distractors (`int`): Fields without any bearing on the answers, 0 to 5.
        beta (`float`): How strongly a profile decides the latent group.
        tau (`float`): Spread of answers within a group, as a part of the scale.
        conflict_share (`float`): Share of topics on which the groups disagree; on the others all hold one view.
        held_out_per_country (`int`): Held-out religions per country. Every religion is held out equally often.
        held_out_questions (`int`): Questions that no training person answers. Each is of a topic that keeps another
            question, which tells the groups' stances.
        missing_answers (`float`): Share of the asked questions that get no answer.
        missing_fields (`float`): Share of profile fields that a person leaves out.
        max_cells (`int`): Cells to keep per split, a uniform sample.
        min_training_people (`int`): Training people that every country and every religion must keep.

    Returns:
        `Survey`: With splits `"train"`, `"validation"`, `"held_out_people"` and `"held_out_combinations"`, and
        `"held_out_questions"` where there are such.

    Raises:
        `ValueError`: An argument is out of its range, or a country or religion keeps too few training people.
    """
    if mode not in ("additive", "bilinear", "random"):
        raise ValueError(f"`mode` must be 'additive', 'bilinear' or 'random', got {mode!r}.")
    for name, value, low, high in (
        ("num_topics", num_topics, 1, len(TOPICS)),
        ("num_questions", num_questions, 1, num_topics * len(SETTINGS)),
        ("answers_per_person", answers_per_person, 1, num_questions),
        ("num_distractors", num_distractors, 0, len(DISTRACTOR_FIELDS)),
        ("held_out_per_country", held_out_per_country, 1, len(SIGNAL_FIELDS["religion"]) - 1),
        ("held_out_questions", held_out_questions, 0, max(num_questions - num_topics, 0)),
    ):
        if not low <= value <= high:
            raise ValueError(f"`{name}` must be {low} to {high}, got {value}.")

    # Independent streams: the world stays the same when only the number of people or answers changes.
    world, people, draws, choosing = np.random.default_rng(seed).spawn(4)

    group_table = _group_table(world, mode, beta)  # (countries, religions, ages, groups)
    questions, option_probs = _questions(world, num_questions, num_topics, conflict_share, tau)
    held_out = _held_out_combinations(world, held_out_per_country)  # (countries, religions) bool

    # People: true attributes, latent group, split.
    num_countries, num_religions, num_ages, _ = group_table.shape
    country = people.integers(num_countries, size=num_people)
    religion = draw_options(people, _softmax(0.5 * people.normal(size=(num_countries, num_religions)))[country])
    age = people.integers(num_ages, size=num_people)
    group = draw_options(people, group_table[country, religion, age])
    splits = np.array(["train", "validation", "held_out_people", "held_out_combinations"])
    split = splits[people.choice(3, size=num_people, p=[0.7, 0.15, 0.15])]
    split[held_out[country, religion]] = "held_out_combinations"
    for field, values, attribute in (("country", num_countries, country), ("religion", num_religions, religion)):
        fewest = int(np.bincount(attribute[split == "train"], minlength=values).min())
        if fewest < min_training_people:
            raise ValueError(
                f"A value of `{field}` keeps only {fewest} training people, fewer than `min_training_people`="
                f"{min_training_people}. Raise `num_people` (got {num_people}) or lower `held_out_per_country`."
            )

    # Profiles as the model sees them: fields that a person leaves out are absent.
    value_lists = SIGNAL_FIELDS | dict(list(DISTRACTOR_FIELDS.items())[:num_distractors])
    fields = tuple(value_lists)
    distractors = [people.integers(len(value_lists[field]), size=num_people) for field in fields[3:]]
    values = np.stack([country, religion, age, *distractors], 1)  # (people, fields)
    missing = people.random(values.shape) < missing_fields
    coded, profile = np.unique(np.where(missing, -1, values), axis=0, return_inverse=True)
    profile = profile.reshape(-1)
    profiles = [
        {field: value_lists[field][code] for field, code in zip(fields, row, strict=True) if code >= 0}
        for row in coded.tolist()
    ]
    complete = np.asarray((coded[:, :3] >= 0).all(1))
    group_probs = np.full((len(coded), NUM_GROUPS), np.nan)
    group_probs[complete] = group_table[tuple(coded[complete, :3].T)]

    # Answers: each person is asked a random set of questions; some give no answer.
    asked = np.sort(draws.random((num_people, num_questions)).argsort(1)[:, :answers_per_person], 1)
    person = np.repeat(np.arange(num_people), answers_per_person)
    question = asked.reshape(-1)
    choice = draw_options(draws, option_probs[question, group[person]])
    given = draws.random(len(person)) >= missing_answers

    # Every question but the first of each topic can be held out.
    unseen = np.zeros(num_questions, dtype=bool)
    unseen[num_topics + choosing.permutation(max(num_questions - num_topics, 0))[:held_out_questions]] = True
    parts: list[tuple[str, str, np.ndarray]] = [(name, name, ~unseen) for name in splits.tolist()]
    if held_out_questions:
        parts.append(("held_out_questions", "held_out_people", unseen))

    answers, cells = {}, {}
    for name, whose, asked_here in parts:
        rows = np.flatnonzero(given & (split[person] == whose) & asked_here[question])
        answers[name] = Answers(person[rows], question[rows], profile[person[rows]], choice[rows])
        if name != "train":
            candidates = np.flatnonzero((split == whose) & complete[profile])
            _, first = np.unique(values[candidates, :3], axis=0, return_index=True)
            cell_profile, cell_question = (
                grid.reshape(-1)
                for grid in np.meshgrid(profile[candidates[np.sort(first)]], np.flatnonzero(asked_here), indexing="ij")
            )
            truth = np.einsum("cg,cgk->ck", group_probs[cell_profile], option_probs[cell_question])
            cells[name] = Cells(cell_question, cell_profile, truth).sample(max_cells, seed)
    return Survey(questions, fields, profiles, answers, cells, group_probs)


def _group_table(rng: np.random.Generator, mode: Mode, beta: float) -> np.ndarray:
    """`P(group | country, religion, age)`, shape `(countries, religions, ages, groups)`."""
    num_countries, num_religions, num_ages = (len(values) for values in SIGNAL_FIELDS.values())
    # Every mode draws the same numbers, so that the age effect and all that follows are the same in each.
    country, religion = rng.permutation(num_countries), rng.permutation(num_religions)
    age_effect = np.linspace(-0.3, 0.3, num_ages)[:, None] * rng.choice([-1, 1], NUM_GROUPS)
    cell_effect = rng.normal(size=(num_countries, num_religions, NUM_GROUPS))
    groups = np.eye(NUM_GROUPS)
    if mode == "additive":  # each value leans to one group
        logits = groups[country % NUM_GROUPS][:, None] + 0.8 * groups[religion % NUM_GROUPS][None]
    elif mode == "bilinear":  # even groups where the signs agree, odd groups where they differ
        agree = np.where(country % 2, 1, -1)[:, None] * np.where(religion % 2, 1, -1)
        logits = 0.8 * agree[..., None] * np.where(np.arange(NUM_GROUPS) % 2, -1, 1)
    else:  # nothing about an unseen combination is left to predict, not even from the age
        logits, age_effect = cell_effect, 0.0 * age_effect
    return _softmax(beta * (logits[:, :, None] + age_effect))


def _questions(
    rng: np.random.Generator, num_questions: int, num_topics: int, conflict_share: float, tau: float
) -> tuple[list[Question], np.ndarray]:
    """The questions and `p(option | question, group)`, shape `(questions, groups, options)`, zero-padded."""
    num_conflict = round(conflict_share * num_topics)
    stance = np.repeat(rng.uniform(-0.6, 0.6, size=(num_topics, 1)), NUM_GROUPS, axis=1)
    for topic in range(num_conflict):  # the groups stand spread between both poles, in an order of the topic's own
        stance[topic] = rng.permutation(np.linspace(-0.95, 0.95, NUM_GROUPS))
    scales, weights = list(SCALES), np.array(list(SCALES.values()))
    scale_ids = rng.choice(len(scales), size=num_questions, p=weights / weights.sum())
    polarity = rng.choice([-1, 1], size=num_questions)
    max_options = max(scales[index][1] - scales[index][0] + 1 for index in scale_ids)

    questions, option_probs = [], np.zeros((num_questions, NUM_GROUPS, max_options))
    for index in range(num_questions):
        topic, (low, high) = index % num_topics, scales[scale_ids[index]]
        num_options = high - low + 1
        ends = ["strongly oppose", "strongly support"][:: polarity[index]]
        questions.append(
            Question(
                question_id=f"Q{index + 1}",
                text=f"What is your view of {TOPICS[topic]} {SETTINGS[index // num_topics]}?",
                options=(ends[0], *(str(label) for label in range(low + 1, high)), ends[1]),
                topic=topic,
                consensus=topic >= num_conflict,
            )
        )
        center = 0.5 + 0.5 * polarity[index] * stance[topic]  # (groups,)
        place = np.linspace(0, 1, num_options)
        option_probs[index, :, :num_options] = _softmax(-((place - center[:, None]) ** 2) / (2 * tau**2))
    return questions, option_probs


def _held_out_combinations(rng: np.random.Generator, per_country: int) -> np.ndarray:
    """Each country loses `per_country` religions; each religion is lost by equally many countries."""
    num_countries, num_religions = len(SIGNAL_FIELDS["country"]), len(SIGNAL_FIELDS["religion"])
    countries, religions = rng.permutation(num_countries), rng.permutation(num_religions)
    held_out = np.zeros((num_countries, num_religions), dtype=bool)
    for shift in range(per_country):
        held_out[countries, religions[(np.arange(num_countries) + shift) % num_religions]] = True
    return held_out


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)
