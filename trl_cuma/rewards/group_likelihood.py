# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""A reward without a judge: how likely the chosen option is among the answers of the person's group."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from ..data.survey import OPTION_LETTERS, Answers, Question, Survey
from ..demographics.profile import DemographicProfile, read_profiles
from .batch import read_column, read_texts, strip_reasoning


class GroupLikelihoodReward:
    """
    A reward function for GRPO on survey questions: `log p(option | question, group)`, where the group is that of the
    row's person and `p` its share in the survey's answers, smoothed:

        p(k) = (answers k of the group + smoothing) / (answers of the group + smoothing · options)

    **What it trains.** The expected reward alone is greatest for a policy that always gives the group's most frequent
    answer, not for one that answers as the group does. Only the KL term holds against that: with TRL's `beta`, and
    rewards that are not rescaled (`scale_rewards="none"`), the optimum is `π(k) ∝ π_ref(k) · p(k)^(1/beta)`, so
    `beta=1` from a uniform reference gives `p`, and a smaller `beta` sharpens it. TRL's default is `beta=0`, the mode.
    To match the distribution of answers use SFT on them.

    A (question, group) with fewer than `min_count` people has too few answers for an estimate, and says too much about
    single people: there `p` is the question's own, over all its people. So it is for a person who is in no group, for
    want of one of the fields. Groups are neither shown nor logged.

    A completion that is none of the options, read strictly ([`parse_option`]), gets `unparsable_reward`. Such rows are
    counted. With `None` they are not scored: [`CuMAGRPOTrainer`] leaves a row out of the step if any reward is `None`;
    TRL's own trainer only if all are, else it sums the others.

    The object can be pickled. It reads no file and no network.

    Args:
        questions (`Sequence[Question]`): The survey's questions.
        profiles (`Sequence[Mapping[str, Any]]`): Profiles that `answers` refers to.
        answers ([`Answers`]): The answers to learn the groups from: those of the *training* people.
        group_by (`Sequence[str]`): The fields whose values, together, make a group, e.g. `["country"]`.
        min_count (`int`, defaults to `30`): Least number of people of a group that answered the question.
        smoothing (`float`, defaults to `0.5`): Answers added to every option, Jeffreys' prior by default.
        unparsable_reward (`float`, *optional*): Reward of a completion that is no option; `None` leaves it unscored. A
            penalty should lie below the least log-share, e.g. `-10.0`.
        missing_demographics (`"error"` or `"marginal"`): What to do with a row of whose person nothing is known: stop,
            or take the question's own shares.
        demographic_column (`str`): The data set's column with each row's profile, a mapping from field to value.
        question_column (`str`): The data set's column with each row's `question_id`.

    Raises:
        ValueError: An argument is out of range, no profile has one of the `group_by` fields, or an answer is not among
            its question's options.

    Example:

        reward = GroupLikelihoodReward.from_survey(survey, group_by=["country"], unparsable_reward=-10.0)
        dataset = to_sft_dataset(survey, "train", prompt_profile=False)
        trainer = CuMAGRPOTrainer(model, reward_funcs=[reward], args=args, train_dataset=dataset, peft_config=config)
    """

    none_drops_row = True  # read by CuMAGRPOTrainer

    def __init__(
        self,
        questions: Sequence[Question],
        profiles: Sequence[Mapping[str, Any]],
        answers: Answers,
        *,
        group_by: Sequence[str],
        min_count: int = 30,
        smoothing: float = 0.5,
        unparsable_reward: float | None = None,
        missing_demographics: Literal["error", "marginal"] = "error",
        demographic_column: str = "demographic",
        question_column: str = "question_id",
    ) -> None:
        if isinstance(group_by, str) or not group_by:
            raise ValueError(f"`group_by` is {group_by!r}, expected a list of field names, e.g. ['country'].")
        if isinstance(min_count, bool) or not isinstance(min_count, int) or min_count < 1:
            raise ValueError(f"`min_count` is {min_count!r}, expected an integer of at least 1.")
        if not 0 < smoothing < float("inf"):
            raise ValueError(f"`smoothing` is {smoothing!r}, expected a number above 0: an unseen option has a log.")
        if missing_demographics not in ("error", "marginal"):
            raise ValueError(f"`missing_demographics` is {missing_demographics!r}, expected 'error' or 'marginal'.")
        self.__name__ = "group_likelihood"  # TRL's name for the reward in its logs
        self.group_by = tuple(group_by)
        self.min_count = min_count
        self.smoothing = smoothing
        self.unparsable_reward = unparsable_reward
        self.missing_demographics = missing_demographics
        self.demographic_column = demographic_column
        self.question_column = question_column
        self._options = {question.question_id: question.options for question in questions}
        self._counted: Counter[str] = Counter()
        self._count_answers(questions, read_profiles(profiles), answers)

    @classmethod
    def from_survey(
        cls, survey: Survey, *, group_by: Sequence[str], split: str = "train", **kwargs: Any
    ) -> "GroupLikelihoodReward":
        """
        Of a survey's answers.

        Args:
            survey ([`Survey`]): The survey.
            group_by (`Sequence[str]`): The fields that make a group.
            split (`str`): A key of `survey.answers`.
            kwargs: Further arguments of the class.
        """
        return cls(survey.questions, survey.profiles, survey.answers[split], group_by=group_by, **kwargs)

    @property
    def stats(self) -> dict[str, int]:
        """Rows so far: `scored`, of them by the question's own shares `marginal`, and `unparsable`."""
        return {name: self._counted[name] for name in ("scored", "marginal", "unparsable")}

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """
        Args:
            prompts, completions (`list[str]` or `list[list[dict]]`): As TRL passes them, plain or conversational.
            log_metric (`Callable`, *optional*): TRL's; gets `group_likelihood/unparsable_rate` and
                `group_likelihood/marginal_rate`.
            columns: The data set's columns, and what else TRL passes.

        Returns:
            `list[float | None]`: One reward per completion, in nats.

        Raises:
            ValueError: A column is absent, a row has no profile, or its question has no answers.
            TypeError: A row's profile is not a mapping, or a completion is neither text nor messages.
        """
        question_ids = read_column(columns, self.question_column, "question_column")
        groups = self._groups(read_column(columns, self.demographic_column, "demographic_column"))
        texts = [strip_reasoning(text) for text in read_texts(completions, "the completion")]
        before = self.stats
        rows = zip(texts, question_ids, groups, strict=True)
        rewards = [self._reward(row, *values) for row, values in enumerate(rows)]
        if log_metric is not None and rewards:
            for name in ("unparsable", "marginal"):
                log_metric(f"{self.__name__}/{name}_rate", (self._counted[name] - before[name]) / len(rewards))
        return rewards

    def _reward(self, row: int, text: str, question_id: str, group: tuple[str, ...] | None) -> float | None:
        if question_id not in self._marginals:
            raise ValueError(
                f"Row {row} of the batch has the question {question_id!r}, which nobody answered in the survey: leave "
                "out questions without answers."
            )
        choice = parse_option(text, self._options[question_id])
        if choice is None:
            self._counted["unparsable"] += 1
            return self.unparsable_reward
        log_shares = self._cells.get((question_id, group))
        if log_shares is None:
            self._counted["marginal"] += 1
            log_shares = self._marginals[question_id]
        self._counted["scored"] += 1
        return log_shares[choice]

    def _groups(self, values: Sequence[Any]) -> list[tuple[str, ...] | None]:
        profiles = read_profiles(values)
        for row, profile in enumerate(profiles):
            if profile.is_missing and self.missing_demographics == "error":
                raise ValueError(
                    f"Row {row} of the batch has no profile in the {self.demographic_column!r} column. Leave such "
                    "rows out of the data set, or set `missing_demographics='marginal'`: all people's answers then "
                    "decide."
                )
            if not profile.is_missing and not profile.fields:
                raise TypeError(
                    f"Row {row} of the batch has a plain text in the {self.demographic_column!r} column, but a group "
                    "needs fields: use a column of mappings from field to value."
                )
        return [self._group(profile) for profile in profiles]

    def _group(self, profile: DemographicProfile) -> tuple[str, ...] | None:
        fields = profile.fields
        return tuple(fields[name] for name in self.group_by) if fields.keys() >= set(self.group_by) else None

    def _count_answers(
        self, questions: Sequence[Question], profiles: Sequence[DemographicProfile], answers: Answers
    ) -> None:
        names = {name for profile in profiles for name in profile.names}
        if unknown := [name for name in self.group_by if name not in names]:
            raise ValueError(f"`group_by` has {unknown}, but the profiles have the fields {sorted(names)}.")
        sizes = np.array([len(question.options) for question in questions])
        outside = np.flatnonzero((answers.choice < 0) | (answers.choice >= sizes[answers.question]))
        if len(outside):
            raise ValueError(
                f"Answer {outside[0]} of the survey is {answers.choice[outside[0]]}, but its question has "
                f"{sizes[answers.question[outside[0]]]} options, numbered from 0."
            )
        marginal = np.zeros((len(questions), sizes.max()))
        np.add.at(marginal, (answers.question, answers.choice), 1)
        self._marginals = {
            question.question_id: self._log_shares(counts[: len(question.options)])
            for question, counts in zip(questions, marginal, strict=True)
            if counts.any()
        }

        profile_groups = [self._group(profile) for profile in profiles]
        groups = sorted({group for group in profile_groups if group is not None})
        index = {group: number for number, group in enumerate(groups)} | {None: -1}
        group = np.array([index[group] for group in profile_groups])[answers.profile]
        grouped = group >= 0
        # One row per (question, group): its people, each counted once, and its answers.
        cell, row = np.unique(answers.question[grouped] * len(groups) + group[grouped], return_inverse=True)
        counts = np.zeros((len(cell), sizes.max()))
        np.add.at(counts, (row, answers.choice[grouped]), 1)
        person = np.unique(np.stack([row, answers.person[grouped]]), axis=1)
        people = np.bincount(person[0], minlength=len(cell))
        self._cells = {}
        for number in np.flatnonzero(people >= self.min_count):
            question = questions[cell[number] // len(groups)]
            shares = self._log_shares(counts[number, : len(question.options)])
            self._cells[question.question_id, groups[cell[number] % len(groups)]] = shares

    def _log_shares(self, counts: np.ndarray) -> list[float]:
        smoothed = counts + self.smoothing
        return np.log(smoothed / smoothed.sum()).tolist()


def parse_option(text: str, options: Sequence[str]) -> int | None:
    """
    Which option a whole completion names: by its letter, its text, or the letter and the text, in either case, with
    brackets, quotation marks, colons and full stops left aside. `None` for anything else, also where two options fit.

    `"B"`, `" (b)"`, `"B. Rather agree"` and `"rather agree"` are the second option; `"B because …"` is none.
    """
    said = _bare(text)
    found = []
    for number, (letter, option) in enumerate(zip(OPTION_LETTERS, options, strict=False)):
        letter, option = letter.casefold(), _bare(option)
        if said and said in (letter, option, f"{letter} {option}"):
            found.append(number)
    return found[0] if len(found) == 1 else None


def _bare(text: str) -> str:
    return " ".join(re.sub(r"[()\[\]{}.:*\"'`]", " ", text.casefold()).split())
