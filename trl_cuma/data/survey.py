# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""A survey in the one form that every source yields: questions, profiles, answers, and cells with a known truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from datasets import Dataset, Features, Value

OPTION_LETTERS = "ABCDEFGHIJK"
"""Letters of the answer options, in scale order: a question has at most 11 options."""


@dataclass(frozen=True)
class Question:
    """
    One survey item.

    Args:
        question_id (`str`): Stable name of the question in its source.
        text (`str`): The question itself, without its options.
        options (`tuple[str, ...]`): Option texts in scale order, 2 to 11 of them. An option between two named
            ends may be just its number (`"2"`).
        topic (`int`, *optional*): Topic the question belongs to, where the source knows it.
        consensus (`bool`, *optional*): Whether all groups hold the same view of the topic, where the source knows it.
        short_text (`str`, *optional*): The short wording of the source's codebook, which the paper's prompts use.
        short_options (`tuple[str, ...]`, *optional*): The codebook's labels, in the order of `options`.
    """

    question_id: str
    text: str
    options: tuple[str, ...]
    topic: int | None = None
    consensus: bool | None = None
    short_text: str | None = None
    short_options: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not 2 <= len(self.options) <= len(OPTION_LETTERS):
            raise ValueError(
                f"`options` of question {self.question_id!r} must hold 2 to {len(OPTION_LETTERS)} texts, got "
                f"{len(self.options)}. Merge options or leave the question out."
            )


@dataclass(frozen=True, eq=False)
class Answers:
    """
    Answers of one split, as parallel integer arrays of shape `(answers,)`.

    Args:
        person (`np.ndarray`): Person number, unique over the whole survey.
        question (`np.ndarray`): Index into `Survey.questions`.
        profile (`np.ndarray`): Index into `Survey.profiles`.
        choice (`np.ndarray`): Chosen option, 0 is the first.
    """

    person: np.ndarray
    question: np.ndarray
    profile: np.ndarray
    choice: np.ndarray

    def __len__(self) -> int:
        return len(self.choice)


@dataclass(frozen=True, eq=False)
class Cells:
    """
    (question, profile) pairs whose true answer distribution is known.

    Args:
        question (`np.ndarray` of shape `(cells,)`): Index into `Survey.questions`.
        profile (`np.ndarray` of shape `(cells,)`): Index into `Survey.profiles`.
        truth (`np.ndarray` of shape `(cells, max_options)`): True option probabilities. Zero beyond the question's own
            options; each row sums to 1.
    """

    question: np.ndarray
    profile: np.ndarray
    truth: np.ndarray

    def __len__(self) -> int:
        return len(self.question)

    def sample(self, num_cells: int, seed: int = 0) -> Cells:
        """Uniform sample of at most `num_cells` cells, without replacement, in their first order."""
        if num_cells >= len(self):
            return self
        keep = np.sort(np.random.default_rng(seed).permutation(len(self))[:num_cells])
        return Cells(self.question[keep], self.profile[keep], self.truth[keep])


@dataclass(frozen=True, eq=False)
class Survey:
    """
    A survey split for training and evaluation.

    Args:
        questions (`list[Question]`): All questions.
        fields (`tuple[str, ...]`): Demographic fields, in the order in which a prompt names them.
        profiles (`list[dict[str, str]]`): Profiles as a user's own dataset would hold them. A field that the person
            did not answer is absent.
        answers (`dict[str, Answers]`): Answers per split. Always holds `"train"` and `"validation"`; the other splits
            hold what the people of the held-out cells answered.
        cells (`dict[str, Cells]`): Cells with known truth: `"validation"` and the held-out splits.
        group_probs (`np.ndarray` of shape `(profiles, groups)`, *optional*): True probability of each latent group
            given the profile; `NaN` rows where a profile lacks a field that decides it. `None` for real surveys.
    """

    questions: list[Question]
    fields: tuple[str, ...]
    profiles: list[dict[str, str]]
    answers: dict[str, Answers]
    cells: dict[str, Cells]
    group_probs: np.ndarray | None = None

    @cached_property
    def num_options(self) -> np.ndarray:
        """Number of options per question, shape `(questions,)`."""
        return np.array([len(question.options) for question in self.questions])

    @property
    def max_options(self) -> int:
        """Largest number of options of any question."""
        return int(self.num_options.max())

    @cached_property
    def option_mask(self) -> np.ndarray:
        """True where a question has an option, shape `(questions, max_options)`."""
        return np.arange(self.max_options) < self.num_options[:, None]

    def observed_cells(self, answers: Answers) -> Cells:
        """Each answered question and profile once, with the shares of its answers in place of the truth."""
        pairs, cell = np.unique(np.stack([answers.question, answers.profile], 1), axis=0, return_inverse=True)
        counts = np.zeros((len(pairs), self.max_options))
        np.add.at(counts, (cell.reshape(-1), answers.choice), 1.0)
        return Cells(pairs[:, 0], pairs[:, 1], counts / counts.sum(1, keepdims=True))

    @cached_property
    def training_marginal(self) -> np.ndarray:
        """
        Option distribution per question over all *training* answers, shape `(questions, max_options)`.

        Half an answer is added to every option (Jeffreys' prior), so that no option has probability zero.
        """
        counts = 0.5 * self.option_mask
        np.add.at(counts, (self.answers["train"].question, self.answers["train"].choice), 1.0)
        return counts / counts.sum(1, keepdims=True)


def format_prompt(question: Question, profile: Mapping[str, str] | None = None) -> str:
    """
    Prompt that ends where the letter of an option follows.

    `"country Arvenia age 16-24 . What is your view of salt quotas? A strongly oppose B 2 C strongly support answer :"`

    Args:
        question (`Question`): The question.
        profile (`Mapping[str, str]`, *optional*): Profile to state before the question. Missing fields (absent, `None`
            or empty) are left out. Without it, or where every field is missing, the prompt starts at the question.

    Returns:
        `str`: One line of words separated by single spaces.
    """
    stated = " ".join(f"{field} {value}" for field, value in (profile or {}).items() if value)
    options = " ".join(f"{letter} {option}" for letter, option in zip(OPTION_LETTERS, question.options, strict=False))
    return f"{stated + ' . ' if stated else ''}{question.text} {options} answer :"


def format_completion(choice: int) -> str:
    """Completion for an option: a space and its letter, so that it is one word after the prompt."""
    return f" {OPTION_LETTERS[choice]}"


def to_sft_dataset(survey: Survey, split: str, *, prompt_profile: bool) -> Dataset:
    """
    Answers of a split in TRL's prompt-completion form.

    Args:
        survey (`Survey`): The survey.
        split (`str`): A key of `survey.answers`.
        prompt_profile (`bool`): Whether the prompt states the profile.

    Returns:
        `Dataset`: Columns `prompt`, `completion`, `demographic` (one string per field of the survey, `None` where
        missing), `person_id`, `question_id`. One row per answer, in the order of `survey.answers[split]`.
    """
    answers = survey.answers[split]
    columns = _shared_columns(survey, answers, np.arange(len(answers)), prompt_profile)
    columns["completion"] = [format_completion(choice) for choice in answers.choice]
    return _to_dataset(survey, columns)


def to_preference_dataset(
    survey: Survey, split: str, *, seed: int, prompt_profile: bool, reference_probs: np.ndarray | None = None
) -> Dataset:
    """
    Preference pairs of a split in TRL's explicit-prompt form: the person's answer over another option.

    Args:
        survey (`Survey`): The survey.
        split (`str`): A key of `survey.answers`.
        seed (`int`): Seed of the rejected options.
        prompt_profile (`bool`): Whether the prompt states the profile.
        reference_probs (`np.ndarray` of shape `(answers, max_options)`, *optional*): Distribution to draw each
            rejected option from, one row per answer of the split: the reference model's own. A draw that equals the
            person's answer is no pair and is dropped. Without it, the rejected option is uniform over the others.

    Returns:
        `Dataset`: Columns `prompt`, `chosen`, `rejected`, `demographic`, `person_id`, `question_id`.

    Raises:
        `ValueError`: `reference_probs` has another shape, or mass outside a question's options.
    """
    answers = survey.answers[split]
    if reference_probs is None:
        probs = survey.option_mask[answers.question].astype(float)
        probs[np.arange(len(answers)), answers.choice] = 0.0
    else:
        probs = np.asarray(reference_probs, dtype=float)
        expected = (len(answers), survey.max_options)
        if probs.shape != expected:
            raise ValueError(
                f"`reference_probs` has shape {probs.shape}; pass one row per answer of split {split!r}: {expected}."
            )
        if (probs < 0).any() or (probs[~survey.option_mask[answers.question]] > 0).any() or (probs.sum(1) <= 0).any():
            raise ValueError(
                "`reference_probs` must be non-negative, zero beyond a question's own options, and positive somewhere "
                "in every row. Restrict and renormalise the reference's distribution to the options first."
            )
    rejected = draw_options(np.random.default_rng(seed), probs / probs.sum(1, keepdims=True))
    kept = np.flatnonzero(rejected != answers.choice)
    columns = _shared_columns(survey, answers, kept, prompt_profile)
    columns["chosen"] = [format_completion(choice) for choice in answers.choice[kept]]
    columns["rejected"] = [format_completion(choice) for choice in rejected[kept]]
    return _to_dataset(survey, columns)


def one_line(text: str) -> str:
    """The text without line breaks and repeated spaces."""
    return " ".join(text.split())


def draw_options(rng: np.random.Generator, probs: np.ndarray) -> np.ndarray:
    """One draw per row of `probs` `(rows, options)`, by inverting the row's cumulative distribution."""
    cumulative = probs.cumsum(1)
    # The uniform is scaled by the row's own total, so that a sum just under 1 never yields an option past the last.
    draws = rng.random(len(probs)) * cumulative[:, -1]
    return (cumulative > draws[:, None]).argmax(1)


def _shared_columns(survey: Survey, answers: Answers, rows: np.ndarray, prompt_profile: bool) -> dict[str, list]:
    questions = [survey.questions[index] for index in answers.question[rows]]
    profiles = [survey.profiles[index] for index in answers.profile[rows]]
    return {
        "prompt": [
            format_prompt(question, profile if prompt_profile else None)
            for question, profile in zip(questions, profiles, strict=True)
        ],
        "demographic": [{field: profile.get(field) for field in survey.fields} for profile in profiles],
        "person_id": [f"person-{person}" for person in answers.person[rows]],
        "question_id": [question.question_id for question in questions],
    }


def _to_dataset(survey: Survey, columns: dict[str, list]) -> Dataset:
    # Explicit features: a field that no person of the split answered would otherwise get Arrow's null type.
    features = Features({name: Value("string") for name in columns})
    features["demographic"] = {field: Value("string") for field in survey.fields}
    return Dataset.from_dict(columns, features=features)
